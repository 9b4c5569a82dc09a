// Softmax over contiguous rows and over columns, in pieces: the maximum, the sum, the result.
//
// Source: Dukhan & Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438: Algorithm 3 without a
// maximum, 1 and 2 with it.
//
// Everything is a walk down a column, kLanes columns side by side. A contiguous row is such a walk, too: its
// lanes are columns kLanes apart, merged at the end. Pass 1 (Sum) takes a column block by block; the
// elements of a block share the exponent of the largest yet, which is found while the block is brought into
// the first-level cache. Scaling by powers of two is exact, so a sum does not depend on the exponent. Pass 2
// (Write) recomputes e^x and scales, or, in the reload algorithms, takes from memory the s of e^x = (1 +
// s)·2^n that pass 1 kept there: the same bits.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/lane_sum.h"
#include "ffi/kernels/log.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V.
template <typename V, typename E>
class SoftmaxKernels {
  using T = typename V::Scalar;
  static constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
  // Vectors that a loop takes at a time: see ExtExp in exp.h.
  static constexpr int kWays = 4;
  static constexpr int kFold = LaneSum<V>::kFold;
  // Vectors of a row that share an exponent: long against the cost of closing a block, some 20 ns, short
  // against the first-level cache.
  static constexpr int kRowBlock = 128;
  // The same for each of the columns of a panel, which take turns: 16 KiB of float32 in all.
  static constexpr int kPanelBlock = 4096;
  // See SmallMatrices.
  static constexpr int kMaxTiles = 4;
  static constexpr int kPanelVectors = kPanelWidth / V::kLanes;
  // How many vectors ahead the passes fetch from memory what they will read, by the time that finding a
  // block's maximum needs it. Zen 5, 2^26 float32, ns an element, AVX-512: Sum .239 without, .152 at 128,
  // .120 at 256, .135 at 512; Write, past the caches, .178 without, .165 at 32, .153 at 128. AVX2, bound by
  // its arithmetic: .274, .252, .238, .238; .206, .202, .192. Free where the data are in a cache.
  template <int kVectors>
  using Ahead = std::integral_constant<int, kVectors>;
  using SumAhead = Ahead<256>;
  using WriteAhead = Ahead<128>;

 public:
  static void Exponential(T x, int exponent, T* s, T* power) {
    const V v[1] = {V::Broadcast(x)};
    const ExtExp<V, 1> e = ExtExpKernel<V>(V::Broadcast(static_cast<T>(exponent)))(v);
    const Tail first{1};
    first.Store(e.expm1[0], s);
    first.Store(e.pow2[0], power);
  }

  static T RowMaximum(const E* x, std::int64_t n) {
    const std::int64_t vectors = n / V::kLanes;
    V maximum = Maximum(FullVector{}, x, kAdjacent, vectors);
    const Tail rest{static_cast<int>(n % V::kLanes)};
    if (rest.count != 0) maximum = Max(rest.Load(x + vectors * V::kLanes), maximum);
    return maximum.ReduceMax();
  }

  static RowSum<T> Sum(const E* x, T* kept, std::int64_t n, const KnownMaximum<T>& maximum) {
    if (maximum.use == KnownMaximum<T>::kSubtract) {
      return SumRow(x, Discard{}, n, Less{V::Broadcast(maximum.value)}, &kZero);
    }
    const T* const known = maximum.use == KnownMaximum<T>::kReference ? &maximum.value : nullptr;
    if (kept != nullptr) return SumRow(x, kept, n, Plain{}, known);
    return SumRow(x, Discard{}, n, Plain{}, known);
  }

  // x of type In, E or T.
  template <typename In>
  static void RowWrite(const In* x, const T* kept, E* y, std::int64_t n, const RowScale<T>& scale,
                       bool non_temporal) {
    const V exponent = V::Broadcast(static_cast<T>(scale.exponent));
    const Scaler scaler{V::Broadcast(scale.hi), V::Broadcast(scale.lo)};
    if (scale.subtract) {
      const LessBoth less{V::Broadcast(scale.maximum), V::Broadcast(scale.rest)};
      WriteRow(Recompute<LessBoth>(exponent, less), x, Discard{}, y, n, scaler, non_temporal);
    } else if (kept != nullptr) {
      WriteRow(Reload(exponent), x, kept, y, n, scaler, non_temporal);
    } else {
      WriteRow(Recompute<Plain>(exponent, Plain{}), x, Discard{}, y, n, scaler, non_temporal);
    }
  }

