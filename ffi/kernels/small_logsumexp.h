// logsumexp of small rows, and what is computed of small rows from it, kLanes rows at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ffi/base/inline.h"
#include "ffi/kernels/compensated_lanes.h"
#include "ffi/kernels/jacobian.h"
#include "ffi/kernels/lane_log.h"
#include "ffi/kernels/lane_scale.h"
#include "ffi/kernels/passes.h"
#include "ffi/kernels/small_tile.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For computing in V. KernelTable says what the public functions do.
template <typename V>
class SmallLogSumExpKernels {
  using T = typename V::Scalar;
  using Tile = SmallTile<V>;

 public:
  template <typename In>
  static void Lse(const In* x, std::int64_t outer, int n, T* maximum, T* log, T* rest) {
    const std::int64_t most = Tile::Many(n) * V::kLanes;
    for (std::int64_t first = 0; first < outer; first += most) {
      const int count = static_cast<int>(outer - first < most ? outer - first : most);
      T tiles[kMaxSmall * V::kLanes];
      for (int o = 0; o < count; o += V::kLanes) {
        Tile::Load(x + (first + o) * n, outer - first - o, n, tiles + o * n);
      }
      LseOfTiles(tiles, count, n, n, maximum + first, log + first, rest + first);
    }
  }

  template <typename E>
  static void ColumnsLse(const E* x, std::int64_t stride, int n, int width, T* maximum, T* log, T* rest) {
    E* const none = nullptr;
    Tile::ForColumns(x, none, stride, n, width, [&](const T* tiles, int first, int columns) {
      LseOfTiles(tiles, columns, n, kPanelBlock, maximum + first, log + first, rest + first);
    });
  }

  template <typename E>
  static void ColumnsMinusLse(const E* x, E* y, std::int64_t stride, int n, int width, const T* hi,
                              const T* lo, const T* factor, const std::int32_t* labels) {
    Tile::ForColumns(x, y, stride, n, width, [&](T* tiles, int first, int columns) {
      WriteWeights(tiles, columns, n, hi + first, lo + first, factor + first, labels + first);
    });
  }

  template <typename In, typename E>
  static void MinusLse(const In* x, E* y, std::int64_t outer, int n, const T* hi, const T* lo,
                       const T* factor, const std::int32_t* labels) {
    if (n >= kLongRow && factor != nullptr) {
      for (std::int64_t first = 0; first < outer; first += V::kLanes) {
        WriteLongRows(x + first * n, y + first * n, Tile::RowsOf(outer - first), n, hi + first, lo + first,
                      factor + first, labels == nullptr ? nullptr : labels + first);
      }
      return;
    }
    T tile[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += V::kLanes) {
      const int count = Tile::RowsOf(outer - first);
      Tile::Load(x + first * n, outer - first, n, tile);
      const V lse_hi = LoadRows(hi + first, count), lse_lo = LoadRows(lo + first, count);
      const auto write = [&](const auto& source, const auto& scaler) {
        WriteColumn<V>(FullVector<V>{}, FullVector<V>{}, source, tile, Discard{}, tile, kAdjacent<V>,
                       kAdjacent<V>, Ahead<0>{}, n, scaler);
      };
      if (factor == nullptr) {
        write(NoExp<V, SubtractLse<V>>{{lse_hi, lse_lo}}, NoScaler<V>{});
      } else {
        const FactorScaler<V> scaler(LoadRows(factor + first, count));
        const RecomputeMinusLse<V> source(lse_hi, lse_lo);
        if (labels == nullptr) {
          write(source, scaler);
        } else {
          write(source, LabelScaler<V>{scaler, LoadLabels(labels + first, count)});
        }
      }
      Tile::Store(tile, count, n, y + first * n, false);
    }
  }

  template <typename E>
  static void LabelsMinusLse(const T* z, E* y, int count, const T* hi, const T* lo, const T* factor) {
    ForVectors<V>(count, [&](int, int at, const auto& access) {
      const RecomputeMinusLse<V> source(access.Load(hi + at, 0), access.Load(lo + at, 0));
      const FactorScaler<V> scaler(access.Load(factor + at, 0));
      WriteVectors<1, V>(access, access, source, z + at, Discard{}, y + at, kAdjacent<V>, kAdjacent<V>,
                         Ahead<0>{}, LabelScaler<V>{scaler, V::Broadcast(0)});
    });
  }

