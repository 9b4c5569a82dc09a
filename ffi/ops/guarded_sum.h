// Pass 1 of a row, and the guard: a third pass for rows whose largest element is too large for two.
//
// Within |max·log2 e| < max_exponent (KernelTable; 2^17 with fused multiply-adds) the kernels' reduction of x
// to n·ln 2 + t is exact. Beyond it, and where the sum is no number, the exponent of the sum says so, and the
// guard sums e^(z - maximum) instead. At that size, by Sterbenz's lemma, z - maximum is exact wherever
// e^(z - maximum) does not vanish. An infinite maximum is not subtracted: the sum is NaN then.
//
// The other parts of the guard:
//
// * kernels/exp.h: ExtExpKernel clamps x from below, so that -inf and the usual masks give 0, where the
//   published algorithm would compute -inf + inf.
// * kernels/lane_sum.h: LaneAccumulator::Reference clamps the exponent of a sum from below alike.
// * kernels/small_softmax.h: GuardedColumn is the third pass of small matrices and columns.
// * kernels/rows.h: GuardedRow is that of rows of one block.
// * ops/guarded_panel_sum.h is the third pass of panels.
// * kernels/small_logsumexp.h: a log that is NaN tells the caller that a row needs the third pass.
// * ops/logsumexp_derivatives.cc: ScaleFromLse has the lse subtracted beyond the exact range.
// * kernels/unguarded_build.h compiles both clamps out, to measure what they cost.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ffi/kernels/table.h"
#include "ffi/ops/logits_row.h"
#include "ffi/ops/parallel_rows.h"

namespace jax_softmax2p {

// What pass 1 finds: the sum of e^z, or of e^(z - maximum) where `subtract`, with z the logits of a row. The
// sum is a member, so that pass 1 writes it where it stays: a copy would have to wait for its parts to be
// stored.
template <typename Sum>
struct Guarded {
  Sum of;
  bool subtract = false;
};
template <typename T>
using GuardedRowSum = Guarded<RowSum<T>>;

// The largest element of a row, NaNs passed over.
template <typename E>
ComputeOf<E> MaximumOfRow(const LogitsRow<E>& row, const Segments& segments) {
  using T = ComputeOf<E>;
  return segments.Reduce<T>([&](std::int64_t at, std::int64_t size) { return row.Maximum(at, size); },
                            [](T& a, T b) { a = std::max(a, b); });
}

// Pass 1 of a sum without the guard: merges what sum_of(first, number of elements) finds for every segment.
template <typename Sum, typename SumOf>
Sum SumOfSegments(const Segments& segments, const SumOf& sum_of) {
  return segments.Reduce<Sum>(sum_of, [](Sum& a, const Sum& b) { a.Combine(b); });
}

template <typename E>
RowSum<ComputeOf<E>> SumOfRow(const LogitsRow<E>& row, const Segments& segments,
                              const KeptRow<ComputeOf<E>>& kept, const KnownMaximum<ComputeOf<E>>& known) {
  return SumOfSegments<RowSum<ComputeOf<E>>>(
      segments, [&](std::int64_t at, std::int64_t size) { return row.Sum(at, size, kept + at, known); });
}

// Pass 1 with the guard, where sum_with(known maximum) is pass 1 without it.
template <typename Sum, typename T, typename SumWith>
Guarded<Sum> WithGuard(int max_exponent, const KnownMaximum<T>& known, const SumWith& sum_with) {
  Guarded<Sum> result{sum_with(known)};
  if (std::abs(result.of.Exponent()) < max_exponent) return result;
  result.subtract = true;
  const T maximum = result.of.maximum;
  if (std::isinf(maximum)) {
    result.of.SetNan();
  } else {
    result.of = sum_with({KnownMaximum<T>::kSubtract, maximum});
    result.of.maximum = maximum;
  }
  return result;
}

// With `maximum_first` the maximum is found before, as three passes have it. What is kept is not to be used
// where the result says `subtract`.
template <typename E>
GuardedRowSum<ComputeOf<E>> GuardedSum(const LogitsRow<E>& row, const Segments& segments, int max_exponent,
                                       const KeptRow<ComputeOf<E>>& kept, bool maximum_first) {
  using T = ComputeOf<E>;
  KnownMaximum<T> known;
  if (maximum_first) known = {KnownMaximum<T>::kReference, MaximumOfRow(row, segments)};
  return WithGuard<RowSum<T>>(max_exponent, known, [&](const KnownMaximum<T>& maximum) {
    return SumOfRow(row, segments, kept, maximum);
  });
}

template <typename E>
SplitSum<ComputeOf<E>> GuardedSplitSum(const LogitsRow<E>& row, const Segments& segments, int max_exponent) {
  using Sum = SplitSum<ComputeOf<E>>;
  using Maximum = KnownMaximum<ComputeOf<E>>;
  return WithGuard<Sum>(max_exponent, Maximum{},
                        [&](const Maximum& maximum) {
                          return SumOfSegments<Sum>(segments, [&](std::int64_t at, std::int64_t size) {
                            return row.SumInParts(at, size, maximum);
                          });
                        })
      .of;
}

}  // namespace jax_softmax2p