  template <typename In>
  static void RowWriteLog(const In* x, E* y, std::int64_t n, const LseTerms<T>& sum, bool non_temporal) {
    const LessLogSum less{V::Broadcast(sum.maximum), V::Broadcast(sum.log)};
    WriteRow(less, x, Discard{}, y, n, Identity{}, non_temporal);
  }

  // FullVector softmaxes of `outer` small matrices of n·inner <= kMaxSmall elements along their first axis,
  // kLanes matrices at a time, one a lane: they are transposed into a tile, and back.
  template <typename In>
  static void SmallMatrices(const In* x, E* y, std::int64_t outer, int n, int inner, bool non_temporal) {
    const int m = n * inner;
    // A column of a tile is a chain of dependent operations from its first element to its last result. As
    // many tiles as fit are worked on together, so that the CPU has several chains to choose from.
    const int together = kMaxSmall / m < kMaxTiles ? kMaxSmall / m : kMaxTiles;
    const bool aligned_non_temporal = non_temporal && ElementsToAlignment<V::kLanes>(y) == 0;
    T tiles[kMaxSmall * V::kLanes], kept[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += together * V::kLanes) {
      const std::int64_t rest = outer - first, most = together * V::kLanes;
      const int count = static_cast<int>(rest < most ? rest : most);
      for (int o = 0; o < count; o += V::kLanes) {
        LoadTile(x + (first + o) * m, TileCount(count - o), m, tiles + o * m);
      }
      SmallTiles(tiles, kept, (count + V::kLanes - 1) / V::kLanes, n, inner);
      for (int o = 0; o < count; o += V::kLanes) {
        StoreTile(tiles + o * m, TileCount(count - o), m, y + (first + o) * m, aligned_non_temporal);
      }
    }
  }

  // The logs of the sums of e^x of `outer` rows of n <= kMaxSmall elements, as maximum + log + rest, kLanes
  // rows at a time; the log is NaN where the guard wants the row to take another way.
  template <typename In>
  static void SmallLse(const In* x, std::int64_t outer, int n, T* maximum, T* log, T* rest) {
    using InTile = SoftmaxKernels<V, T>;
    T tile[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += V::kLanes) {
      const int count = TileCount(outer - first);
      LoadTile(x + first * n, count, n, tile);
      const V largest[1] = {InTile::Maximum(FullVector{}, tile, kAdjacent, n)};
      LaneSum<V> sum(largest[0]);
      InTile::Add(FullVector{}, tile, typename InTile::Discard{}, kAdjacent, Ahead<0>{}, n,
                  typename InTile::Plain{}, sum);
      const LaneTotal<V> total = sum.Total();
      const ExtExp<V, 1> of_largest = ExtExpKernel<V>(sum.reference())(largest);
      T maxima[V::kLanes], sums[V::kLanes], rests[V::kLanes], exponents[V::kLanes];
      T powers[V::kLanes], s[V::kLanes];
      double logs[V::kLanes], log_rests[V::kLanes];
      largest[0].Store(maxima);
      total.hi.Store(sums);
      total.lo.Store(rests);
      total.exponent.Store(exponents);
      of_largest.pow2[0].Store(powers);
      of_largest.expm1[0].Store(s);
      for (int l = 0; l < V::kLanes; ++l) {
        const DoubleDouble<double> one = LogOfSumOverLargest(sums[l], rests[l], powers[l], s[l]);
        logs[l] = one.hi;
        log_rests[l] = one.lo;
      }
      for (int l = 0; l < count; ++l) {
        const T size = exponents[l] < 0 ? -exponents[l] : exponents[l];
        const bool exact = size < ReductionFor<V>::kMaxExponent - 1;
        maximum[first + l] = maxima[l];
        log[first + l] = exact ? static_cast<T>(logs[l]) + (sums[l] - sums[l]) : kInfinity - kInfinity;
        rest[first + l] = static_cast<T>((logs[l] - static_cast<double>(log[first + l])) + log_rests[l]);
      }
    }
  }

  // y = factor·e^((x - hi) - lo), or, where factor is null, y = (x - hi) - lo, of such rows, with one
  // of each a row.
  template <typename In>
  static void SmallLess(const In* x, E* y, std::int64_t outer, int n, const T* hi, const T* lo,
                        const T* factor) {
    T tile[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += V::kLanes) {
      const int count = TileCount(outer - first);
      const Tail some{count};
      const auto load = [&](const T* p) { return count == V::kLanes ? V::Load(p) : some.Load(p, 0); };
      LoadTile(x + first * n, count, n, tile);
      const LessBoth less{load(hi + first), load(lo + first)};
      if (factor == nullptr) {
        for (int i = 0; i < n; ++i) less(V::Load(tile + i * V::kLanes)).Store(tile + i * V::kLanes);
      } else {
        using InTile = SoftmaxKernels<V, T>;
        InTile::Write(FullVector{}, FullVector{}, typename InTile::RecomputeLess(less.maximum, less.rest),
                      tile, typename InTile::Discard{}, tile, kAdjacent, Ahead<0>{}, n,
                      typename InTile::Scaler{load(factor + first), V::Broadcast(0)});
      }
      StoreTile(tile, count, n, y + first * n, false);
    }
  }

