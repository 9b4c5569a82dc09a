// Whole rows from the pieces that a KernelTable has, shared out among threads.
#pragma once

#include <cstdint>

#include "ffi/kernels/table.h"
#include "ffi/runtime/algorithm.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// y = softmax(x) of `rows` contiguous rows of `n` elements. y may be x, but not overlap it otherwise.
// The algorithm changes the speed, never the bits.
template <typename T>
void SoftmaxRows(const KernelTable<T>& kernels, Executor& executor, Algorithm algorithm, const T* x, T* y,
                 std::int64_t rows, std::int64_t n);

// out = y·(t - <y, t>), likewise. out may be y or t.
template <typename T>
void JacobianRows(const KernelTable<T>& kernels, Executor& executor, const T* y, const T* t, T* out,
                  std::int64_t rows, std::int64_t n);

}  // namespace jax_softmax2p
