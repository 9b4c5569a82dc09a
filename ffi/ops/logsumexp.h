// logsumexp of rows of logits z, log_softmax, and their derivatives, on whole arrays, shared out among
// threads.
//
// An lse comes as hi + lo, hi its rounding: e^(z - hi - lo) is then as exact as a softmax.
#pragma once

#include <cstdint>

#include "ffi/kernels/table.h"
#include "ffi/ops/logits.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// One lse for each row, rows counted over [outer, inner].
template <typename T>
struct Lse {
  T* hi;
  T* lo;
};

// The lse of every row. A row without elements, or masked throughout, gives -inf.
template <typename E>
void LogSumExp(const Kernels& kernels, Executor& executor, Logits<E> logits, Lse<ComputeOf<E>> lse);

// y = z - lse, and the lse of every row. Masked positions give -inf. y may be x.
template <typename E>
void LogSoftmax(const Kernels& kernels, Executor& executor, Logits<E> logits, E* y, Lse<ComputeOf<E>> lse);

// What LogSumExp and LogSoftmax call for logits of inner above 1: y is null, or becomes z - lse.
template <typename E>
void LogSumExpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits, E* y,
                      Lse<ComputeOf<E>> lse);

// What the derivatives below are those of: lse - z[label], or lse alone where `labels` is null. A label below
// 0 counts from the end of its row; out-of-range labels match no class.
template <typename E>
struct LabelledLse {
  const ComputeOf<E>* hi;
  const ComputeOf<E>* lo;
  const std::int32_t* labels;
};

// out = <p, t> - t[label], one number a row, for p = e^(z - lse). t is like x, and must be 0 where logits are
// masked.
template <typename E>
void LogSumExpJvp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& lse,
                  const E* t, ComputeOf<E>* out);

// Its transpose: y = factor·(p - [the label's place]), with one factor a row. Masked positions give 0, but
// for the label's. y may be x.
template <typename E>
void LogSumExpVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& lse,
                  const ComputeOf<E>* factor, E* y);

// The transposed derivative of LogSoftmax: out = t - p·<1, t>. There are no labels. t is like x, and must be
// 0 where logits are masked; so is the result, if the sum of t is finite. out may be t.
template <typename E>
void LogSoftmaxVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& lse,
                   const E* t, E* out);

// What these derivatives call for logits of inner above 1.
template <typename E>
void LogSumExpJvpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                         const LabelledLse<E>& lse, const E* t, ComputeOf<E>* out);
template <typename E>
void LogSumExpVjpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                         const LabelledLse<E>& lse, const ComputeOf<E>* factor, E* y);
template <typename E>
void LogSoftmaxVjpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                          const LabelledLse<E>& lse, const E* t, E* out);

}  // namespace jax_softmax2p
