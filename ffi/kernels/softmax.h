// Softmax over contiguous rows: the two passes of the paper, and the maximum for the rows beyond them.
//
// Source: Dukhan & Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, Algorithm 3.
//
// Pass 1 (Sum) takes a row block by block. The elements of a block share the exponent of the block's
// largest, which is found while the block is brought into the first-level cache; the block's sum and that
// exponent are the pair that blocks and threads combine. Scaling by powers of two is exact, so a row's
// sum does not depend on which exponent its blocks used. Pass 2 (Write) recomputes e^x and scales, or, in
// two_pass_reload, takes from memory the s of e^x = (1 + s)·2^n that pass 1 kept there: the same bits.
#pragma once

#include <cstdint>

#include "ffi/kernels/exp.h"
#include "ffi/kernels/extended_sum.h"
#include "ffi/kernels/table.h"
#include "ffi/simd/inline.h"

namespace jax_softmax2p {

template <typename V>
class SoftmaxRow {
  using T = typename V::Scalar;
  static constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
  // Vectors that a loop takes at a time: see Exponentials in exp.h.
  static constexpr int kWays = 4;
  static constexpr int kStep = kWays * V::kLanes;

 public:
  static T Maximum(const T* x, std::int64_t n) {
    V ways[kWays];
    for (V& way : ways) way = V::Broadcast(-kInfinity);
    std::int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      SOFTMAX2P_UNROLL for (int k = 0; k < kWays; ++k) {
        ways[k] = Max(V::Load(x + i + k * V::kLanes), ways[k]);
      }
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

  static ExtendedSum Sum(const T* x, T* kept, std::int64_t n) {
    ExtendedSum row;
    for (std::int64_t i = 0; i < n; i += kBlock) {
      const int size = BlockSize(n - i);
      const Recompute<Plain> source(BlockExponent(Maximum(x + i, size)), x + i, Plain{});
      row.Combine(kept == nullptr ? SumBlock(source, size, Forget{})
                                  : SumBlock(source, size, Keep{kept + i}));
    }
    return row;
  }

  static ExtendedSum SumLessMaximum(const T* x, std::int64_t n, T maximum) {
    ExtendedSum row;
    for (std::int64_t i = 0; i < n; i += kBlock) {
      const Recompute<LessMaximum> source(0, x + i, LessMaximum{V::Broadcast(maximum)});
      row.Combine(SumBlock(source, BlockSize(n - i), Forget{}));
    }
    return row;
  }

  static void Write(const T* x, const T* kept, T* y, std::int64_t n, const SoftmaxScale<T>& scale,
                    bool stream) {
    if (scale.less_maximum) {
      const LessMaximum read{V::Broadcast(scale.maximum)};
      WriteFrom(Recompute<LessMaximum>(scale.exponent, x, read), y, n, scale, stream);
    } else if (kept != nullptr) {
      WriteFrom(Reload(scale.exponent, x, kept), y, n, scale, stream);
    } else {
      WriteFrom(Recompute<Plain>(scale.exponent, x, Plain{}), y, n, scale, stream);
    }
  }

 private:
  // How elements are read: as they are, or less the row's maximum.
  struct Plain {
    SOFTMAX2P_INLINE V operator()(V x) const { return x; }
  };
  struct LessMaximum {
    V maximum;
    SOFTMAX2P_INLINE V operator()(V x) const { return x - maximum; }
  };

  // Where e^x comes from. At<K>(i) is that of K whole vectors from element i, Partial(i, count) that of
  // the last `count` elements.
  template <typename Read>
  class Recompute {
   public:
    SOFTMAX2P_INLINE Recompute(int exponent, const T* x, const Read& read)
        : exponential_(exponent), x_(x), read_(read), exponent_(exponent) {}
    SOFTMAX2P_INLINE int exponent() const { return exponent_; }
    template <int K>
    SOFTMAX2P_INLINE Exponentials<V, K> At(std::int64_t i) const {
      V v[K];
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) v[k] = read_(V::Load(x_ + i + k * V::kLanes));
      return exponential_(v);
    }
    SOFTMAX2P_INLINE Exponentials<V, 1> Partial(std::int64_t i, int count) const {
      const V v[1] = {read_(V::LoadPartial(x_ + i, count, -kInfinity))};
      return exponential_(v);
    }

   private:
    ExponentialFrom<V> exponential_;
    const T* x_;
    Read read_;
    int exponent_;
  };

  // The s that pass 1 kept; the power costs three operations to have again.
  class Reload {
   public:
    SOFTMAX2P_INLINE Reload(int exponent, const T* x, const T* kept)
        : exponential_(exponent), x_(x), kept_(kept) {}
    template <int K>
    SOFTMAX2P_INLINE Exponentials<V, K> At(std::int64_t i) const {
      Exponentials<V, K> e;
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
        e.power[k] = exponential_.Power(V::Load(x_ + i + k * V::kLanes));
        e.s[k] = V::Load(kept_ + i + k * V::kLanes);
      }
      return e;
    }
    SOFTMAX2P_INLINE Exponentials<V, 1> Partial(std::int64_t i, int count) const {
      return {{exponential_.Power(V::LoadPartial(x_ + i, count, -kInfinity))},
              {V::LoadPartial(kept_ + i, count, 0)}};
    }

   private:
    ExponentialFrom<V> exponential_;
    const T* x_;
    const T* kept_;
  };

