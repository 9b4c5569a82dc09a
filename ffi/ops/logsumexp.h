// The log of the sum of e^z of rows, and what follows from it, on whole arrays, shared out among threads.
//
// Lses come as hi + lo, hi their rounding: e^(z - hi - lo) is then as exact as a softmax.
#pragma once

#include <cstdint>

#include "ffi/kernels/table.h"
#include "ffi/ops/logits.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// The lse of every row.
template <typename E>
void LogSumExp(const Kernels& kernels, Executor& executor, Logits<E> logits, ComputeOf<E>* hi,
               ComputeOf<E>* lo);

// y = z - lse, and the lse of every row. Positions that are masked give -inf. y may be x.
template <typename E>
void LogSoftmax(const Kernels& kernels, Executor& executor, Logits<E> logits, E* y, ComputeOf<E>* hi,
                ComputeOf<E>* lo);

// What the derivatives below are of: lses less, where `labels` are given, each row's logit there. A label
// below 0 counts from the end; one out of range is nowhere.
template <typename E>
struct LabelledLse {
  const ComputeOf<E>* hi;
  const ComputeOf<E>* lo;
  const std::int32_t* labels;
};

// out = <p, t> - t[label] for p = e^(z - lse). t is to be 0 where logits are masked.
template <typename E>
void LogSumExpJvp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& sums,
                  const E* t, ComputeOf<E>* out);

// Its transpose: y = factor·(p - [the label's place]), with one factor a row. Positions that are masked give
// 0, but for the label's. y may be x.
template <typename E>
void LogSumExpVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& sums,
                  const ComputeOf<E>* factor, E* y);

// out = t - p·<1, t>: the transposed derivative of LogSoftmax. t is to be 0 where logits are masked, and so
// is the result. out may be t.
template <typename E>
void LogSoftmaxVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& sums,
                   const E* t, E* out);

}  // namespace jax_softmax2p
