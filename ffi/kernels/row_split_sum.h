// The sum of e^x of a row in two parts: its largest element's and the others'.
//
// Every lane has a reference of its own, so the lanes that do not have the largest element sum theirs as
// exactly as any. In the lane that has it, the others would drown beside it: of that lane, one block is
// summed again without it, where the others are few. So however near a row is to certainty, it takes but
// little longer.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/kernels/log.h"
#include "ffi/kernels/rows.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public function does.
template <typename V, typename E>
class RowSplitSumKernels : RowKernels<V, E> {
  using T = typename V::Scalar;
  using Rows = RowKernels<V, E>;
  static constexpr std::int64_t kBlock = kRowBlock<T>;

 public:
  static SplitSum<T> Sum(const E* x, std::int64_t n, const KnownMaximum<T>& maximum) {
    if (maximum.use == KnownMaximum<T>::kSubtract) {
      return SumRow(x, n, SubtractMax<V>{V::Broadcast(maximum.value)});
    }
    return SumRow(x, n, Identity{});
  }

 private:
  static constexpr T kLowest = -ReductionFor<V>::kMaxExponent;

  // The sums of all blocks. Of every lane, the block that has its largest element is held apart.
  struct Lanes {
    LaneSums<V> held;
    V largest;
    V block = V::Broadcast(0);  // the number of the block that is held
    LaneSums<V> rest = {V::Broadcast(0), V::Broadcast(0), V::Broadcast(kLowest)};

    SOFTMAX2P_INLINE void Add(LaneSums<V> sums, V largest_of_block, V number) {
      const V highest = Max(largest_of_block, largest);
      // Where the largest stays, the new block is merged, otherwise the one that was held.
      const auto exchange = [&](V& mine, V& other) {
        const V stays = WhereEqual(highest, largest, mine, other);
        other = WhereEqual(highest, largest, other, mine);
        mine = stays;
      };
      exchange(held.hi, sums.hi);
      exchange(held.lo, sums.lo);
      exchange(held.exponent, sums.exponent);
      exchange(block, number);
      largest = highest;
      rest.Merge(sums);
    }

    SOFTMAX2P_INLINE ExtendedSum Total() const {
      LaneSums<V> total = rest;
      total.Merge(held);
      total.Align();
      return total.ReduceSum();
    }
  };

  // `largest` is each lane's.
  template <typename Read>
  static SOFTMAX2P_INLINE LaneSums<V> SumBlock(const E* x, std::int64_t size, const Read& read, V largest) {
    LaneAccumulator<V> sum(read(largest));
    Rows::AddBlock(x, Discard{}, size, read, sum);
    return sum.Sums();
  }

  template <typename Read>
  static SOFTMAX2P_INLINE SplitSum<T> SumRow(const E* x, std::int64_t n, const Read& read) {
    const auto size_at = [&](std::int64_t i) { return n - i < kBlock ? n - i : kBlock; };
    // The next block's maximum is found before a block is added, so that nothing waits for it.
    const auto max_of = [&](std::int64_t i) {
      return i < n ? Rows::MaxOfBlock(x + i, size_at(i)) : V::Broadcast(kMinusInfinity<V>);
    };
    V largest = max_of(0), next = max_of(kBlock);
    Lanes lanes{SumBlock(x, size_at(0), read, largest), largest};
    for (std::int64_t i = kBlock; i < n; i += kBlock) {
      largest = next;
      next = max_of(i + kBlock);
      const V number = V::Broadcast(static_cast<T>(i / kBlock));
      lanes.Add(SumBlock(x + i, size_at(i), read, largest), largest, number);
    }
    return Split(x, n, read, lanes);
  }

  template <typename Read>
  static SOFTMAX2P_INLINE SplitSum<T> Split(const E* x, std::int64_t n, const Read& read,
                                            const Lanes& lanes) {
    const ExtendedSum total = lanes.Total();
    SplitSum<T> split;
    split.maximum = lanes.largest.ReduceMax();
    split.exponent = total.exponent;
    split.others = total;
    if (!(total.exponent < -kLowest)) return split;  // The guard subtracts the maximum.
    T expm1, pow2;
    Rows::TermOf(read(V::Broadcast(split.maximum)), total, expm1, pow2);
    split.largest = LargestTerm(pow2, expm1);
    const double others = SumOfOthers(total.mantissa.hi, total.mantissa.lo, pow2, expm1);
    const std::int64_t block = n < kBlock ? n : kBlock;
    if (others < NearCertainty<T>(block, block / V::kLanes) * split.largest) {
      split.others = SumWithoutLargest(x, n, read, lanes, split.maximum);
    } else {
      split.others.mantissa = {others, 0};
    }
    return split;
  }

  // Out of line, since rows need it rarely.
  template <typename Read>
  static __attribute__((noinline)) ExtendedSum SumWithoutLargest(const E* x, std::int64_t n, const Read& read,
                                                                 Lanes lanes, T maximum) {
    T largest[V::kLanes], blocks[V::kLanes], hi[V::kLanes], lo[V::kLanes], exponents[V::kLanes];
    lanes.largest.Store(largest);
    lanes.block.Store(blocks);
    int lane = 0;
    while (lane + 1 < V::kLanes && largest[lane] != maximum) ++lane;
    // The others of that lane and block, by themselves.
    E elements[kBlock / V::kLanes];
    int count = 0;
    bool met_largest = false;
    const std::int64_t begin = static_cast<std::int64_t>(blocks[lane]) * kBlock;
    const std::int64_t end = n - begin < kBlock ? n : begin + kBlock;
    for (std::int64_t i = begin + lane; i < end; i += V::kLanes) {
      if (!met_largest && Widen(x[i]) == maximum) {
        met_largest = true;
      } else {
        elements[count++] = x[i];
      }
    }
    lanes.held.hi.Store(hi);
    lanes.held.lo.Store(lo);
    lanes.held.exponent.Store(exponents);
    hi[lane] = lo[lane] = 0;
    exponents[lane] = kLowest;
    lanes.held = {V::Load(hi), V::Load(lo), V::Load(exponents)};
    lanes.rest.Merge(SumBlock(elements, count, read, Rows::MaxOfBlock(elements, count)));
    return lanes.Total();
  }
};

}  // namespace jax_softmax2p