  // FullVector softmaxes of `width` columns of n <= kMaxSmall elements, `stride` apart: without ends to merge
  // and totals to keep, which are what takes the time there.
  static void SmallColumns(const E* x, E* y, std::int64_t stride, int n, int width) {
    const int together = kMaxSmall / n < kMaxTiles ? kMaxSmall / n : kMaxTiles;
    T tiles[kMaxSmall * V::kLanes], kept[kMaxSmall * V::kLanes];
    for (int first = 0; first < width; first += together * V::kLanes) {
      const int rest = width - first, most = together * V::kLanes;
      const int count = rest < most ? rest : most;
      ForVectors(count, [&](int v, int at, const auto& access) {
        T* const tile = tiles + v * n * V::kLanes;
        for (int i = 0; i < n; ++i) access.Load(x + i * stride + first + at, 0).Store(tile + i * V::kLanes);
      });
      SmallTiles(tiles, kept, (count + V::kLanes - 1) / V::kLanes, n, 1);
      ForVectors(count, [&](int v, int at, const auto& access) {
        const T* const tile = tiles + v * n * V::kLanes;
        for (int i = 0; i < n; ++i) access.Store(V::Load(tile + i * V::kLanes), y + i * stride + first + at);
      });
    }
  }

  static void PanelMaximum(const E* x, const Panel& panel, T* maximum) {
    ForVectors(panel.width, [&](int, int at, const auto& access) {
      access.Store(Maximum(access, x + at, panel.stride, panel.rows), maximum + at);
    });
    ForVectors(panel.tail, [&](int, int at, const auto& access) {
      const V above = access.Load(maximum + at);
      access.Store(Max(access.Load(x + panel.rows * panel.stride + at), above), maximum + at);
    });
  }

  static void PanelSum(const E* x, T* kept, const Panel& panel, const T* maximum, const T* subtract,
                       const PanelTotals<T>& totals) {
    if (subtract != nullptr) {
      SumPanel(x, Discard{}, panel, maximum, LessLanes{subtract}, totals);
    } else if (kept != nullptr) {
      SumPanel(x, kept, panel, maximum, PlainLanes{}, totals);
    } else {
      SumPanel(x, Discard{}, panel, maximum, PlainLanes{}, totals);
    }
  }

  static void PanelMerge(const PanelTotals<T>& into, const PanelTotals<T>& from, int width) {
    ForVectors(width, [&](int, int at, const auto& access) {
      LaneTotal<V> total = LoadTotal(access, into, at);
      total.Merge(LoadTotal(access, from, at));
      StoreTotal(access, total, into, at);
    });
  }

  static void PanelInvert(const PanelTotals<T>& totals, int width) {
    ForVectors(width, [&](int, int at, const auto& access) {
      LaneTotal<V> total = LoadTotal(access, totals, at);
      total.Invert();
      StoreTotal(access, total, totals, at);
    });
  }

  static void PanelWrite(const E* x, const T* kept, E* y, const Panel& panel, const PanelTotals<T>& scales,
                         const T* subtract) {
    if (subtract != nullptr) {
      WritePanel(LessLanes{subtract}, x, Discard{}, y, panel, scales);
    } else if (kept != nullptr) {
      WritePanel(ReloadLanes{}, x, kept, y, panel, scales);
    } else {
      WritePanel(PlainLanes{}, x, Discard{}, y, panel, scales);
    }
  }

 private:
  template <typename, typename>
  friend class SoftmaxKernels;

  static constexpr std::integral_constant<std::int64_t, V::kLanes> kAdjacent{};
  static constexpr T kZero = 0;

  // Where s is kept, if nowhere.
  struct Discard {
    friend SOFTMAX2P_INLINE Discard operator+(Discard, std::int64_t) { return {}; }
  };

