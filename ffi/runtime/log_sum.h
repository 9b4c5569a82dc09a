// The log of the sum of e^z of rows, and what follows from it, on whole arrays, shared out among threads.
#pragma once

#include <cstdint>

#include "ffi/kernels/table.h"
#include "ffi/runtime/logits.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// log(sum of e^z) of every row as high + low, high its rounding. Neither is written where it is null.
template <typename E>
void LogSum(const Kernels& kernels, Executor& executor, Logits<E> logits, ComputeOf<E>* high,
            ComputeOf<E>* low);

// y = z - log(sum of e^z). Positions that are masked give -inf. y may be x.
template <typename E>
void LogSoftmax(const Kernels& kernels, Executor& executor, Logits<E> logits, E* y);

// Transposes the derivative of LogSum in z, or, where `labels` are given, that of LogSum less the label's z:
// y = factor·(e^(z - high - low) - [the label's place]), with factor, high, low and label one a row. A label
// below 0 counts from the end; one out of range is nowhere. Positions that are masked give 0. y may be x.
template <typename E>
void LogSumVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const ComputeOf<E>* high,
               const ComputeOf<E>* low, const ComputeOf<E>* factor, const std::int32_t* labels, E* y);

}  // namespace jax_softmax2p
