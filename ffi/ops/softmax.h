// Softmax of whole arrays, shared out among threads.
#pragma once

#include "ffi/base/layout.h"
#include "ffi/kernels/table.h"
#include "ffi/ops/algorithm.h"
#include "ffi/ops/logits.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// How an array is computed. `reload` is a wish. Pass 2 recomputes the exponentials all the same where the
// operands of a row are applied block by block (LogitsRow::IsReloadable), where there is no memory for
// scratch, where the guard subtracts the maximum, and in columns whose y has no room for the mantissas:
// 16-bit elements, and y in place of x. The kernels for small rows, matrices and columns ignore it.
struct SoftmaxPlan {
  bool maximum_first;  // three passes
  bool reload;         // pass 1 keeps the exponentials, and pass 2 loads them
  bool non_temporal;   // y is written past the caches
};

// The plan for logits of that layout. `lanes` is KernelTable::lanes.
template <typename E>
SoftmaxPlan PlanSoftmax(Algorithm algorithm, const Layout& layout, int lanes);

// y = softmax(logits) along n. Masked positions give 0. y may be x, but not overlap it otherwise. Two passes
// give the same bits with and without reload, and so does auto. Errors: see KernelTable.
template <typename E>
void Softmax(const Kernels& kernels, Executor& executor, Algorithm algorithm, Logits<E> logits, E* y);

// What Softmax calls for logits of inner 1 and rows too long for KernelTable::small_matrices.
template <typename E>
void SoftmaxRows(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits,
                 E* y);

// What Softmax calls for logits of inner above 1, unless they are without operands and small_matrices takes
// them.
template <typename E>
void SoftmaxColumns(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan,
                    const Logits<E>& logits, E* y);

}  // namespace jax_softmax2p
