// Softmax over contiguous rows: the two passes of the paper, and the maximum for the rows beyond them.
//
// Source: Dukhan & Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, Algorithm 3.
//
// Pass 1 (Sum) takes a row block by block. The elements of a block share the exponent of the block's
// largest, which is found while the block is brought into the first-level cache; the block's sum and that
// exponent are the pair that blocks and threads combine. Scaling by powers of two is exact, so a row's
// sum does not depend on which exponent its blocks used. Pass 2 (Write) recomputes e^x and scales.
#pragma once

#include <cstdint>

#include "ffi/kernels/exp.h"
#include "ffi/kernels/extended_sum.h"
#include "ffi/kernels/table.h"
#include "ffi/simd/inline.h"

namespace jax_softmax2p {

// Elements whose sum is held in the vector's own precision (and its error beside it), and that share an
// exponent. 4 KiB of float32: long against the cost of closing a block, short against the L1 cache.
inline constexpr int kBlock = 1024;

template <typename V>
class SoftmaxRow {
  using T = typename V::Scalar;
  static constexpr T kInfinity = static_cast<T>(__builtin_huge_val());

 public:
  // Reads elements as they are, or less the row's maximum.
  struct Plain {
    SOFTMAX2P_INLINE V operator()(V x) const { return x; }
  };
  struct LessMaximum {
    V maximum;
    SOFTMAX2P_INLINE V operator()(V x) const { return x - maximum; }
  };

  static T Maximum(const T* x, std::int64_t n) {
    constexpr int kWays = 4;
    V ways[kWays];
    for (V& way : ways) way = V::Broadcast(-kInfinity);
    std::int64_t i = 0;
    for (; i + kWays * V::kLanes <= n; i += kWays * V::kLanes) {
      for (int k = 0; k < kWays; ++k) ways[k] = Max(V::Load(x + i + k * V::kLanes), ways[k]);
    }
    for (; i + V::kLanes <= n; i += V::kLanes) ways[0] = Max(V::Load(x + i), ways[0]);
    if (i < n) {
      ways[1] = Max(V::LoadPartial(x + i, static_cast<int>(n - i), -kInfinity), ways[1]);
    }
    T lanes[V::kLanes];
    Max(Max(ways[0], ways[1]), Max(ways[2], ways[3])).Store(lanes);
    T result = lanes[0];
    for (int k = 1; k < V::kLanes; ++k) result = lanes[k] > result ? lanes[k] : result;
    return result;
  }

  static ExtendedSum Sum(const T* x, std::int64_t n) {
    ExtendedSum row;
    for (std::int64_t i = 0; i < n; i += kBlock) {
      const int size = BlockSize(n - i);
      row.Combine(SumBlock(x + i, size, BlockExponent(Maximum(x + i, size)), Plain{}));
    }
    return row;
  }

  static ExtendedSum SumLessMaximum(const T* x, std::int64_t n, T maximum) {
    ExtendedSum row;
    for (std::int64_t i = 0; i < n; i += kBlock) {
      row.Combine(SumBlock(x + i, BlockSize(n - i), 0, LessMaximum{V::Broadcast(maximum)}));
    }
    return row;
  }

  static void Write(const T* x, T* y, std::int64_t n, const SoftmaxScale<T>& scale) {
    if (scale.less_maximum) {
      WriteWith(x, y, n, scale, LessMaximum{V::Broadcast(scale.maximum)});
    } else {
      WriteWith(x, y, n, scale, Plain{});
    }
  }

 private:
  static SOFTMAX2P_INLINE int BlockSize(std::int64_t rest) {
    return rest < kBlock ? static_cast<int>(rest) : kBlock;
  }

  // round(maximum·log2 e), or the end of the exact range that it lies beyond. A block too low for the
  // range keeps the lowest exponent, and Sum's caller sees that it was never exceeded.
  static SOFTMAX2P_INLINE int BlockExponent(T maximum) {
    constexpr int kMax = ReductionFor<V>::kMaxExponent;
    const T n = maximum * Format<T>::kLog2E;
    if (kGuarded && !(n > -kMax)) return -kMax;
    if (kGuarded && n > kMax) return kMax + 1;
    return static_cast<int>(n < 0 ? n - T(0.5) : n + T(0.5));
  }

  // Sums (1 + s)·2^(n - reference), with the error of every addition carried along: S holds the sum, L
  // what S could not. S starts at 2, not below any term, so that S' - S is what was added, exactly
  // (Dekker's fast two-sum); what is missing of the term then is power - added + s·power.
  struct Accumulator {
    V sum = V::Broadcast(2);
    V rest = V::Broadcast(0);

    SOFTMAX2P_INLINE void Add(const Exponential<V>& e) {
      const V larger = Fma(V::Broadcast(1) + e.s, e.power, sum);
      const V added = larger - sum;
      rest = rest + Fma(e.s, e.power, e.power - added);
      sum = larger;
    }
    SOFTMAX2P_INLINE void AddTo(DoubleSum& total) const {
      T sums[V::kLanes], rests[V::kLanes];
      (sum - V::Broadcast(2)).Store(sums);
      rest.Store(rests);
      double small = 0;
      for (int k = 0; k < V::kLanes; ++k) {
        total.Add(sums[k]);
        small += rests[k];
      }
      total.Add(small);
    }
  };

  template <typename Read>
  static SOFTMAX2P_INLINE ExtendedSum SumBlock(const T* x, int n, int exponent, const Read& read) {
    const ExponentialFrom<V> exponential(exponent);
    Accumulator even, odd;
    int i = 0;
    for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
      even.Add(exponential(read(V::Load(x + i))));
      odd.Add(exponential(read(V::Load(x + i + V::kLanes))));
    }
    if (i + V::kLanes <= n) {
      even.Add(exponential(read(V::Load(x + i))));
      i += V::kLanes;
    }
    if (i < n) odd.Add(exponential(read(V::LoadPartial(x + i, n - i, -kInfinity))));

    ExtendedSum block;
    block.exponent = exponent;
    even.AddTo(block.mantissa);
    odd.AddTo(block.mantissa);
    return block;
  }

  template <typename Read>
  static SOFTMAX2P_INLINE void WriteWith(const T* x, T* y, std::int64_t n, const SoftmaxScale<T>& scale,
                                         const Read& read) {
    const ExponentialFrom<V> exponential(scale.exponent);
    const V high = V::Broadcast(scale.high), low = V::Broadcast(scale.low);
    // (high + low)·(1 + s), where low·s is too small to matter and the 1 was never added to s: one
    // rounding to the result. The power comes last, lest a scale that underflows spoil a result that
    // does not.
    const auto softmax = [&](V v) {
      const Exponential<V> e = exponential(read(v));
      return (high + Fma(high, e.s, low)) * e.power;
    };
    std::int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) softmax(V::Load(x + i)).Store(y + i);
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      softmax(V::LoadPartial(x + i, rest, -kInfinity)).StorePartial(y + i, rest);
    }
  }
};

}  // namespace jax_softmax2p
