// The Jacobian of softmax applied to arrays, shared out among threads.
#pragma once

#include "ffi/base/layout.h"
#include "ffi/kernels/table.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// out = y·(t - <y, t>) along n, for arrays of that layout; y is a softmax, t a tangent or cotangent. out may
// be y or t, but not overlap them otherwise. Within 4 ULP of the row's largest entry.
template <typename E>
void SoftmaxJacobian(const KernelTable<E>& kernels, Executor& executor, const E* y, const E* t, E* out,
                     const Layout& layout);

}  // namespace jax_softmax2p