  // How a vector is loaded and stored.
  struct FullVector {
    template <typename P>
    SOFTMAX2P_INLINE V Load(const P* p, T = -kInfinity) const {
      return V::Load(p);
    }
    template <typename P>
    SOFTMAX2P_INLINE void Store(V v, P* p) const {
      v.Store(p);
    }
  };
  struct Tail {
    int count;
    template <typename P>
    SOFTMAX2P_INLINE V Load(const P* p, T fill = -kInfinity) const {
      return V::LoadPartial(p, count, fill);
    }
    template <typename P>
    SOFTMAX2P_INLINE void Store(V v, P* p) const {
      v.StorePartial(p, count);
    }
  };
  struct NonTemporal : FullVector {
    template <typename P>
    SOFTMAX2P_INLINE void Store(V v, P* p) const {
      v.Stream(p);
    }
  };

  // Calls body(index, first element, access) for the vectors of which `width` elements consist.
  template <typename Body>
  static SOFTMAX2P_INLINE void ForVectors(int width, const Body& body) {
    int v = 0;
    for (; (v + 1) * V::kLanes <= width; ++v) body(v, v * V::kLanes, FullVector{});
    const Tail rest{width - v * V::kLanes};
    if (rest.count > 0) body(v, v * V::kLanes, rest);
  }

  // What an element is read as: itself, or less a maximum.
  struct Plain {
    SOFTMAX2P_INLINE V operator()(V x) const { return x; }
  };
  struct Less {
    V maximum;
    SOFTMAX2P_INLINE V operator()(V x) const { return x - maximum; }
  };

  struct LessBoth {
    V maximum, rest;
    SOFTMAX2P_INLINE V operator()(V x) const { return (x - maximum) - rest; }
  };

  // Where e^x comes from: computed anew, or the power from x, at three operations, and s from pass 1.
  template <typename Read>
  class Recompute {
   public:
    SOFTMAX2P_INLINE Recompute(V exponent, const Read& read) : exponential_(exponent), read_(read) {}
    template <int K, typename Access, typename In, typename Kept, typename Stride>
    SOFTMAX2P_INLINE ExtExp<V, K> At(const Access& access, const In* x, Kept, Stride stride) const {
      V v[K];
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) v[k] = read_(access.Load(x + k * stride));
      return exponential_(v);
    }

