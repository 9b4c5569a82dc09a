// logsumexp of small rows, and what is computed of small rows from it, kLanes rows at a time.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/kernels/lane_log.h"
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
    T tile[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += V::kLanes) {
      const int count = Tile::RowsOf(outer - first);
      Tile::Load(x + first * n, count, n, tile);
      const V largest = MaxColumn<V>(FullVector<V>{}, tile, kAdjacent<V>, n);
      LaneAccumulator<V> sum(largest);
      AddColumn(FullVector<V>{}, tile, Discard{}, kAdjacent<V>, Ahead<0>{}, n, Identity{}, sum);
      const LaneLog<V> of_sum(sum.Sums(), largest);
      const auto store = [&](V lanes, T* p) {
        count == V::kLanes ? lanes.Store(p) : Tail<V>{count}.Store(lanes, p);
      };
      store(largest, maximum + first);
      store(V::Load(of_sum.log), log + first);
      store(V::Load(of_sum.rest), rest + first);
    }
  }

  template <typename In, typename E>
  static void MinusLse(const In* x, E* y, std::int64_t outer, int n, const T* hi, const T* lo,
                       const T* factor) {
    T tile[kMaxSmall * V::kLanes];
    for (std::int64_t first = 0; first < outer; first += V::kLanes) {
      const int count = Tile::RowsOf(outer - first);
      const Tail<V> tail{count};
      const auto load = [&](const T* p) { return count == V::kLanes ? V::Load(p) : tail.Load(p, 0); };
      Tile::Load(x + first * n, count, n, tile);
      const V lse_hi = load(hi + first), lse_lo = load(lo + first);
      if (factor == nullptr) {
        const SubtractLse<V> minus{lse_hi, lse_lo};
        for (int i = 0; i < n; ++i) minus(V::Load(tile + i * V::kLanes)).Store(tile + i * V::kLanes);
      } else {
        WriteColumn<V>(FullVector<V>{}, FullVector<V>{}, RecomputeMinusLse<V>(lse_hi, lse_lo), tile,
                       Discard{}, tile, kAdjacent<V>, kAdjacent<V>, Ahead<0>{}, n,
                       Scaler<V>{DivideByFactor(load(factor + first)), V::Broadcast(0)});
      }
      Tile::Store(tile, count, n, y + first * n, false);
    }
  }
};

}  // namespace jax_softmax2p
