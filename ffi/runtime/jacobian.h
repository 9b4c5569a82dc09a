// The Jacobian of softmax on whole arrays, shared out among threads.
#pragma once

#include <cstdint>

#include "ffi/kernels/table.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// out = y·(t - <y, t>) of `rows` contiguous rows of `n` elements. out may be y or t, but not overlap them
// otherwise.
template <typename E>
void JacobianRows(const KernelTable<E>& kernels, Executor& executor, const E* y, const E* t, E* out,
                  std::int64_t rows, std::int64_t n);

}  // namespace jax_softmax2p
