// Softmax of contiguous rows, in pieces: the maximum, the sum (pass 1), the result (pass 2).
//
// A row is a column of vectors whose lanes are merged at the end. Pass 1 takes it block by block; the
// elements of a block share the exponent of the largest yet, which is found while the block is brought into
// the first-level cache.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/passes.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class RowKernels {
  using T = typename V::Scalar;
  // Vectors of a row that share an exponent: long against the cost of closing a block, some 20 ns, short
  // against the first-level cache.
  static constexpr int kBlock = 128;
  static constexpr T kZero = 0;

 public:
  static void Exponential(T x, int exponent, T* expm1, T* pow2) {
    const V v[1] = {V::Broadcast(x)};
    const ExtExp<V, 1> e = ExtExpKernel<V>(V::Broadcast(static_cast<T>(exponent)))(v);
    const Tail<V> first{1};
    first.Store(e.expm1[0], expm1);
    first.Store(e.pow2[0], pow2);
  }

  static T Maximum(const E* x, std::int64_t n) {
    const std::int64_t vectors = n / V::kLanes;
    V maximum = MaxColumn<V>(FullVector<V>{}, x, kAdjacent<V>, vectors);
    const Tail<V> rest{static_cast<int>(n % V::kLanes)};
    if (rest.count != 0) maximum = Max(rest.Load(x + vectors * V::kLanes), maximum);
    return maximum.ReduceMax();
  }

  static RowSum<T> Sum(const E* x, T* kept, std::int64_t n, const KnownMaximum<T>& maximum) {
    if (maximum.use == KnownMaximum<T>::kSubtract) {
      return SumRow(x, Discard{}, n, SubtractMax<V>{V::Broadcast(maximum.value)}, &kZero);
    }
    const T* const known = maximum.use == KnownMaximum<T>::kReference ? &maximum.value : nullptr;
    if (kept != nullptr) return SumRow(x, kept, n, Identity{}, known);
    return SumRow(x, Discard{}, n, Identity{}, known);
  }

  // `In` is E or T.
  template <typename In>
  static void Write(const In* x, const T* kept, E* y, std::int64_t n, const RowScale<T>& scale,
                    bool non_temporal) {
    const V exponent = V::Broadcast(static_cast<T>(scale.exponent));
    const Scaler<V> scaler{V::Broadcast(scale.hi), V::Broadcast(scale.lo)};
    if (scale.subtract_shift) {
      const SubtractLse<V> minus{V::Broadcast(scale.shift_hi), V::Broadcast(scale.shift_lo)};
      WriteFrom(Recompute<V, SubtractLse<V>>(exponent, minus), x, Discard{}, y, n, scaler, non_temporal);
    } else if (kept != nullptr) {
      WriteFrom(Reload<V>(exponent), x, kept, y, n, scaler, non_temporal);
    } else {
      WriteFrom(Recompute<V, Identity>(exponent, Identity{}), x, Discard{}, y, n, scaler, non_temporal);
    }
  }

  // `In` is E or T.
  template <typename In>
  static void WriteLog(const In* x, E* y, std::int64_t n, const LseTerms<T>& lse, bool non_temporal) {
    const SubtractLse<V> minus{V::Broadcast(lse.maximum), V::Broadcast(lse.log)};
    WriteFrom(NoExp<V, SubtractLse<V>>{minus}, x, Discard{}, y, n, NoScaler<V>{}, non_temporal);
  }

 private:
  // `maximum` is null, or that of the whole row, as read.
  template <typename Kept, typename Read>
  static SOFTMAX2P_INLINE RowSum<T> SumRow(const E* x, Kept kept, std::int64_t n, const Read& read,
                                           const T* maximum) {
    constexpr std::int64_t kElements = std::int64_t{LaneAccumulator<V>::kFold} * V::kLanes;
    RowSum<T> row = SumFold(x, kept, n < kElements ? n : kElements, read, maximum);
    for (std::int64_t i = kElements; i < n; i += kElements) {
      const std::int64_t rest = n - i;
      row.Combine(SumFold(x + i, kept + i, rest < kElements ? rest : kElements, read, maximum));
    }
    return row;
  }

  // The sum of so many elements as a LaneAccumulator is good for.
  template <typename Kept, typename Read>
  static SOFTMAX2P_INLINE RowSum<T> SumFold(const E* x, Kept kept, std::int64_t n, const Read& read,
                                            const T* maximum) {
    const std::int64_t vectors = n / V::kLanes, end = vectors * V::kLanes;
    const Tail<V> rest{static_cast<int>(n - end)};
    LaneAccumulator<V> sum;
    V highest = V::Broadcast(maximum != nullptr ? *maximum : kMinusInfinity<V>);
    if (maximum != nullptr) sum.Rescale(highest);
    std::int64_t v = 0;
    do {
      const std::int64_t size = vectors - v < kBlock ? vectors - v : kBlock;
      const std::int64_t i = v * V::kLanes;
      if (maximum == nullptr) {
        V block = MaxColumn<V>(FullVector<V>{}, x + i, kAdjacent<V>, size);
        if (v + size == vectors && rest.count != 0) block = Max(rest.Load(x + end), block);
        highest = Max(block, highest);
        sum.Rescale(read(block));
      }
      AddColumn(FullVector<V>{}, x + i, kept + i, kAdjacent<V>, SumAhead{}, size, read, sum);
      v += size;
    } while (v < vectors);
    if (rest.count != 0) AddColumn(rest, x + end, kept + end, kAdjacent<V>, Ahead<0>{}, 1, read, sum);
    return {sum.Sums().ReduceSum(), highest.ReduceMax()};
  }

  template <typename Source, typename In, typename Kept, typename Scaling>
  static SOFTMAX2P_INLINE void WriteFrom(const Source& source, const In* x, Kept kept, E* y, std::int64_t n,
                                         const Scaling& scaler, bool non_temporal) {
    const auto part = [&](std::int64_t i, int count) {
      const Tail<V> access{count};
      WriteVectors<1, V>(access, access, source, x + i, kept + i, y + i, kAdjacent<V>, kAdjacent<V>,
                         Ahead<0>{}, scaler);
    };
    std::int64_t i = 0;
    if (non_temporal) {
      const std::int64_t head = ElementsToAlignment<V::kLanes>(y) < n ? ElementsToAlignment<V::kLanes>(y) : n;
      if (head != 0) part(0, static_cast<int>(head));
      i = head;
    }
    const std::int64_t vectors = (n - i) / V::kLanes;
    if (non_temporal) {
      WriteColumn<V>(FullVector<V>{}, NonTemporal<V>{}, source, x + i, kept + i, y + i, kAdjacent<V>,
                     kAdjacent<V>, WriteAhead{}, vectors, scaler);
    } else {
      WriteColumn<V>(FullVector<V>{}, FullVector<V>{}, source, x + i, kept + i, y + i, kAdjacent<V>,
                     kAdjacent<V>, WriteAhead{}, vectors, scaler);
    }
    i += vectors * V::kLanes;
    if (i < n) part(i, static_cast<int>(n - i));
  }
};

}  // namespace jax_softmax2p
