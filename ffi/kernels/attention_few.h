// Attention of few queries to many keys, as in decoding, where reading keys and values takes the time.
//
// Keys and values are read once, in their own type, for all rows (queries of all heads that share them). The
// keys are cut into chunks, whose results combine: a sum of exponentials relative to a reference is a monoid.
//
// Memory is read in its order. The heads of a key lie side by side, so that the same head of the next key is
// often a page away, and a multiple of 4 KiB: head by head, 64 keys at a time, one thread of a Zen 3 read at
// 7 GB/s, and 8 keys of all heads at a time at 13. So a few keys go through all heads before the next, and
// each is read from its first element to its last.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_logits.h"
#include "ffi/kernels/attention_rows.h"
#include "ffi/kernels/attention_tiles.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/soft_cap.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class FewQueriesKernels {
  using T = typename V::Scalar;
  using Rows = AttentionRows<V, E>;
  using Tiles = AttentionTiles<V, E>;
  static constexpr int kStep = V::kTransposeRows;
  static constexpr std::int64_t kKeys = AttentionLogits<V>::kKeys;
  // Rows that are computed side by side.
  static constexpr int kMaxTogether = 4;

  // How many sums of each of so many rows half of the registers hold, a power of two and at most `most`.
  static constexpr int SumsOfRow(int rows, int most) {
    int sums = 1;
    while (2 * sums <= most && 2 * sums * rows <= V::kRegisters / 2) sums *= 2;
    return sums;
  }

 public:
  // Of rows, as many as this at most.
  static constexpr std::int64_t kMaxRows = 8;

  // The elements that each head takes.
  static std::int64_t Scratch(const AttentionArgs<E>& args) {
    return kMaxRows * (Depth(args) + kKeys) + V::kLanes;
  }

  // What is kept of a row for a chunk of keys.
  static std::int64_t PartialSize(const AttentionArgs<E>& args) {
    return kState + RoundUp(args.value_size, V::kLanes);
  }

  static void AttendKeys(const AttentionArgs<E>* heads, std::int64_t count, std::int64_t begin,
                         std::int64_t end, T* partials, std::int64_t stride, T* scratch) {
    const AttentionArgs<E>& args = heads[0];
    const std::int64_t scratch_size = Scratch(args);
    const auto for_heads = [&](const auto& body) {
      for (std::int64_t k = 0; k < count; ++k) {
        body(FewQueriesKernels(heads[k], partials + k * stride, scratch + k * scratch_size));
      }
    };
    for_heads([](const FewQueriesKernels& head) { head.Start(); });
    const KeyRange keys = args.KeysOfRows(0, args.Rows());
    const std::int64_t first = begin > keys.begin ? begin : keys.begin,
                       last = end < keys.end ? end : keys.end;
    for (std::int64_t s = begin; s < last; s += kKeys) {
      const KeyRange tile{first > s ? first - s : 0, last - s < kKeys ? last - s : kKeys};
      if (tile.begin >= tile.end) continue;
      ForKeys(tile, V::kLanes, [&](KeyRange some) {
        for_heads([&](const FewQueriesKernels& head) { head.Logits(s, some); });
      });
      for_heads([&](const FewQueriesKernels& head) { head.Exponentials(s, tile); });
      ForKeys(tile, kValues, [&](KeyRange some) {
        for_heads([&](const FewQueriesKernels& head) { head.AddValues(s, some); });
      });
    }
  }

  static void Combine(const AttentionArgs<E>& args, T* partials, std::int64_t count) {
    const std::int64_t size = PartialSize(args), rows = args.Rows();
    for (std::int64_t r = 0; r < rows; ++r) {
      T* const into = partials + r * size;
      for (std::int64_t c = 1; c < count; ++c) Merge(into, partials + (c * rows + r) * size, size);
      Finish(args, r, into);
    }
  }

 private:
  // A partial result begins with these; the output that is not yet divided by the sum follows.
  enum { kReference, kShift, kLimit, kSum, kBest, kState };

  // Who attends to the keys of a tile.
  enum Attending { kNobody, kAll, kSome };

  // The values that a head takes before the next head.
  static constexpr std::int64_t kValues = 8;

  FewQueriesKernels(const AttentionArgs<E>& args, T* partial, T* scratch)
      : args_(args),
        rows_(args.Rows()),
        size_(PartialSize(args)),
        depth_(Depth(args)),
        partial_(partial),
        logits_(scratch),
        queries_(logits_ + kMaxRows * kKeys),
        attending_(queries_ + kMaxRows * depth_) {}

  static std::int64_t Depth(const AttentionArgs<E>& args) { return RoundUp(args.size, V::kLanes); }

  // Calls body for the keys of the range that lie between multiples of `step`.
  template <typename Body>
  static void ForKeys(KeyRange range, std::int64_t step, const Body& body) {
    for (std::int64_t j = range.begin / step * step; j < range.end; j += step) {
      body(KeyRange{j < range.begin ? range.begin : j, range.end < j + step ? range.end : j + step});
    }
  }

  void Start() const {
    Tiles::CopyRows(args_.query, args_.query_stride, args_.size, args_.heads, 0, rows_, rows_, queries_,
                    depth_);
    for (std::int64_t i = 0; i < rows_ * size_; ++i) partial_[i] = 0;
    for (std::int64_t r = 0; r < rows_; ++r) {
      partial_[r * size_ + kLimit] = partial_[r * size_ + kBest] = kMinusInfinity<V>;
    }
  }

  // The scaled logits of keys of one vector, for all rows. Those outside of the range are some others'.
  void Logits(std::int64_t s, KeyRange range) const {
    switch (rows_) {
      case 1:
        LogitsOfRows<1>(s, range, 0);
        break;
      case 2:
        LogitsOfRows<2>(s, range, 0);
        break;
      case 3:
        LogitsOfRows<3>(s, range, 0);
        break;
      default:
        for (std::int64_t r = 0; r + kMaxTogether < rows_; r += kMaxTogether) {
          LogitsOfRows<kMaxTogether>(s, range, r);
        }
        // Some rows may be computed twice.
        LogitsOfRows<kMaxTogether>(s, range, rows_ - kMaxTogether);
    }
    for (std::int64_t r = 0; args_.soft_cap != 0 && r < rows_; ++r) {
      T* const at = logits_ + r * kKeys + range.begin / V::kLanes * V::kLanes;
      jax_softmax2p::CapLogits<V, 1>(args_.soft_cap, at).z[0].Store(at);
    }
  }

  template <int rows>
  SOFTMAX2P_INLINE void LogitsOfRows(std::int64_t s, KeyRange range, std::int64_t row) const {
    constexpr int kTogether = SumsOfRow(rows, V::kLanes);
    const std::int64_t begin = range.begin / V::kLanes * V::kLanes;
    alignas(64) T products[rows * V::kLanes * V::kLanes];
    for (int i = 0; i < V::kLanes; i += kTogether) {
      const E* keys[kTogether];
      SOFTMAX2P_UNROLL for (int k = 0; k < kTogether; ++k) {
        const std::int64_t j = begin + i + k, last = range.end - 1;
        keys[k] = args_.key + (s + (j < range.begin ? range.begin : j > last ? last : j)) * args_.key_stride;
      }
      MultiplyKeys<rows, kTogether>(keys, queries_ + row * depth_, products + i * V::kLanes);
    }
    SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) {
      V logits = V::Broadcast(0);
      SOFTMAX2P_UNROLL for (int c = 0; c < V::kLanes; c += kStep) {
        V columns[kStep];
        V::LoadTransposed(products + r * V::kLanes * V::kLanes + c, V::kLanes, columns);
        SOFTMAX2P_UNROLL for (int k = 0; k < kStep; ++k) logits = logits + columns[k];
      }
      (logits * V::Broadcast(args_.scale)).Store(logits_ + (row + r) * kKeys + begin);
    }
  }

  // The products of keys and rows, each a vector whose lanes are still to be added up: products[rows][kLanes]
  // of them, of which the first `count` of each row are written.
  template <int rows, int count>
  SOFTMAX2P_INLINE void MultiplyKeys(const E* const (&keys)[count], const T* queries, T* products) const {
    V sums[rows][count];
    SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) {
      SOFTMAX2P_UNROLL for (int k = 0; k < count; ++k) sums[r][k] = V::Broadcast(0);
    }
    ForVectors<V>(static_cast<int>(args_.size), [&](int, int h, const auto& access) {
      V query[rows];
      SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) query[r] = V::Load(queries + r * depth_ + h);
      SOFTMAX2P_UNROLL for (int k = 0; k < count; ++k) {
        const V key = access.Load(keys[k] + h, 0);
        SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) sums[r][k] = Fma(query[r], key, sums[r][k]);
      }
    });
    SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) {
      SOFTMAX2P_UNROLL for (int k = 0; k < count; ++k) sums[r][k].Store(products +
                                                                        (r * V::kLanes + k) * V::kLanes);
    }
  }

  // Replaces the logits of a tile by their exponentials.
  void Exponentials(std::int64_t s, KeyRange range) const {
    const bool masked = ApplyOperands(s, range);
    bool any = false;
    for (std::int64_t r = 0; r < rows_; ++r) any = ExponentialsOfRow(r, range) || any;
    *attending_ = !any ? kNobody : masked ? kSome : kAll;
  }

  // Adds the biases and masks with -inf, what lies outside the range, too. Returns whether anything is masked
  // that is not so for all rows by the range.
  bool ApplyOperands(std::int64_t s, KeyRange range) const {
    const bool cut = args_.BandCuts(0, rows_, s, range);
    for (std::int64_t r = 0; r < rows_; ++r) {
      const std::int64_t t = r / args_.heads, g = r % args_.heads;
      T* const logits = logits_ + r * kKeys;
      T& best = partial_[r * size_ + kBest];
      for (std::int64_t j = 0; j < range.begin; ++j) logits[j] = kMinusInfinity<V>;
      for (std::int64_t j = range.end; j < kKeys; ++j) logits[j] = kMinusInfinity<V>;
      if (!cut && args_.bias.data == nullptr && args_.mask.data == nullptr) {
        best = 0;
        continue;
      }
      const auto at = [&](const auto& operand) {
        return operand.data + t * operand.query + g * operand.head + s * operand.key;
      };
      for (std::int64_t j = range.begin; j < range.end; ++j) {
        const bool outside = s + j < t - args_.before || s + j > t + args_.after;
        if (outside || (args_.mask.data != nullptr && at(args_.mask)[j * args_.mask.key] == 0)) {
          logits[j] = kMinusInfinity<V>;
          continue;
        }
        const T bias = args_.bias.data != nullptr ? at(args_.bias)[j * args_.bias.key] : T{0};
        logits[j] += bias;
        best = bias > best ? bias : best;
      }
    }
    return cut || args_.mask.data != nullptr;
  }

  // Replaces the logits of a row by their exponentials, and adds these to its sum. Returns whether it attends
  // to any key.
  bool ExponentialsOfRow(std::int64_t r, KeyRange range) const {
    T* const logits = logits_ + r * kKeys;
    T* const state = partial_ + r * size_;
    constexpr std::int64_t kGroup = kUnroll * V::kLanes > kKeys ? kKeys / V::kLanes : kUnroll;
    const std::int64_t end = RoundUp(range.end, kGroup * V::kLanes);
    V maximum = V::Broadcast(kMinusInfinity<V>);
    for (std::int64_t j = 0; j < end; j += V::kLanes) maximum = Max(V::Load(logits + j), maximum);
    const T largest = maximum.ReduceMax();
    T factor = 1;
    if (Rows::UpdateReferences(1, &largest, state + kReference, state + kShift, state + kLimit, &factor)) {
      state[kSum] *= factor;
      const V factors = V::Broadcast(factor);
      for (std::int64_t h = kState; h < size_; h += V::kLanes)
        (V::Load(state + h) * factors).Store(state + h);
    }
    const ExtExpKernel<V, 0> exp(V::Broadcast(state[kReference]));
    const V shift = V::Broadcast(state[kShift]);
    V sum = V::Broadcast(0);
    for (std::int64_t j = 0; j < end; j += kGroup * V::kLanes) {
      V x[kGroup];
      SOFTMAX2P_UNROLL for (int k = 0; k < kGroup; ++k) x[k] = V::Load(logits + j + k * V::kLanes) - shift;
      const ExtExp<V, kGroup> e = exp(x);
      SOFTMAX2P_UNROLL for (int k = 0; k < kGroup; ++k) {
        const V p = e.Value(k);
        p.Store(logits + j + k * V::kLanes);
        sum = sum + p;
      }
    }
    T lanes[V::kLanes], total = 0;
    sum.Store(lanes);
    for (int i = 0; i < V::kLanes; ++i) total += lanes[i];
    state[kSum] += total;
    return total != 0;
  }

  // Adds the products of exponentials and values. Where there are masks, an exponential of 0 takes no part,
  // so that a masked NaN harms nobody.
  void AddValues(std::int64_t s, KeyRange range) const {
    if (*attending_ == kNobody) return;
    std::int64_t r = 0;
    if (*attending_ == kAll) {
      for (; r + kMaxTogether <= rows_; r += kMaxTogether) AddRows<kMaxTogether, false>(s, range, r);
      for (; r + 2 <= rows_; r += 2) AddRows<2, false>(s, range, r);
      if (r < rows_) AddRows<1, false>(s, range, r);
      return;
    }
    for (; r < rows_; ++r) AddRows<1, true>(s, range, r);
  }

  template <int rows, bool masked>
  void AddRows(std::int64_t s, KeyRange range, std::int64_t row) const {
    constexpr int kWide = SumsOfRow(rows, 8);
    std::int64_t h = 0;
    for (; h + kWide * V::kLanes <= args_.value_size; h += kWide * V::kLanes) {
      AddColumns<rows, kWide, masked>(s, range, row, h, FullVector<V>{});
    }
    for (; h + 2 * V::kLanes <= args_.value_size; h += 2 * V::kLanes) {
      AddColumns<rows, 2, masked>(s, range, row, h, FullVector<V>{});
    }
    for (; h + V::kLanes <= args_.value_size; h += V::kLanes) {
      AddColumns<rows, 1, masked>(s, range, row, h, FullVector<V>{});
    }
    if (h < args_.value_size) {
      AddColumns<rows, 1, masked>(s, range, row, h, Tail<V>{static_cast<int>(args_.value_size - h)});
    }
  }

  template <int rows, int wide, bool masked, typename Access>
  SOFTMAX2P_INLINE void AddColumns(std::int64_t s, KeyRange range, std::int64_t row, std::int64_t h,
                                   const Access& access) const {
    const E* values = args_.value + (s + range.begin) * args_.value_stride + h;
    const T* const exponentials = logits_ + row * kKeys;
    T* const outputs = partial_ + row * size_ + kState + h;
    V sums[rows][wide];
    SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) {
      SOFTMAX2P_UNROLL for (int w = 0; w < wide; ++w) {
        sums[r][w] = V::Load(outputs + r * size_ + w * V::kLanes);
      }
    }
    for (std::int64_t j = range.begin; j < range.end; ++j, values += args_.value_stride) {
      if constexpr (masked) {
        if (exponentials[j] == 0) continue;
      }
      V value[wide];
      SOFTMAX2P_UNROLL for (int w = 0; w < wide; ++w) value[w] = access.Load(values + w * V::kLanes, 0);
      SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) {
        const V p = V::Broadcast(exponentials[r * kKeys + j]);
        SOFTMAX2P_UNROLL for (int w = 0; w < wide; ++w) sums[r][w] = Fma(p, value[w], sums[r][w]);
      }
    }
    SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) {
      SOFTMAX2P_UNROLL for (int w = 0; w < wide; ++w) {
        sums[r][w].Store(outputs + r * size_ + w * V::kLanes);
      }
    }
  }

  // Adds one row's partial result to another, relative to the larger of their references.
  static void Merge(T* into, T* from, std::int64_t size) {
    if (from[kBest] > into[kBest]) into[kBest] = from[kBest];
    T factors[2] = {1, 1};
    if (from[kLimit] > into[kLimit]) {
      factors[0] = Factor(into, from);
      for (int i = 0; i <= kLimit; ++i) into[i] = from[i];
    } else {
      factors[1] = Factor(from, into);
    }
    into[kSum] = into[kSum] * factors[0] + from[kSum] * factors[1];
    const V a = V::Broadcast(factors[0]), b = V::Broadcast(factors[1]);
    for (std::int64_t h = kState; h < size; h += V::kLanes) {
      Fma(V::Load(from + h), b, V::Load(into + h) * a).Store(into + h);
    }
  }

  // What a sum relative to one reference is multiplied by, to be one relative to another.
  static T Factor(const T* from, const T* to) {
    if (from[kLimit] == kMinusInfinity<V>) return 1;  // It is 0.
    return Rows::RescalingFactor(from[kReference], from[kShift], to[kReference], to[kShift]);
  }

  static void Finish(const AttentionArgs<E>& args, std::int64_t r, T* state) {
    T* const output = state + kState;
    DoubleDouble<T> lse;
    Rows::LseOf(1, state + kReference, state + kShift, state + kSum, &lse);
    for (std::int64_t h = 0; h < args.value_size; ++h) output[h] /= state[kSum];
    Rows::Write(args, r, state[kSum], state[kBest], lse, output, [&] {
      Rows::MeanOfValues(args, output);
      return output;
    });
  }

  const AttentionArgs<E>& args_;
  const std::int64_t rows_;
  const std::int64_t size_;
  const std::int64_t depth_;
  T* const partial_;
  T* const logits_;
  T* const queries_;
  T* const attending_;  // one of Attending
};

}  // namespace jax_softmax2p