   private:
    ExtExpKernel<V> exponential_;
    Read read_;
  };
  // e^(x - maximum - rest), without the rounding of the differences.
  class RecomputeLess {
   public:
    SOFTMAX2P_INLINE RecomputeLess(V maximum, V rest)
        : exponential_(V::Broadcast(0)), maximum_(maximum), rest_(rest) {}
    template <int K, typename Access, typename In, typename Kept, typename Stride>
    SOFTMAX2P_INLINE ExtExp<V, K> At(const Access& access, const In* x, Kept, Stride stride) const {
      const V lowest = V::Broadcast(std::numeric_limits<T>::lowest());
      const V zero = V::Broadcast(0), minus_one = V::Broadcast(-1);
      V v[K], missing[K];
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
        const V a = access.Load(x + k * stride);
        const DoubleDouble<V> difference = TwoDiff(a, maximum_);
        // Max replaces the NaN that comes of infinities. What is missing is below an ULP where the power is
        // not 0; elsewhere it must be such that 0 times it is 0.
        const DoubleDouble<V> both = FastTwoSum(difference.hi, Max(difference.lo - rest_, lowest));
        v[k] = both.hi;
        missing[k] = zero - Max(zero - Max(both.lo, minus_one), minus_one);
      }
      ExtExp<V, K> e = exponential_(v);
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) e.expm1[k] =
          e.expm1[k] + Fma(e.expm1[k], missing[k], missing[k]);
      return e;
    }

   private:
    ExtExpKernel<V> exponential_;
    V maximum_, rest_;
  };
  class Reload {
   public:
    explicit SOFTMAX2P_INLINE Reload(V exponent) : exponential_(exponent) {}
    template <int K, typename Access, typename In, typename Stride>
    SOFTMAX2P_INLINE ExtExp<V, K> At(const Access& access, const In* x, const T* kept, Stride stride) const {
      ExtExp<V, K> e;
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
        e.pow2[k] = exponential_.Pow2(access.Load(x + k * stride));
        e.expm1[k] = access.Load(kept + k * stride);
      }
      return e;
    }

   private:
    ExtExpKernel<V> exponential_;
  };

  // The same for the vector at column `at` of a panel.
  struct PlainLanes {
    template <typename Access>
    SOFTMAX2P_INLINE Plain At(const Access&, int) const {
      return {};
    }
    template <typename Access>
    SOFTMAX2P_INLINE Recompute<Plain> Source(const Access&, int, V exponent) const {
      return {exponent, Plain{}};
    }
  };
  struct LessLanes {
    const T* maximum;
    template <typename Access>
    SOFTMAX2P_INLINE Less At(const Access& access, int at) const {
      // -inf less -inf would be NaN, in lanes whose columns are longer than others.
      return {access.Load(maximum + at, 0)};
    }
    template <typename Access>
    SOFTMAX2P_INLINE Recompute<Less> Source(const Access& access, int at, V exponent) const {
      return {exponent, At(access, at)};
    }
  };
  struct ReloadLanes {
    template <typename Access>
    SOFTMAX2P_INLINE Reload Source(const Access&, int, V exponent) const {
      return Reload(exponent);
    }
  };

  // Passes NaNs over.
  template <typename Access, typename Stride>
  static SOFTMAX2P_INLINE V Maximum(const Access& access, const E* x, Stride stride, std::int64_t rows) {
    V ways[kWays];
    for (V& way : ways) way = V::Broadcast(-kInfinity);
    std::int64_t i = 0;
    for (; i + kWays <= rows; i += kWays) {
      SOFTMAX2P_UNROLL for (int k = 0; k < kWays; ++k) ways[k] =
          Max(access.Load(x + (i + k) * stride), ways[k]);
    }
    for (; i < rows; ++i) ways[0] = Max(access.Load(x + i * stride), ways[0]);
    return Max(Max(ways[0], ways[1]), Max(ways[2], ways[3]));
  }

  template <int K, typename In, typename Stride, typename Far>
  static SOFTMAX2P_INLINE void Prefetch(const In* x, Stride stride, Far ahead) {
    if constexpr (!std::is_same_v<Far, Ahead<0>>) {
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) __builtin_prefetch(x + (k + ahead) * stride);
    }
  }

  template <int K, typename Access, typename Kept, typename Stride, typename Far, typename Read>
  static SOFTMAX2P_INLINE void AddSome(const Access& access, const E* x, Kept kept, Stride stride, Far ahead,
                                       const Recompute<Read>& source, LaneSum<V>& sum) {
    Prefetch<K>(x, stride, ahead);
    const auto e = source.template At<K>(access, x, kept, stride);
    if constexpr (!std::is_same_v<Kept, Discard>) {
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) access.Store(e.expm1[k], kept + k * stride);
    }
    sum.Add(e);
  }

  // Adds `rows` vectors, none above what `sum` was raised to.
  template <typename Access, typename Kept, typename Stride, typename Far, typename Read>
  static SOFTMAX2P_INLINE void Add(const Access& access, const E* x, Kept kept, Stride stride, Far ahead,
                                   std::int64_t rows, const Read& read, LaneSum<V>& sum) {
    const Recompute<Read> source(sum.reference(), read);
    std::int64_t i = 0;
    for (; i + kWays <= rows; i += kWays) {
      AddSome<kWays>(access, x + i * stride, kept + i * stride, stride, ahead, source, sum);
    }
    for (; i < rows; ++i) AddSome<1>(access, x + i * stride, kept + i * stride, stride, ahead, source, sum);
  }

  template <typename Kept, typename Read>
  static SOFTMAX2P_INLINE RowSum<T> SumRow(const E* x, Kept kept, std::int64_t n, const Read& read,
                                           const T* maximum) {
    constexpr std::int64_t kElements = std::int64_t{kFold} * V::kLanes;
    RowSum<T> row = SumFold(x, kept, n < kElements ? n : kElements, read, maximum);
    for (std::int64_t i = kElements; i < n; i += kElements) {
      const std::int64_t rest = n - i;
      row.Combine(SumFold(x + i, kept + i, rest < kElements ? rest : kElements, read, maximum));
    }
    return row;
  }

  // `maximum` is null, or that of the whole row, as read.
  template <typename Kept, typename Read>
  static SOFTMAX2P_INLINE RowSum<T> SumFold(const E* x, Kept kept, std::int64_t n, const Read& read,
                                            const T* maximum) {
    const std::int64_t vectors = n / V::kLanes, end = vectors * V::kLanes;
    const Tail rest{static_cast<int>(n - end)};
    LaneSum<V> sum;
    V highest = V::Broadcast(maximum != nullptr ? *maximum : -kInfinity);
    if (maximum != nullptr) sum.Rescale(highest);
    std::int64_t v = 0;
    do {
      const std::int64_t size = vectors - v < kRowBlock ? vectors - v : kRowBlock;
      const std::int64_t i = v * V::kLanes;
      if (maximum == nullptr) {
        V block = Maximum(FullVector{}, x + i, kAdjacent, size);
        if (v + size == vectors && rest.count != 0) block = Max(rest.Load(x + end), block);
        highest = Max(block, highest);
        sum.Rescale(read(block));
      }
      Add(FullVector{}, x + i, kept + i, kAdjacent, SumAhead{}, size, read, sum);
      v += size;
    } while (v < vectors);
    if (rest.count != 0) Add(rest, x + end, kept + end, kAdjacent, Ahead<0>{}, 1, read, sum);
    return {sum.Total().Reduce(), highest.ReduceMax()};
  }

  static SOFTMAX2P_INLINE std::int64_t BlockRows(const Panel& panel) {
    return panel.width < kPanelBlock / kWays ? kPanelBlock / panel.width : kWays;
  }

  template <typename Kept, typename ReadLanes>
  static SOFTMAX2P_INLINE void SumPanel(const E* x, Kept kept, const Panel& panel, const T* maximum,
                                        const ReadLanes& read, const PanelTotals<T>& totals) {
    LaneSum<V> sums[kPanelVectors];
    const auto add = [&](int v, int at, const auto& access, std::int64_t row, std::int64_t rows) {
      const auto read_here = read.At(access, at);
      const E* const from = x + row * panel.stride + at;
      const V highest =
          maximum != nullptr ? access.Load(maximum + at) : Maximum(access, from, panel.stride, rows);
      sums[v].Rescale(read_here(highest));
      Add(access, from, kept + row * panel.stride + at, panel.stride, BlockRows(panel), rows, read_here,
          sums[v]);
    };
    const std::int64_t block = BlockRows(panel);
    for (std::int64_t row = 0; row < panel.rows; row += block) {
      const std::int64_t rows = panel.rows - row < block ? panel.rows - row : block;
      ForVectors(panel.width, [&](int v, int at, const auto& access) { add(v, at, access, row, rows); });
    }
    ForVectors(panel.tail, [&](int v, int at, const auto& access) { add(v, at, access, panel.rows, 1); });
    ForVectors(panel.width,
               [&](int v, int at, const auto& access) { StoreTotal(access, sums[v].Total(), totals, at); });
  }

  template <typename Access>
  static SOFTMAX2P_INLINE LaneTotal<V> LoadTotal(const Access& access, const PanelTotals<T>& totals, int at) {
    return {access.Load(totals.hi + at), access.Load(totals.lo + at), access.Load(totals.exponent + at)};
  }
  template <typename Access>
  static SOFTMAX2P_INLINE void StoreTotal(const Access& access, const LaneTotal<V>& total,
                                          const PanelTotals<T>& totals, int at) {
    access.Store(total.hi, totals.hi + at);
    access.Store(total.lo, totals.lo + at);
    access.Store(total.exponent, totals.exponent + at);
  }

  // (hi + lo)·e^x, where lo·s is too small to matter and the 1 was never added to s: one rounding to
  // the result. The power comes last, lest a scale that underflows spoil a result that does not.
  struct Scaler {
    V hi, lo;

    template <int K>
    SOFTMAX2P_INLINE void operator()(const ExtExp<V, K>& e, V (&y)[K]) const {
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = Fma(hi, e.expm1[k], lo);
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = (hi + y[k]) * e.pow2[k];
    }
  };

  // No exponential: x less the log of the sum.
  struct LessLogSum {
    V maximum, log;
    template <int K>
    struct Results {
      V v[K];
    };
    template <int K, typename Access, typename In, typename Stride>
    SOFTMAX2P_INLINE Results<K> At(const Access& access, const In* x, Discard, Stride stride) const {
      Results<K> r;
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) { r.v[k] = (access.Load(x + k * stride) - maximum) - log; }
      return r;
    }
  };
  struct Identity {
    template <typename Results, int K>
    SOFTMAX2P_INLINE void operator()(const Results& r, V (&y)[K]) const {
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = r.v[k];
    }
  };

  template <int K, typename Access, typename Out, typename In, typename Kept, typename Stride, typename Far,
            typename Source, typename Scaling>
  static SOFTMAX2P_INLINE void WriteSome(const Access& access, const Out& out, const Source& source,
                                         const In* x, Kept kept, E* y, Stride stride, Far ahead,
                                         const Scaling& scaler) {
    Prefetch<K>(x, stride, ahead);
    V v[K];
    scaler(source.template At<K>(access, x, kept, stride), v);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) out.Store(v[k], y + k * stride);
  }

  template <typename Access, typename Out, typename In, typename Kept, typename Stride, typename Far,
            typename Source, typename Scaling>
  static SOFTMAX2P_INLINE void Write(const Access& access, const Out& out, const Source& source, const In* x,
                                     Kept kept, E* y, Stride stride, Far ahead, std::int64_t rows,
                                     const Scaling& scaler) {
    std::int64_t i = 0;
    for (; i + kWays <= rows; i += kWays) {
      WriteSome<kWays>(access, out, source, x + i * stride, kept + i * stride, y + i * stride, stride, ahead,
                       scaler);
    }
    for (; i < rows; ++i) {
      WriteSome<1>(access, out, source, x + i * stride, kept + i * stride, y + i * stride, stride, ahead,
                   scaler);
    }
  }

  template <typename Source, typename In, typename Kept, typename Scaling>
  static SOFTMAX2P_INLINE void WriteRow(const Source& source, const In* x, Kept kept, E* y, std::int64_t n,
                                        const Scaling& scaler, bool non_temporal) {
    const auto part = [&](std::int64_t i, int count) {
      const Tail some{count};
      WriteSome<1>(some, some, source, x + i, kept + i, y + i, kAdjacent, Ahead<0>{}, scaler);
    };
    std::int64_t i = 0;
    if (non_temporal) {
      const std::int64_t head = ElementsToAlignment<V::kLanes>(y) < n ? ElementsToAlignment<V::kLanes>(y) : n;
      if (head != 0) part(0, static_cast<int>(head));
      i = head;
    }
    const std::int64_t vectors = (n - i) / V::kLanes;
    if (non_temporal) {
      Write(FullVector{}, NonTemporal{}, source, x + i, kept + i, y + i, kAdjacent, WriteAhead{}, vectors,
            scaler);
    } else {
      Write(FullVector{}, FullVector{}, source, x + i, kept + i, y + i, kAdjacent, WriteAhead{}, vectors,
            scaler);
    }
    i += vectors * V::kLanes;
    if (i < n) part(i, static_cast<int>(n - i));
  }

  template <typename SourceLanes, typename Kept>
  static SOFTMAX2P_INLINE void WritePanel(const SourceLanes& lanes, const E* x, Kept kept, E* y,
                                          const Panel& panel, const PanelTotals<T>& scales) {
    const auto write = [&](int at, const auto& access, std::int64_t row, std::int64_t rows) {
      const std::int64_t i = row * panel.stride + at;
      const LaneTotal<V> scale = LoadTotal(access, scales, at);
      Write(access, access, lanes.Source(access, at, scale.exponent), x + i, kept + i, y + i, panel.stride,
            BlockRows(panel), rows, Scaler{scale.hi, scale.lo});
    };
    const std::int64_t block = BlockRows(panel);
    for (std::int64_t row = 0; row < panel.rows; row += block) {
      const std::int64_t rows = panel.rows - row < block ? panel.rows - row : block;
      ForVectors(panel.width, [&](int, int at, const auto& access) { write(at, access, row, rows); });
    }
    ForVectors(panel.tail, [&](int, int at, const auto& access) { write(at, access, panel.rows, 1); });
  }

  static SOFTMAX2P_INLINE int TileCount(int rest) { return rest < V::kLanes ? rest : V::kLanes; }

  // In place, in tiles one after the other.
  static SOFTMAX2P_INLINE void SmallTiles(T* tiles, T* kept, int count, int n, int inner) {
    using InTile = SoftmaxKernels<V, T>;
    const int stride = inner * V::kLanes, columns = count * inner;
    const auto at = [&](int column) { return column / inner * n * stride + column % inner * V::kLanes; };
    for (int first = 0; first < columns; first += kMaxTiles) {
      const int some = columns - first < kMaxTiles ? columns - first : kMaxTiles;
      typename InTile::SmallSum sums[kMaxTiles];
      for (int c = 0; c < some; ++c) {
        const int i = at(first + c);
        sums[c] = InTile::SumSmall(tiles + i, kept + i, n, stride);
      }
      for (int c = 0; c < some; ++c) {
        const int i = at(first + c);
        InTile::WriteSmall(sums[c], tiles + i, kept + i, n, stride);
      }
    }
  }

  struct SmallSum {
    LaneTotal<V> scale;
    bool exact;
  };

  static SOFTMAX2P_INLINE SmallSum SumSmall(const T* x, T* kept, int n, int stride) {
    LaneSum<V> sum(Maximum(FullVector{}, x, stride, n));
    Add(FullVector{}, x, kept, stride, Ahead<0>{}, n, Plain{}, sum);
    const V limit = V::Broadcast(ReductionFor<V>::kMaxExponent - 1), reference = sum.reference();
    LaneTotal<V> scale = sum.Total();
    scale.Invert();
    return {scale, !AnyGreater(reference, limit) && !AnyGreater(V::Broadcast(0) - limit, reference)};
  }

  static SOFTMAX2P_INLINE void WriteSmall(const SmallSum& sum, T* x, const T* kept, int n, int stride) {
    if (!sum.exact) return SmallColumnLessMaximum(x, n, stride);
    Write(FullVector{}, FullVector{}, Reload(sum.scale.exponent), x, kept, x, stride, Ahead<0>{}, n,
          Scaler{sum.scale.hi, sum.scale.lo});
  }

  // The guard's way, in the lanes that need it: a maximum of 0 changes nothing in the others.
  static void SmallColumnLessMaximum(T* x, int n, int stride) {
    const V maximum = Maximum(FullVector{}, x, stride, n);
    T lanes[V::kLanes], references[V::kLanes];
    maximum.Store(lanes);
    LaneSum<V>(maximum).reference().Store(references);
    bool infinite[V::kLanes];
    for (int l = 0; l < V::kLanes; ++l) {
      infinite[l] = lanes[l] - lanes[l] != 0;
      const T size = references[l] < 0 ? -references[l] : references[l];
      if (infinite[l] || size < ReductionFor<V>::kMaxExponent) lanes[l] = 0;
    }
    LaneSum<V> sum(maximum - V::Load(lanes));
    Add(FullVector{}, x, Discard{}, stride, Ahead<0>{}, n, Less{V::Load(lanes)}, sum);
    LaneTotal<V> scale = sum.Total();
    scale.Invert();
    T hi[V::kLanes];
    scale.hi.Store(hi);
    for (int l = 0; l < V::kLanes; ++l) {
      if (infinite[l]) hi[l] = kInfinity - kInfinity;
    }
    Write(FullVector{}, FullVector{}, Recompute<Less>(scale.exponent, Less{V::Load(lanes)}), x, Discard{}, x,
          stride, Ahead<0>{}, n, Scaler{V::Load(hi), scale.lo});
  }

  // tile[i * kLanes + l] = x[l * m + i], for l < count.
  template <typename In>
  static SOFTMAX2P_INLINE void LoadTile(const In* x, int count, int m, T* tile) {
    if constexpr (std::is_same_v<In, T>) {
      if (count == V::kLanes) return Transpose(x, m, tile);
    }
    T rows[kMaxSmall * V::kLanes];
    const int elements = count * m;
    ForVectors(elements, [&](int, int at, const auto& access) { access.Load(x + at).Store(rows + at); });
    for (int i = (elements + V::kLanes - 1) / V::kLanes * V::kLanes; i < m * V::kLanes; ++i) rows[i] = 0;
    Transpose(rows, m, tile);
  }

  static SOFTMAX2P_INLINE void StoreTile(const T* tile, int count, int m, E* y, bool non_temporal) {
    if constexpr (std::is_same_v<E, T>) {
      if (count == V::kLanes && !non_temporal) return TransposeBack(tile, m, y);
    }
    T rows[kMaxSmall * V::kLanes];
    TransposeBack(tile, m, rows);
    if (count == V::kLanes && non_temporal) {
      for (int i = 0; i < m * V::kLanes; i += V::kLanes) V::Load(rows + i).Stream(y + i);
    } else {
      ForVectors(count * m,
                 [&](int, int at, const auto& access) { access.Store(V::Load(rows + at), y + at); });
    }
  }

  static SOFTMAX2P_INLINE void Transpose(const T* rows, int m, T* tile) {
    V columns[V::kTransposeRows];
    int i = 0;
    for (; i + V::kTransposeRows <= m; i += V::kTransposeRows) {
      V::LoadTransposed(rows + i, m, columns);
      SOFTMAX2P_UNROLL for (int c = 0; c < V::kTransposeRows; ++c) columns[c].Store(tile +
                                                                                    (i + c) * V::kLanes);
    }
    for (; i < m; ++i) {
      for (int l = 0; l < V::kLanes; ++l) tile[i * V::kLanes + l] = rows[l * m + i];
    }
  }

  static SOFTMAX2P_INLINE void TransposeBack(const T* tile, int m, T* rows) {
    V columns[V::kTransposeRows];
    int i = 0;
    for (; i + V::kTransposeRows <= m; i += V::kTransposeRows) {
      SOFTMAX2P_UNROLL for (int c = 0; c < V::kTransposeRows; ++c) columns[c] =
          V::Load(tile + (i + c) * V::kLanes);
      V::StoreTransposed(columns, rows + i, m);
    }
    for (; i < m; ++i) {
      for (int l = 0; l < V::kLanes; ++l) rows[l * m + i] = tile[i * V::kLanes + l];
    }
  }
};

}  // namespace jax_softmax2p
