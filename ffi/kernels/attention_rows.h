// What the attention kernels know of a row, a query of one head, while they sum over keys, and how its output
// and lse follow from that.
//
// A sum of exponentials is held relative to 2^reference, an integer, and its logits minus a shift that is 0
// but for rows beyond the exact range of the exponential.
#pragma once

#include <cmath>
#include <cstdint>

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/compensated_lanes.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/log.h"

namespace jax_softmax2p {

template <typename V, typename E>
class AttentionRows {
  using T = typename V::Scalar;

 public:
  // How far, in powers of two, a logit may exceed its row's reference: far enough that rescaling is rare, and
  // so little that values near the largest of their type do not overflow in the product.
  static constexpr int kHeadroom = 8;

  // For `width` rows whose maximum exceeds their limit, another reference, shift and limit, and the factor by
  // which what was summed so far is to be multiplied: 1 for the others. Returns whether any is not 1.
  static bool UpdateReferences(int width, const T* maximum, T* reference, T* shift, T* limit, T* factor) {
    using F = Format<T>;
    constexpr T kLargest = ReductionFor<V>::kMaxExponent - 256;
    bool rescales = false;
    for (int i = 0; i < width; ++i) {
      factor[i] = 1;
      if (!(maximum[i] > limit[i])) continue;
      const bool first = limit[i] == kMinusInfinity<V>;
      const T old_reference = reference[i], old_shift = shift[i], exponent = maximum[i] * F::kLog2E;
      const bool exact = exponent <= kLargest && exponent >= -kLargest;
      shift[i] = exact ? 0 : maximum[i];
      reference[i] = exact ? static_cast<T>(2 * std::floor(static_cast<double>(exponent) / 2)) : T{0};
      limit[i] = shift[i] + (reference[i] + kHeadroom) * static_cast<T>(F::kLn2);
      if (first) continue;
      rescales = true;
      factor[i] = RescalingFactor(old_reference, old_shift, reference[i], shift[i]);
    }
    return rescales;
  }

  // What a sum relative to one reference and shift is multiplied by, to be one relative to others.
  static T RescalingFactor(T reference, T shift, T to_reference, T to_shift) {
    const T power = reference - to_reference;
    if (shift == to_shift) return static_cast<T>(std::ldexp(1.0, static_cast<int>(power)));
    const double difference = static_cast<double>(shift) - to_shift;
    return static_cast<T>(std::exp(difference + power * Format<T>::kLn2));
  }

  // The lse of `count` rows. No sum is below 1 but for roundings, since it has a term that reaches the
  // reference; one of 0 belongs to a row whose logits are all -inf.
  static SOFTMAX2P_INLINE void LseOf(std::int64_t count, const T* reference, const T* shift, const T* sum,
                                     DoubleDouble<T>* lse) {
    for (std::int64_t i = 0; i < count; ++i) {
      const double total = sum[i], above = total > 1 ? total - 1 : 0;
      double lo;
      const double log = LogOfSum<T>(above, 1, lo);
      const double scale = reference[i] * Format<T>::kLn2;
      const double error = reference[i] * kLn2Rest - SubtractProduct(scale, reference[i], Format<T>::kLn2);
      // One of shift and reference is 0.
      lse[i] = AddLog(shift[i] + scale, error + lo, log);
      // NaN where the sum is no number, but for a shift of +inf.
      const T hi = shift[i] == -kMinusInfinity<V> ? shift[i] : lse[i].hi + (sum[i] - sum[i]);
      lse[i].hi = sum[i] == 0 ? kMinusInfinity<V> : hi;
      lse[i].lo = lse[i].hi - lse[i].hi == 0 ? lse[i].lo : 0;
    }
  }

