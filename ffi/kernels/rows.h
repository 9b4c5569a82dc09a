// Softmax of contiguous rows, in pieces: the maximum, the sum (pass 1), the result (pass 2).
//
// A row is a column of vectors whose lanes are merged at the end. Pass 1 takes it block by block; the
// elements of a block share the exponent of the largest yet, which is found while the block is brought into
// the first-level cache.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/log.h"
#include "ffi/kernels/passes.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class RowKernels {
  using T = typename V::Scalar;
  static constexpr std::int64_t kBlock = kRowBlock<T>;
  static constexpr T kZero = 0;
  using SumAhead = Ahead<static_cast<int>(2 * kBlock / V::kLanes)>;

 public:
  static void Exponentials(const T* x, std::int64_t n, int exponent, T* expm1, T* pow2) {
    // The reference takes kUnit off.
    const ExtExpKernel<V> exponential(V::Broadcast(static_cast<T>(exponent + kUnitExponent<V>)));
    for (std::int64_t i = 0; i < n; i += V::kLanes) {
      ForVectors<V>(static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes),
                    [&](int, int, const auto& access) {
                      const V v[1] = {access.Load(x + i)};
                      const ExtExp<V, 1> e = exponential(v);
                      access.Store(e.expm1[0], expm1 + i);
                      access.Store(e.pow2[0], pow2 + i);
                    });
    }
  }

  static T Maximum(const E* x, std::int64_t n) {
    const std::int64_t vectors = n / V::kLanes;
    V maximum = MaxColumn<V>(FullVector<V>{}, x, kAdjacent<V>, vectors);
    const Tail<V> rest{static_cast<int>(n % V::kLanes)};
    if (rest.count != 0) maximum = Max(rest.Load(x + vectors * V::kLanes), maximum);
    return maximum.ReduceMax();
  }

  static RowSum<T> Sum(const E* x, const KeptRow<T>& kept, std::int64_t n, const KnownMaximum<T>& maximum) {
    if (maximum.use == KnownMaximum<T>::kSubtract) {
      return SumRow(x, Discard{}, n, SubtractMax<V>{V::Broadcast(maximum.value)}, &kZero);
    }
    const T* const known = maximum.use == KnownMaximum<T>::kReference ? &maximum.value : nullptr;
    if (kept.values != nullptr) return SumRow(x, kept, n, Identity{}, known);
    return SumRow(x, Discard{}, n, Identity{}, known);
  }

  // `In` is E or T.
  template <typename In>
  static void Write(const In* x, const KeptRow<T>& kept, E* y, std::int64_t n, const RowScale<T>& scale,
                    bool non_temporal) {
    if (kept.values != nullptr && !scale.subtract_shift) {
      WriteKept(x, kept, y, n, scale, non_temporal);
      if (scale.dominated) WriteOne(y, n);
      return;
    }
    SoftmaxScaler<V> scaler{V::Broadcast(scale.hi), V::Broadcast(scale.lo)};
    V reference = V::Broadcast(static_cast<T>(scale.exponent));
    if constexpr (kTakesValues<V>) {
      // Results beside which kUnit would overflow do without it.
      constexpr T kLarge = static_cast<T>(Format<T>::kLarge);
      if (scale.hi > kLarge || scale.hi < -kLarge) {
        reference = reference + V::Broadcast(kUnitExponent<V>);
        scaler.power = V::Broadcast(1);
      }
    }
    if (scale.subtract_shift) {
      const SubtractLse<V> minus{V::Broadcast(scale.shift_hi), V::Broadcast(scale.shift_lo)};
      WriteFrom(Recompute<V, SubtractLse<V>>(reference, minus), x, Discard{}, y, n, scaler, non_temporal);
    } else {
      WriteFrom(Recompute<V, Identity>(reference, Identity{}), x, Discard{}, y, n, scaler, non_temporal);
    }
    if (scale.dominated) WriteOne(y, n);
  }

  static void BlockRows(const E* x, E* y, std::int64_t rows, std::int64_t n, bool non_temporal) {
    // y has room for what pass 1 keeps, unless x is still needed there, or it must not come into the caches.
    const bool keeps_in_y = std::is_same_v<E, T> && static_cast<const void*>(x) != y && !non_temporal;
    alignas(64) T scratch[2][kBlock];
    RowScale<T> scales[2];
    const auto kept = [&](std::int64_t r) -> T* {
      if constexpr (std::is_same_v<E, T>) {
        if (keeps_in_y) return y + r * n;
      }
      return scratch[r % 2];
    };
    // The maximum of a row is found before pass 1 of the row above, and this before pass 2 of the row above
    // it: each ends in a chain of operations that the CPU fills with what comes after.
    V maximum = MaxOfBlock(x, n);
    for (std::int64_t r = 0; r <= rows; ++r) {
      if (r < rows) {
        const T of_row = maximum.ReduceMax();
        if (r + 1 < rows) maximum = MaxOfBlock(x + (r + 1) * n, n);
        LaneAccumulator<V> sum(V::Broadcast(of_row));
        AddBlock(x + r * n, kept(r), n, Identity{}, sum);
        const ExtendedSum total = sum.Sums().ReduceSum();
        ScaleFromSum<T>(total, false, of_row, scales[r % 2]);
        if constexpr (kTakesValues<V>) scales[r % 2].dominated = RowIsDominated(of_row, total);
      }
      if (r == 0) continue;
      RowScale<T>& scale = scales[(r + 1) % 2];
      const E* const x_r = x + (r - 1) * n;
      E* const y_r = y + (r - 1) * n;
      constexpr int kMax = ReductionFor<V>::kMaxExponent;
      const int exponent = scale.exponent;
      if (-kMax < exponent && exponent < kMax) {
        WriteBlock(x_r, kept(r - 1), y_r, n, scale, V::Broadcast(0), non_temporal);
        if (scale.dominated) WriteOne(y_r, n);
      } else {
        GuardedRow(x_r, y_r, n, scale, non_temporal);
      }
    }
  }

  // `In` is E or T.
  template <typename In>
  static void WriteLog(const In* x, E* y, std::int64_t n, const LseTerms<T>& lse, bool non_temporal) {
    const SubtractLse<V> minus{V::Broadcast(lse.maximum), V::Broadcast(lse.log)};
    WriteFrom(NoExp<V, SubtractLse<V>>{minus}, x, Discard{}, y, n, NoScaler<V>{}, non_temporal);
  }

 protected:
  // The term of a sum, (1 + expm1)·pow2, that the element in all lanes of v, as read, has.
  static SOFTMAX2P_INLINE void TermOf(V v, const ExtendedSum& sum, T& expm1, T& pow2) {
    // The reference takes kUnit off.
    const T reference = static_cast<T>(sum.exponent + kUnitExponent<V>);
    const V elements[1] = {v};
    const ExtExp<V, 1> e = ExtExpKernel<V>(V::Broadcast(reference))(elements);
    T expm1s[V::kLanes], pow2s[V::kLanes];
    e.expm1[0].Store(expm1s);
    e.pow2[0].Store(pow2s);
    expm1 = expm1s[0];
    pow2 = pow2s[0];
  }

  static SOFTMAX2P_INLINE V MaxOfBlock(const E* x, std::int64_t size) {
    const std::int64_t vectors = size / V::kLanes;
    const Tail<V> rest{static_cast<int>(size % V::kLanes)};
    const V maximum = MaxColumn<V>(FullVector<V>{}, x, kAdjacent<V>, vectors);
    return rest.count == 0 ? maximum : Max(rest.Load(x + vectors * V::kLanes), maximum);
  }

  template <typename Values, typename Read>
  static SOFTMAX2P_INLINE void AddBlock(const E* x, Values kept, std::int64_t size, const Read& read,
                                        LaneAccumulator<V>& sum) {
    const std::int64_t vectors = size / V::kLanes, end = vectors * V::kLanes;
    const Tail<V> rest{static_cast<int>(size % V::kLanes)};
    // The incomplete vector comes first: the others hide how long it takes.
    if (rest.count != 0) AddColumn(rest, x + end, kept + end, kAdjacent<V>, Ahead<0>{}, 1, read, sum);
    AddColumn(FullVector<V>{}, x, kept, kAdjacent<V>, SumAhead{}, vectors, read, sum);
  }

 private:
  // `maximum` is null, or that of the whole row, as read.
  template <typename Kept, typename Read>
  static SOFTMAX2P_INLINE RowSum<T> SumRow(const E* x, const Kept& kept, std::int64_t n, const Read& read,
                                           const T* maximum) {
    constexpr std::int64_t kElements = std::int64_t{LaneAccumulator<V>::kFold} * V::kLanes;
    RowSum<T> row = SumFold(x, kept, n < kElements ? n : kElements, read, maximum);
    for (std::int64_t i = kElements; i < n; i += kElements) {
      const std::int64_t rest = n - i;
      row.Combine(SumFold(x + i, kept + i, rest < kElements ? rest : kElements, read, maximum));
    }
    return row;
  }

  // The sum of so many elements as a LaneAccumulator is good for. All lanes have one reference.
  template <typename Kept, typename Read>
  static SOFTMAX2P_INLINE RowSum<T> SumFold(const E* x, const Kept& kept, std::int64_t n, const Read& read,
                                            const T* maximum) {
    LaneAccumulator<V> sum;
    V highest = V::Broadcast(maximum != nullptr ? *maximum : kMinusInfinity<V>);
    if (maximum != nullptr) sum.Rescale(highest);
    const auto size_at = [&](std::int64_t i) { return n - i < kBlock ? n - i : kBlock; };
    V next = maximum == nullptr ? MaxOfBlock(x, size_at(0)) : highest;
    std::int64_t i = 0;
    do {
      const std::int64_t size = size_at(i), after = i + size;
      if (maximum == nullptr) {
        highest = Max(next, highest);
        sum.Rescale(read(V::Broadcast(next.ReduceMax())));
        // The next block's is found before this block is added, so that nothing waits for it.
        if (after < n) next = MaxOfBlock(x + after, size_at(after));
      }
      StoreReference(kept + i, sum.reference());
      AddBlock(x + i, ValuesOf(kept, i), size, read, sum);
      i = after;
    } while (i < n);
    return {sum.Sums().ReduceSum(), highest.ReduceMax()};
  }

  static SOFTMAX2P_INLINE T* ValuesOf(const KeptRow<T>& kept, std::int64_t at) { return kept.values + at; }
  static SOFTMAX2P_INLINE Discard ValuesOf(Discard, std::int64_t) { return {}; }
  static SOFTMAX2P_INLINE void StoreReference(const KeptRow<T>& kept, V reference) {
    Tail<V>{1}.Store(reference, kept.references);
  }
  static SOFTMAX2P_INLINE void StoreReference(Discard, V) {}

  // Pass 2 from what pass 1 kept.
  template <typename In>
  static SOFTMAX2P_INLINE void WriteKept(const In* x, const KeptRow<T>& kept, E* y, std::int64_t n,
                                         const RowScale<T>& scale, bool non_temporal) {
    for (std::int64_t i = 0; i < n; i += kBlock) {
      const V below = V::Broadcast(kept.references[i / kBlock] - static_cast<T>(scale.exponent));
      WriteBlock(x + i, kept.values + i, y + i, n - i < kBlock ? n - i : kBlock, scale, below, non_temporal);
    }
  }

  // The same of a block, whose reference less that of the scale is `below`.
  template <typename In>
  static SOFTMAX2P_INLINE void WriteBlock(const In* x, const T* kept, E* y, std::int64_t size,
                                          const RowScale<T>& scale, V below, bool non_temporal) {
    const V hi = V::Broadcast(scale.hi), lo = V::Broadcast(scale.lo);
    if constexpr (kTakesValues<V>) {
      // `below` goes into `power`, or, where that would underflow, into hi and lo, as far as any result can
      // be above zero.
      const V power = Max(below, V::Broadcast(static_cast<T>(kUnitExponent<V> + 1 - Format<T>::kBias)));
      const V rest = PowerOfTwo<V>(Max(below - power, V::Broadcast(-kUnitExponent<V> - 8)));
      const V unit = V::Broadcast(kUnitExponent<V>);
      const ValueScaler<V> scaler{hi * rest, lo * rest, PowerOfTwo<V>(power - unit)};
      WriteFrom(KeptValues<V>{}, kept, Discard{}, y, size, scaler, non_temporal);
    } else {
      const V reference = V::Broadcast(static_cast<T>(scale.exponent));
      WriteFrom(Reload<V>(reference), x, kept, y, size, Scaler<V>{hi, lo}, non_temporal);
    }
  }

  // Whether the largest element of a row carries its whole sum.
  static SOFTMAX2P_INLINE bool RowIsDominated(T maximum, const ExtendedSum& total) {
    T expm1, pow2;
    TermOf(V::Broadcast(maximum), total, expm1, pow2);
    return IsDominated(total.mantissa.hi, total.mantissa.lo, pow2, expm1);
  }

  // Gives the element of y that dominates its row 1, in float: where results are rounded to 16 bits, it is
  // that.
  static void WriteOne(E* y, std::int64_t n) {
    if constexpr (std::is_same_v<E, T>) {
      for (std::int64_t i = 0; i < n; ++i) y[i] = y[i] > T{0.5} ? T{1} : y[i];
    }
  }

  // The guard's third pass (see ops/guarded_sum.h). Out of line, since rows need it rarely. The scale's shift
  // is the row's maximum.
  static __attribute__((noinline)) void GuardedRow(const E* x, E* y, std::int64_t n, RowScale<T>& scale,
                                                   bool non_temporal) {
    const T maximum = scale.shift_hi;
    ScaleFromSum<T>(Sum(x, {}, n, {KnownMaximum<T>::kSubtract, maximum}).sum, true, maximum, scale);
    // Of the largest element, x - maximum is 0, whose exponential is exact, as is its value.
    // A row whose maximum is infinite has no softmax: all NaN.
    if (maximum - maximum != 0) scale.hi = kMinusInfinity<V> - kMinusInfinity<V>;
    Write(x, {}, y, n, scale, non_temporal);
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