  // What pass 1 does with s, beside summing.
  struct Forget {
    template <int K>
    SOFTMAX2P_INLINE void operator()(const Exponentials<V, K>&, int) const {}
    SOFTMAX2P_INLINE void Partial(const Exponentials<V, 1>&, int, int) const {}
  };
  struct Keep {
    T* kept;
    template <int K>
    SOFTMAX2P_INLINE void operator()(const Exponentials<V, K>& e, int i) const {
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) e.s[k].Store(kept + i + k * V::kLanes);
    }
    SOFTMAX2P_INLINE void Partial(const Exponentials<V, 1>& e, int i, int count) const {
      e.s[0].StorePartial(kept + i, count);
    }
  };

  static SOFTMAX2P_INLINE int BlockSize(std::int64_t rest) {
    return rest < kBlock ? static_cast<int>(rest) : kBlock;
  }

  // The largest even integer not above maximum·log2 e, or the end of the exact range that it lies beyond.
  // A block too low for the range keeps the lowest exponent, and Sum's caller sees that it was never
  // exceeded. Not above, so that a row's sum is 1 at least, and a result whose power underflows does, too.
  // Even, because the reference's parity decides how ExponentialFrom rounds a tie: s from one pass and the
  // power from another must agree on n.
  static SOFTMAX2P_INLINE int BlockExponent(T maximum) {
    constexpr int kMax = ReductionFor<V>::kMaxExponent;
    const T half = maximum * (Format<T>::kLog2E / 2);
    if (kGuarded && !(half > -kMax / 2)) return -kMax;
    if (kGuarded && half > kMax / 2) return kMax + 2;
    const int truncated = static_cast<int>(half);
    return 2 * (static_cast<T>(truncated) > half ? truncated - 1 : truncated);
  }

  // Sums (1 + s)·2^(n - reference), with the error of every addition carried along in `rest`. The sum
  // starts at 8, above any term, so that its growth is what was added, exactly (Dekker's fast two-sum);
  // what is missing of the term then is power - added + s·power.
  struct Accumulator {
    static constexpr T kStart = 8;

    V sum = V::Broadcast(kStart);
    V rest = V::Broadcast(0);

    template <int K>
    SOFTMAX2P_INLINE void Add(const Exponentials<V, K>& e) {
      V missing[K];
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
        const V larger = Fma(V::Broadcast(1) + e.s[k], e.power[k], sum);
        missing[k] = e.power[k] - (larger - sum);
        sum = larger;
      }
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) rest = rest + Fma(e.s[k], e.power[k], missing[k]);
    }
    SOFTMAX2P_INLINE void AddTo(DoubleSum& total) const {
      T sums[V::kLanes], rests[V::kLanes];
      (sum - V::Broadcast(kStart)).Store(sums);
      rest.Store(rests);
      total.AddLanes<V::kLanes>(sums);
      total.AddLanes<V::kLanes>(rests);
    }
  };

  template <typename Read, typename Fate>
  static SOFTMAX2P_INLINE ExtendedSum SumBlock(const Recompute<Read>& source, int n, const Fate& fate) {
    Accumulator total;
    int i = 0;
    for (; i + kStep <= n; i += kStep) {
      const auto e = source.template At<kWays>(i);
      fate(e, i);
      total.Add(e);
    }
    for (; i + V::kLanes <= n; i += V::kLanes) {
      const auto e = source.template At<1>(i);
      fate(e, i);
      total.Add(e);
    }
    if (i < n) {
      const auto e = source.Partial(i, n - i);
      fate.Partial(e, i, n - i);
      total.Add(e);
    }
    ExtendedSum block;
    block.exponent = source.exponent();
    total.AddTo(block.mantissa);
    return block;
  }

  // (high + low)·e^x, where low·s is too small to matter and the 1 was never added to s: one rounding to
  // the result. The power comes last, lest a scale that underflows spoil a result that does not.
  struct Scaler {
    V high, low;

    template <int K>
    SOFTMAX2P_INLINE void operator()(const Exponentials<V, K>& e, V (&y)[K]) const {
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = Fma(high, e.s[k], low);
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = (high + y[k]) * e.power[k];
    }
  };

  template <typename Source>
  static SOFTMAX2P_INLINE void WriteFrom(const Source& source, T* y, std::int64_t n,
                                         const SoftmaxScale<T>& scale, bool stream) {
    const Scaler scaler{V::Broadcast(scale.high), V::Broadcast(scale.low)};
    const auto partial = [&](std::int64_t i, int count) {
      V v[1];
      scaler(source.Partial(i, count), v);
      v[0].StorePartial(y + i, count);
    };
    std::int64_t i = 0;
    if (stream) {
      const int head = Misaligned(y);
      if (head != 0 && head + kStep <= n) {
        partial(0, head);
        i = head;
      }
      if (head + kStep <= n) {
        for (; i + kStep <= n; i += kStep) {
          V v[kWays];
          scaler(source.template At<kWays>(i), v);
          SOFTMAX2P_UNROLL for (int k = 0; k < kWays; ++k) v[k].Stream(y + i + k * V::kLanes);
        }
      }
    } else {
      for (; i + kStep <= n; i += kStep) {
        V v[kWays];
        scaler(source.template At<kWays>(i), v);
        SOFTMAX2P_UNROLL for (int k = 0; k < kWays; ++k) v[k].Store(y + i + k * V::kLanes);
      }
    }
    for (; i + V::kLanes <= n; i += V::kLanes) {
      V v[1];
      scaler(source.template At<1>(i), v);
      v[0].Store(y + i);
    }
    if (i < n) partial(i, static_cast<int>(n - i));
  }

  // How many elements lie before the first that is aligned to a vector.
  static SOFTMAX2P_INLINE int Misaligned(const T* y) {
    constexpr std::uintptr_t kBytes = V::kLanes * sizeof(T);
    return static_cast<int>((kBytes - reinterpret_cast<std::uintptr_t>(y) % kBytes) % kBytes / sizeof(T));
  }
};

}  // namespace jax_softmax2p