  // Writes the output and the lse of a row, from its sum, the largest bias of a key that it attends to (-inf
  // where there is none), its lse and its output without the sink. `mean` returns the mean of all values,
  // which a query that attends to nothing has as its output, as in jax.nn; the output of padding is 0.
  template <typename Mean>
  static void Write(const AttentionArgs<E>& args, std::int64_t row, T sum, T best, DoubleDouble<T> lse,
                    T* output, const Mean& mean) {
    const std::int64_t t = row / args.heads, g = row % args.heads;
    const bool padding = t >= args.query_length;
    const bool fully_masked = args.masked && !(best > static_cast<T>(kMaskedLogit)) && sum == sum;
    if (padding || fully_masked) lse = {static_cast<T>(kMaskedLogit), 0};
    if (padding) {
      for (std::int64_t h = 0; h < args.value_size; ++h) output[h] = 0;
    } else if (fully_masked) {
      const T* const means = mean();
      for (std::int64_t h = 0; h < args.value_size; ++h) output[h] = means[h];
    }
    if (args.sinks != nullptr) lse = AddSink(args, args.sinks[g], lse, output);
    StoreElements<V>(output, args.value_size, args.output + t * args.output_stride + g * args.value_size);
    T* const to = args.lse + t * args.lse_stride + g * args.lse_parts;
    to[0] = lse.hi;
    if (args.lse_parts == 2) to[1] = lse.lo;
  }

  // The mean of all values, those of padding included.
  static void MeanOfValues(const AttentionArgs<E>& args, T* mean) {
    ForVectors<V>(static_cast<int>(args.value_size), [&](int, int h, const auto& access) {
      CompensatedLanes<V> sum;
      for (std::int64_t s = 0; s < args.keys; ++s) {
        sum.Add(access.Load(args.value + s * args.value_stride + h, 0), V::Broadcast(0));
      }
      const V total = sum.sum + FiniteOr0(sum.rest);
      access.Store(total / V::Broadcast(static_cast<T>(args.keys)), mean + h);
    });
  }

  // The same of a row with dropout, where dropped values count as 0. Rows share nothing then, and there may
  // be many, so that sums are plain, in parts of some keys.
  static void MeanOfKeptValues(const AttentionArgs<E>& args, std::int64_t row, T* mean) {
    constexpr std::int64_t kPart = 64, kWidth = 16 * V::kLanes;
    const std::int64_t t = row / args.heads, g = row % args.heads;
    for (std::int64_t first = 0; first < args.value_size; first += kWidth) {
      const std::int64_t left = args.value_size - first;
      const int width = static_cast<int>(left < kWidth ? left : kWidth);
      const auto add = [&](const auto* from, T* to) {
        ForVectors<V>(width, [&](int, int h, const auto& access) {
          access.Store(access.Load(to + h, 0) + access.Load(from + h, 0), to + h);
        });
      };
      T sum[kWidth] = {};
      for (std::int64_t begin = 0; begin < args.keys; begin += kPart) {
        const std::int64_t end = begin + kPart < args.keys ? begin + kPart : args.keys;
        T part[kWidth] = {};
        for (std::int64_t s = begin; s < end; ++s) {
          if (args.dropout_mask.At(t, g, s) != 0) add(args.value + s * args.value_stride + first, part);
        }
        add(part, sum);
      }
      for (int h = 0; h < width; ++h) mean[first + h] = sum[h] / static_cast<T>(args.keys);
    }
  }

 private:
  static constexpr double kLn2Rest = 0x1.abc9e3b39803fp-56;  // ln 2 - Format<T>::kLn2

  // Takes the sink's share from the output, and returns the lse with it.
  static DoubleDouble<T> AddSink(const AttentionArgs<E>& args, double sink, DoubleDouble<T> lse, T* output) {
    const double above = (sink - lse.hi) - lse.lo;
    const T share = static_cast<T>(1 / (1 + std::exp(above)));
    for (std::int64_t h = 0; h < args.value_size; ++h) output[h] *= share;
    const double log = std::log1p(std::exp(-std::fabs(above)));
    return above > 0 ? AddLog(sink, 0, log) : AddLog(lse.hi, lse.lo, log);
  }

  // hi + lo + log, lo 0 where that is not finite.
  static SOFTMAX2P_INLINE DoubleDouble<T> AddLog(double hi, double lo, double log) {
    double error;
    const double sum = TwoSum<double>(hi, log, error), rest = sum - sum == 0 ? error + lo : 0;
    const T rounded = static_cast<T>(sum + rest);
    const T left = static_cast<T>((sum - static_cast<double>(rounded)) + rest);
    return {rounded, left - left == 0 ? left : 0};
  }
};

}  // namespace jax_softmax2p
