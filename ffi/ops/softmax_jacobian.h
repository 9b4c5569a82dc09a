// The Jacobian of softmax on whole arrays, shared out among threads.
#pragma once

#include <cstdint>

#include "ffi/kernels/table.h"
#include "ffi/ops/softmax.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// out = y·(t - <y, t>) along n. out may be y or t, but not overlap them otherwise.
template <typename E>
void Jacobian(const KernelTable<E>& kernels, Executor& executor, const E* y, const E* t, E* out,
              const Layout& layout);

}  // namespace jax_softmax2p
