// Softmax of whole arrays from the pieces that a KernelTable has, shared out among threads.
#pragma once

#include <cstdint>

#include "ffi/base/layout.h"
#include "ffi/kernels/table.h"
#include "ffi/ops/algorithm.h"
#include "ffi/ops/logits.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// How an array is computed.
struct SoftmaxPlan {
  bool maximum_first;  // three passes
  bool reload;         // what pass 1 computes of every exponential is kept, and loaded for the result
  bool non_temporal;   // y is written past the caches
};

// `lanes` is KernelTable::lanes.
template <typename E>
SoftmaxPlan PlanSoftmax(Algorithm algorithm, const Layout& layout, int lanes);

// y = softmax(x) along n. y may be x, but not overlap it otherwise. Two passes give the same bits with and
// without reload, and so does auto.
template <typename E>
void Softmax(const Kernels& kernels, Executor& executor, Algorithm algorithm, const E* x, E* y,
             const Layout& layout);

// The same with operands applied first. Positions that are masked give 0.
template <typename E>
void SoftmaxOfLogits(const Kernels& kernels, Executor& executor, Algorithm algorithm, Logits<E> logits, E* y);

// What these call for rows too long for KernelTable::small_matrices, and for columns.
template <typename E>
void SoftmaxRows(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits,
                 E* y);
template <typename E>
void SoftmaxColumns(const KernelTable<E>& kernels, Executor& executor, const SoftmaxPlan& plan, const E* x,
                    E* y, const Layout& layout);

}  // namespace jax_softmax2p