  // `In` is E or T.
  template <typename In, typename E>
  static void SubtractMinusLse(const In* x, const E* t, E* out, std::int64_t outer, int n, const T* hi,
                               const T* lo) {
    if (n >= kLongRow) {
      for (std::int64_t r = 0; r < outer; ++r) {
        const E* const row_t = t + r * n;
        const DoubleDouble<T> sum = Rounded<T>(JacobianKernels<V, E>::Sum(row_t, n));
        const V lse_hi = V::Broadcast(hi[r]);
        const MinusProbability<V> minus(V::Broadcast(sum.hi), V::Broadcast(sum.lo), lse_hi);
        WriteRow(RecomputeMinusLse<V>(lse_hi, V::Broadcast(lo[r])), x + r * n, out + r * n, n,
                 [&](const auto& access, int at) {
                   return SubtractScaler<V, std::decay_t<decltype(access)>, E>{minus, access, row_t + at};
                 });
      }
      return;
    }
    T tile[kMaxSmall * V::kLanes], cotangents[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += V::kLanes) {
      const int count = Tile::RowsOf(outer - first);
      Tile::Load(x + first * n, outer - first, n, tile);
      Tile::Load(t + first * n, outer - first, n, cotangents);
      CompensatedLanes<V> sum;
      for (int i = 0; i < n; ++i) sum.Add(V::Load(cotangents + i * V::kLanes), V::Broadcast(0));
      const V lse_hi = LoadRows(hi + first, count);
      const RecomputeMinusLse<V> source(lse_hi, LoadRows(lo + first, count));
      V sum_lo;
      const V sum_hi = FastTwoSum(sum.sum, sum.rest, sum_lo);
      WriteColumn<V>(FullVector<V>{}, FullVector<V>{}, source, tile, Discard{}, tile, kAdjacent<V>,
                     kAdjacent<V>, Ahead<0>{}, n,
                     SubtractScaler<V, FullVector<V>, T>{{sum_hi, sum_lo, lse_hi}, {}, cotangents});
      Tile::Store(tile, count, n, out + first * n, false);
    }
  }

 private:
  // From so many elements on, a row is computed by itself where that needs no sum of exponentials: that saves
  // the transpositions.
  static constexpr int kLongRow = 2 * V::kLanes;

  // As MinusLse, of up to kLanes rows, each by itself.
  template <typename In, typename E>
  static void WriteLongRows(const In* x, E* y, int count, int n, const T* hi, const T* lo, const T* factor,
                            const std::int32_t* labels) {
    T scale_hi[V::kLanes], scale_lo[V::kLanes], exponents[V::kLanes];
    ScalesFromLse<V>(hi, lo, factor, count, {scale_hi, scale_lo, exponents});
    E at_labels[V::kLanes];
    // y may be x.
    if (labels != nullptr) {
      T logits[V::kLanes] = {};
      for (int r = 0; r < count; ++r) {
        if (HasElement(n, labels[r])) logits[r] = Widen(x[r * n + labels[r]]);
      }
      LabelsMinusLse(logits, at_labels, count, hi, lo, factor);
    }
    for (int r = 0; r < count; ++r, x += n, y += n) {
      if (scale_hi[r] == scale_hi[r]) {
        const MantissaScaler<V> scaler{V::Broadcast(scale_hi[r]), V::Broadcast(scale_lo[r])};
        WriteRow(Recompute<V, Identity>(V::Broadcast(exponents[r]), Identity{}), x, y, n,
                 [&](const auto&, int) { return scaler; });
      } else {
        const FactorScaler<V> scaler(V::Broadcast(factor[r]));
        WriteRow(RecomputeMinusLse<V>(V::Broadcast(hi[r]), V::Broadcast(lo[r])), x, y, n,
                 [&](const auto&, int) { return scaler; });
      }
      if (labels != nullptr && HasElement(n, labels[r])) y[labels[r]] = at_labels[r];
    }
  }

  static SOFTMAX2P_INLINE bool HasElement(int n, std::int32_t label) { return label >= 0 && label < n; }

