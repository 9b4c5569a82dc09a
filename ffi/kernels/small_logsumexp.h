// logsumexp of small rows, and what is computed of small rows from it, kLanes rows at a time.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/kernels/log.h"
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
      const V largest[1] = {MaxColumn<V>(FullVector<V>{}, tile, kAdjacent<V>, n)};
      LaneAccumulator<V> sum(largest[0]);
      AddColumn(FullVector<V>{}, tile, Discard{}, kAdjacent<V>, Ahead<0>{}, n, Identity{}, sum);
      const LaneSums<V> total = sum.Sums();
      const ExtExp<V, 1> of_largest = ExtExpKernel<V>(sum.reference())(largest);
      T maxima[V::kLanes], sums[V::kLanes], rests[V::kLanes], exponents[V::kLanes];
      T powers[V::kLanes], mantissas[V::kLanes];
      double logs[V::kLanes], log_rests[V::kLanes];
      largest[0].Store(maxima);
      total.hi.Store(sums);
      total.lo.Store(rests);
      total.exponent.Store(exponents);
      of_largest.pow2[0].Store(powers);
      of_largest.expm1[0].Store(mantissas);
      for (int l = 0; l < V::kLanes; ++l) {
        logs[l] = LogOfSumOverLargest(sums[l], rests[l], powers[l], mantissas[l], log_rests[l]);
      }
      for (int l = 0; l < count; ++l) {
        const T size = exponents[l] < 0 ? -exponents[l] : exponents[l];
        const bool exact = size < ReductionFor<V>::kMaxExponent - 1;
        maximum[first + l] = maxima[l];
        // sums - sums is NaN where the sum is no number.
        log[first + l] =
            exact ? static_cast<T>(logs[l]) + (sums[l] - sums[l]) : kMinusInfinity<V> - kMinusInfinity<V>;
        rest[first + l] = static_cast<T>((logs[l] - static_cast<double>(log[first + l])) + log_rests[l]);
      }
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
                       Discard{}, tile, kAdjacent<V>, Ahead<0>{}, n,
                       Scaler<V>{load(factor + first), V::Broadcast(0)});
      }
      Tile::Store(tile, count, n, y + first * n, false);
    }
  }
};

}  // namespace jax_softmax2p
