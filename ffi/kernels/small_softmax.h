// Whole softmaxes of small matrices and of short columns: one row a lane, without lanes to merge at the end
// and sums to keep between passes, which take most of the time there.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/log.h"
#include "ffi/kernels/passes.h"
#include "ffi/kernels/small_tile.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class SmallSoftmaxKernels {
  using T = typename V::Scalar;
  using Tile = SmallTile<V>;
  static constexpr int kMaxTiles = Tile::kMany;

 public:
  // kLanes matrices at a time, one a lane: they are transposed into a tile, and back. `In` is E or T.
  template <typename In>
  static void Matrices(const In* x, E* y, std::int64_t outer, int n, int inner, bool non_temporal) {
    const int m = n * inner;
    const int num_tiles = Tile::Many(m);
    const bool aligned_non_temporal = non_temporal && ElementsToAlignment<V::kLanes>(y) == 0;
    T tiles[kMaxSmall * V::kLanes], kept[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += num_tiles * V::kLanes) {
      const std::int64_t rest = outer - first, most = num_tiles * V::kLanes;
      const int count = static_cast<int>(rest < most ? rest : most);
      for (int o = 0; o < count; o += V::kLanes) {
        Tile::Load(x + (first + o) * m, outer - first - o, m, tiles + o * m);
      }
      SoftmaxTiles(tiles, kept, (count + V::kLanes - 1) / V::kLanes, n, inner);
      for (int o = 0; o < count; o += V::kLanes) {
        Tile::Store(tiles + o * m, Tile::RowsOf(count - o), m, y + (first + o) * m, aligned_non_temporal);
      }
    }
  }

  static void Columns(const E* x, E* y, std::int64_t stride, int n, int width) {
    Tile::ForColumns(x, y, stride, n, width, [&](T* tiles, int, int columns) {
      T kept[kMaxSmall * V::kLanes];
      SoftmaxTiles(tiles, kept, (columns + V::kLanes - 1) / V::kLanes, n, 1);
    });
  }

 private:
  // What pass 1 finds of a column of vectors. `exact` is false where the guard wants the maximum subtracted.
  // Lanes with `dominance` above 0 have an element that carries the whole sum: its result is 1, whatever the
  // rounding of its value.
  struct ColumnScale {
    LaneSums<V> scale;
    bool exact;
    V dominance;
  };

  // Whether results come of values. In shorter columns it takes longer to find the dominance than to compute
  // powers again.
  static SOFTMAX2P_INLINE bool TakesValues(int n) { return kTakesValues<V> && n >= 8; }

  // In place, `count` tiles one after the other, each kLanes matrices [n, inner].
  static SOFTMAX2P_INLINE void SoftmaxTiles(T* tiles, T* kept, int count, int n, int inner) {
    const int stride = inner * V::kLanes, columns = count * inner;
    const auto at = [&](int column) { return column / inner * n * stride + column % inner * V::kLanes; };
    for (int first = 0; first < columns; first += kMaxTiles) {
      const int size = columns - first < kMaxTiles ? columns - first : kMaxTiles;
      ColumnScale scales[kMaxTiles];
      for (int c = 0; c < size; ++c) {
        const int i = at(first + c);
        scales[c] = Sum(tiles + i, kept + i, n, stride);
      }
      for (int c = 0; c < size; ++c) {
        const int i = at(first + c);
        Write(scales[c], tiles + i, kept + i, n, stride);
      }
    }
  }

  static SOFTMAX2P_INLINE ColumnScale Sum(const T* x, T* kept, int n, int stride) {
    const V maximum = MaxColumn<V>(FullVector<V>{}, x, stride, n);
    LaneAccumulator<V> sum(maximum);
    if (TakesValues(n)) {
      AddColumn(FullVector<V>{}, x, kept, stride, Ahead<0>{}, n, Identity{}, sum);
    } else {
      AddColumn(FullVector<V>{}, x, Mantissas<T>{kept}, stride, Ahead<0>{}, n, Identity{}, sum);
    }
    const V limit = V::Broadcast(ReductionFor<V>::kMaxExponent - 1), reference = sum.reference();
    const bool exact = !AnyGreater(reference, limit) && !AnyGreater(V::Broadcast(0) - limit, reference);
    return ScaleFrom(sum.Sums(), maximum, n, exact);
  }

  static SOFTMAX2P_INLINE ColumnScale ScaleFrom(LaneSums<V> sum, V maximum, int n, bool exact) {
    const V dominance = TakesValues(n) ? Dominance(maximum, sum) : V::Broadcast(0);
    sum.Invert();
    return {sum, exact, dominance};
  }

  // By how much the others of a sum stay below kDominated of the largest term, in that term's unit.
  static SOFTMAX2P_INLINE V Dominance(V maximum, const LaneSums<V>& sum) {
    const V x[1] = {maximum};
    const ExtExp<V, 1> e = ExtExpKernel<V>(sum.exponent)(x);
    const V others = Fnma(e.expm1[0], e.pow2[0], sum.hi - e.pow2[0]) + sum.lo;
    return V::Broadcast(static_cast<T>(kDominated)) * e.pow2[0] - others;
  }

  static SOFTMAX2P_INLINE void Write(const ColumnScale& sum, T* x, const T* kept, int n, int stride) {
    if (!sum.exact) return GuardedColumn(x, n, stride);
    if (TakesValues(n)) {
      WriteScaled<ValueScaler<V>>(KeptValues<V>{}, kept, Discard{}, x, n, stride, sum);
    } else {
      WriteScaled<MantissaScaler<V>>(Reload<V>(sum.scale.exponent), x, kept, x, n, stride, sum);
    }
  }

  template <typename Scaling, typename Source, typename Kept>
  static SOFTMAX2P_INLINE void WriteScaled(const Source& source, const T* x, Kept kept, T* y, int n,
                                           int stride, const ColumnScale& sum) {
    WriteColumn<V>(FullVector<V>{}, FullVector<V>{}, source, x, kept, y, stride, stride, Ahead<0>{}, n,
                   Scaling{sum.scale.hi, sum.scale.lo});
    if (AnyGreater(sum.dominance, V::Broadcast(0))) WriteOnes(sum.dominance, y, n, stride);
  }

  static __attribute__((noinline)) void WriteOnes(V dominance, T* x, int n, int stride) {
    T lanes[V::kLanes];
    dominance.Store(lanes);
    for (int l = 0; l < V::kLanes; ++l) {
      for (int i = 0; i < n && lanes[l] > 0; ++i) {
        T& y = x[i * stride + l];
        y = y > T{0.5} ? T{1} : y;
      }
    }
  }

  // The guard's third pass (see ops/guarded_sum.h), for the lanes that need it: the others have a maximum of
  // 0 subtracted, which changes nothing. A lane whose maximum is infinite has no softmax: all NaN. Out of
  // line, since rows need it rarely.
  static __attribute__((noinline)) void GuardedColumn(T* x, int n, int stride) {
    const V maximum = MaxColumn<V>(FullVector<V>{}, x, stride, n);
    T lanes[V::kLanes], references[V::kLanes];
    maximum.Store(lanes);
    LaneAccumulator<V>(maximum).reference().Store(references);
    bool infinite[V::kLanes];
    for (int l = 0; l < V::kLanes; ++l) {
      infinite[l] = lanes[l] - lanes[l] != 0;
      const T size = references[l] < 0 ? -references[l] : references[l];
      if (infinite[l] || size < ReductionFor<V>::kMaxExponent) lanes[l] = 0;
    }
    const SubtractMax<V> minus{V::Load(lanes)};
    LaneAccumulator<V> sum(minus(maximum));
    AddColumn(FullVector<V>{}, x, Discard{}, stride, Ahead<0>{}, n, minus, sum);
    ColumnScale scale = ScaleFrom(sum.Sums(), minus(maximum), n, true);
    T hi[V::kLanes];
    scale.scale.hi.Store(hi);
    for (int l = 0; l < V::kLanes; ++l) {
      if (infinite[l]) hi[l] = kMinusInfinity<V> - kMinusInfinity<V>;
    }
    scale.scale.hi = V::Load(hi);
    const Recompute<V, SubtractMax<V>> source(scale.scale.exponent, minus);
    if (TakesValues(n)) {
      WriteScaled<SoftmaxScaler<V>>(source, x, Discard{}, x, n, stride, scale);
    } else {
      WriteScaled<MantissaScaler<V>>(source, x, Discard{}, x, n, stride, scale);
    }
  }
};

}  // namespace jax_softmax2p