  // Writes scaler(source(x)) to y, both of n elements, with scaler = scaler_from(access, at) for the vectors
  // from element `at` on.
  template <typename Source, typename In, typename E, typename ScalerFrom>
  static SOFTMAX2P_INLINE void WriteRow(const Source& source, const In* x, E* y, int n,
                                        const ScalerFrom& scaler_from) {
    const int vectors = n / V::kLanes, end = vectors * V::kLanes;
    const FullVector<V> full;
    WriteColumn<V>(full, full, source, x, Discard{}, y, kAdjacent<V>, kAdjacent<V>, Ahead<0>{}, vectors,
                   scaler_from(full, 0));
    if (end == n) return;
    const Tail<V> rest{n - end};
    WriteVectors<1, V>(rest, rest, source, x + end, Discard{}, y + end, kAdjacent<V>, kAdjacent<V>,
                       Ahead<0>{}, scaler_from(rest, end));
  }

  // Of `rows` rows of tiles, in place, factor·(e^(x - hi - lo) - [the label's place]).
  static __attribute__((noinline)) void WriteWeights(T* tiles, int rows, int n, const T* hi, const T* lo,
                                                     const T* factor, const std::int32_t* labels) {
    constexpr int kMaxRows = Tile::kMany * V::kLanes;
    T scale_hi[kMaxRows] = {}, scale_lo[kMaxRows] = {}, exponents[kMaxRows] = {}, z[kMaxRows] = {},
      at_labels[kMaxRows];
    const auto for_labels = [&](const auto& body) {
      for (int r = 0; r < rows; ++r) {
        if (HasElement(n, labels[r])) body(r, tiles[ElementOf(r, labels[r], n)]);
      }
    };
    ScalesFromLse<V>(hi, lo, factor, rows, {scale_hi, scale_lo, exponents});
    for_labels([&](int r, const T& element) { z[r] = element; });
    LabelsMinusLse(z, at_labels, rows, hi, lo, factor);
    for (int r = 0; r < rows; r += V::kLanes) {
      const int count = Tile::RowsOf(rows - r);
      if (HasNan(scale_hi + r, count)) {
        WriteUnscaled(tiles + r * n, count, n, scale_hi + r, scale_lo + r, exponents + r, hi + r, lo + r,
                      factor + r);
      } else {
        WriteScaled(tiles + r * n, n, scale_hi + r, scale_lo + r, exponents + r);
      }
    }
    for_labels([&](int r, T& element) { element = at_labels[r]; });
  }

  // Where element i of row r of tiles lies.
  static SOFTMAX2P_INLINE int ElementOf(int r, int i, int n) {
    return r / V::kLanes * V::kLanes * n + i * V::kLanes + r % V::kLanes;
  }

  static SOFTMAX2P_INLINE void WriteScaled(T* tile, int n, const T* hi, const T* lo, const T* exponents) {
    WriteColumn<V>(FullVector<V>{}, FullVector<V>{}, Recompute<V, Identity>(V::Load(exponents), Identity{}),
                   tile, Discard{}, tile, kAdjacent<V>, kAdjacent<V>, Ahead<0>{}, n,
                   MantissaScaler<V>{V::Load(hi), V::Load(lo)});
  }

  // The same of a tile in which rows have no scale. Out of line, since tiles need it rarely.
  static __attribute__((noinline)) void WriteUnscaled(T* tile, int count, int n, const T* scale_hi,
                                                      const T* scale_lo, const T* exponents, const T* hi,
                                                      const T* lo, const T* factor) {
    T results[kMaxSmall * V::kLanes];
    WriteColumn<V>(FullVector<V>{}, FullVector<V>{},
                   RecomputeMinusLse<V>(LoadRows(hi, count), LoadRows(lo, count)), tile, Discard{}, results,
                   kAdjacent<V>, kAdjacent<V>, Ahead<0>{}, n, FactorScaler<V>(LoadRows(factor, count)));
    WriteScaled(tile, n, scale_hi, scale_lo, exponents);
    for (int r = 0; r < count; ++r) {
      if (scale_hi[r] == scale_hi[r]) continue;
      for (int i = 0; i < n; ++i) tile[ElementOf(r, i, n)] = results[ElementOf(r, i, n)];
    }
  }

