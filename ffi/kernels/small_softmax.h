// Whole softmaxes of small matrices and of short columns: one row a lane, without lanes to merge at the end
// and sums to keep between passes, which take most of the time there.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/passes.h"
#include "ffi/kernels/small_tile.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class SmallSoftmaxKernels {
  using T = typename V::Scalar;
  using Tile = SmallTile<V>;
  // A column of a tile is a chain of dependent operations from its first element to its last result. As many
  // tiles as fit, up to these, are worked on together, so that the CPU has several chains to choose from.
  static constexpr int kMaxTiles = 4;

 public:
  // kLanes matrices at a time, one a lane: they are transposed into a tile, and back. `In` is E or T.
  template <typename In>
  static void Matrices(const In* x, E* y, std::int64_t outer, int n, int inner, bool non_temporal) {
    const int m = n * inner;
    const int num_tiles = TilesOf(m);
    const bool aligned_non_temporal = non_temporal && ElementsToAlignment<V::kLanes>(y) == 0;
    T tiles[kMaxSmall * V::kLanes], kept[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += num_tiles * V::kLanes) {
      const std::int64_t rest = outer - first, most = num_tiles * V::kLanes;
      const int count = static_cast<int>(rest < most ? rest : most);
      for (int o = 0; o < count; o += V::kLanes) {
        Tile::Load(x + (first + o) * m, Tile::RowsOf(count - o), m, tiles + o * m);
      }
      SoftmaxTiles(tiles, kept, (count + V::kLanes - 1) / V::kLanes, n, inner);
      for (int o = 0; o < count; o += V::kLanes) {
        Tile::Store(tiles + o * m, Tile::RowsOf(count - o), m, y + (first + o) * m, aligned_non_temporal);
      }
    }
  }

  static void Columns(const E* x, E* y, std::int64_t stride, int n, int width) {
    const int num_tiles = TilesOf(n);
    T tiles[kMaxSmall * V::kLanes], kept[kMaxSmall * V::kLanes];
    for (int first = 0; first < width; first += num_tiles * V::kLanes) {
      const int rest = width - first, most = num_tiles * V::kLanes;
      const int count = rest < most ? rest : most;
      ForVectors<V>(count, [&](int v, int at, const auto& access) {
        T* const tile = tiles + v * n * V::kLanes;
        for (int i = 0; i < n; ++i) access.Load(x + i * stride + first + at, 0).Store(tile + i * V::kLanes);
      });
      SoftmaxTiles(tiles, kept, (count + V::kLanes - 1) / V::kLanes, n, 1);
      ForVectors<V>(count, [&](int v, int at, const auto& access) {
        const T* const tile = tiles + v * n * V::kLanes;
        for (int i = 0; i < n; ++i) access.Store(V::Load(tile + i * V::kLanes), y + i * stride + first + at);
      });
    }
  }

 private:
  static SOFTMAX2P_INLINE int TilesOf(int m) { return kMaxSmall / m < kMaxTiles ? kMaxSmall / m : kMaxTiles; }

  // What pass 1 finds of a column of vectors. `exact` is false where the guard wants the maximum subtracted.
  struct ColumnScale {
    LaneSums<V> scale;
    bool exact;
  };

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

  // Of pass 2: it takes kUnit off.
  static SOFTMAX2P_INLINE V ReferenceOf(const LaneSums<V>& scale) {
    return scale.exponent + V::Broadcast(kUnitExponent<V>);
  }

  static SOFTMAX2P_INLINE ColumnScale Sum(const T* x, T* kept, int n, int stride) {
    LaneAccumulator<V> sum(MaxColumn<V>(FullVector<V>{}, x, stride, n));
    AddColumn(FullVector<V>{}, x, Mantissas<T>{kept}, stride, Ahead<0>{}, n, Identity{}, sum);
    const V limit = V::Broadcast(ReductionFor<V>::kMaxExponent - 1), reference = sum.reference();
    LaneSums<V> scale = sum.Sums();
    scale.Invert();
    return {scale, !AnyGreater(reference, limit) && !AnyGreater(V::Broadcast(0) - limit, reference)};
  }

  static SOFTMAX2P_INLINE void Write(const ColumnScale& sum, T* x, const T* kept, int n, int stride) {
    if (!sum.exact) return GuardedColumn(x, n, stride);
    WriteColumn<V>(FullVector<V>{}, FullVector<V>{}, Reload<V>(ReferenceOf(sum.scale)), x, kept, x, stride,
                   stride, Ahead<0>{}, n, Scaler<V>{sum.scale.hi, sum.scale.lo});
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
    LaneSums<V> scale = sum.Sums();
    scale.Invert();
    T hi[V::kLanes];
    scale.hi.Store(hi);
    for (int l = 0; l < V::kLanes; ++l) {
      if (infinite[l]) hi[l] = kMinusInfinity<V> - kMinusInfinity<V>;
    }
    WriteColumn<V>(FullVector<V>{}, FullVector<V>{}, Recompute<V, SubtractMax<V>>(ReferenceOf(scale), minus),
                   x, Discard{}, x, stride, stride, Ahead<0>{}, n, Scaler<V>{V::Load(hi), scale.lo});
  }
};

}  // namespace jax_softmax2p