  // The logarithms are left until the sums of all tiles are there: each is a long chain of operations.
  static __attribute__((noinline)) void LseOfTiles(const T* tiles, int rows, int n, std::int64_t block,
                                                   T* maximum, T* log, T* rest) {
    LaneSums<V> sums[Tile::kMany];
    V largest[Tile::kMany];
    for (int first = 0, i = 0; first < rows; first += V::kLanes, ++i) {
      const T* const tile = tiles + first * n;
      sums[i] = SumOf(tile, n, block, largest[i]);
    }
    for (int first = 0, i = 0; first < rows; first += V::kLanes, ++i) {
      const LaneLog<V> of_sum(sums[i], largest[i], n);
      const int count = Tile::RowsOf(rows - first);
      StoreRows(largest[i], count, maximum + first);
      StoreRows(V::Load(of_sum.log), count, log + first);
      StoreRows(V::Load(of_sum.rest), count, rest + first);
      if (HasNan(log + first, count)) {
        LogOfCertain(tiles + first * n, count, n, block, largest[i], log + first, rest + first);
      }
    }
  }

  static SOFTMAX2P_INLINE bool HasNan(const T* p, int count) {
    bool found = false;
    for (int l = 0; l < count; ++l) found |= p[l] != p[l];
    return found;
  }

  // Fills in the logarithms that are NaN because a row is nearly certain: from sums without the largest
  // elements, of which such a row has one. Out of line, since tiles need it rarely.
  static __attribute__((noinline)) void LogOfCertain(const T* tile, int count, int n, std::int64_t block,
                                                     V largest, T* log, T* rest) {
    const V minus_infinity = V::Broadcast(kMinusInfinity<V>);
    T others[kMaxSmall * V::kLanes];
    for (int i = 0; i < n; ++i) {
      const V v = V::Load(tile + i * V::kLanes), other = WhereEqual(v, largest, minus_infinity, v);
      other.Store(others + i * V::kLanes);
    }
    V second;
    const LaneLog<V> of_sum(SumOf(others, n, block, second), largest);
    for (int l = 0; l < count; ++l) {
      if (log[l] == log[l]) continue;
      log[l] = of_sum.log[l];
      rest[l] = of_sum.rest[l];
    }
  }

  // The sum of a tile, and its largest elements. Each block of elements may raise the sum's reference: the
  // bits are those of a panel with such blocks.
  static SOFTMAX2P_INLINE LaneSums<V> SumOf(const T* tile, int n, std::int64_t block, V& largest) {
    const FullVector<V> full;
    const auto rows_from = [&](std::int64_t i) { return n - i < block ? n - i : block; };
    largest = MaxColumn<V>(full, tile, kAdjacent<V>, rows_from(0));
    LaneAccumulator<V> sum(largest);
    for (std::int64_t i = 0; i < n; i += block) {
      const T* const from = tile + i * V::kLanes;
      if (i > 0) {
        const V highest = MaxColumn<V>(full, from, kAdjacent<V>, rows_from(i));
        sum.Rescale(highest);
        largest = Max(highest, largest);
      }
      AddColumn(full, from, Discard{}, kAdjacent<V>, Ahead<0>{}, rows_from(i), Identity{}, sum);
    }
    return sum.Sums();
  }

  // One number for each of `count` rows.
  static SOFTMAX2P_INLINE V LoadRows(const T* p, int count) {
    return count == V::kLanes ? V::Load(p) : Tail<V>{count}.Load(p, 0);
  }
  static SOFTMAX2P_INLINE void StoreRows(V lanes, int count, T* p) {
    count == V::kLanes ? lanes.Store(p) : Tail<V>{count}.Store(lanes, p);
  }
  static SOFTMAX2P_INLINE V LoadLabels(const std::int32_t* p, int count) {
    T labels[V::kLanes] = {};
    if (count == V::kLanes) {
      for (int l = 0; l < V::kLanes; ++l) labels[l] = static_cast<T>(p[l]);
    } else {
      for (int l = 0; l < count; ++l) labels[l] = static_cast<T>(p[l]);
    }
    return V::Load(labels);
  }
};

}  // namespace jax_softmax2p
