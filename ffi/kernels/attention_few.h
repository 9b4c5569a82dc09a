// Attention of few queries to many keys, as in decoding, where reading keys and values takes the time.
//
// Keys and values are read once, in their own type, for all rows (queries of all heads that share them). The
// keys are cut into chunks, whose results combine: a sum of exponentials relative to a reference is a monoid.
// The logits of a vector of keys are computed side by side, the output along the values.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_tiles.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/soft_cap.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class FewQueriesKernels {
  using T = typename V::Scalar;
  using Tiles = AttentionTiles<V, E>;
  static constexpr int kStep = V::kTransposeRows;
  static constexpr std::int64_t kKeys = Tiles::kKeys;
  // Vectors of values that are summed at a time.
  static constexpr int kWide = 4;

 public:
  // Of rows, as many as this at most.
  static constexpr std::int64_t kMaxRows = 8;

  static std::int64_t Scratch(const AttentionArgs<E>& args) {
    return kMaxRows * Depth(args) + kMaxRows * kKeys + V::kLanes * Depth(args);
  }

  // What is kept of a row for a chunk of keys.
  static std::int64_t PartialSize(const AttentionArgs<E>& args) {
    return kState + RoundUp(args.value_size, V::kLanes);
  }

  static void AttendKeys(const AttentionArgs<E>& args, std::int64_t begin, std::int64_t end, bool resume,
                         T* partial, T* scratch) {
    FewQueriesKernels kernel(args, partial, scratch);
    if (!resume) kernel.Start();
    const KeyRange keys = Tiles::KeysOfRows(args, 0, args.Rows());
    const std::int64_t first = begin > keys.begin ? begin : keys.begin,
                       last = end < keys.end ? end : keys.end;
    for (std::int64_t s = begin; s < last; s += kKeys) {
      const KeyRange range{first > s ? first - s : 0, last - s < kKeys ? last - s : kKeys};
      if (range.begin >= range.end) continue;
      kernel.AddTile(s, range);
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

  FewQueriesKernels(const AttentionArgs<E>& args, T* partial, T* scratch)
      : args_(args),
        rows_(args.Rows()),
        size_(PartialSize(args)),
        depth_(Depth(args)),
        partial_(partial),
        queries_(scratch),
        logits_(queries_ + kMaxRows * depth_),
        keys_(logits_ + kMaxRows * kKeys) {}

  static std::int64_t Depth(const AttentionArgs<E>& args) { return RoundUp(args.size, kStep); }

  void Start() {
    Tiles::CopyRows(args_.query, args_.query_stride, args_.size, args_.heads, 0, rows_, rows_, queries_,
                    depth_);
    for (std::int64_t i = 0; i < rows_ * size_; ++i) partial_[i] = 0;
    for (std::int64_t r = 0; r < rows_; ++r) {
      partial_[r * size_ + kLimit] = partial_[r * size_ + kBest] = kMinusInfinity<V>;
    }
  }

  // Adds the keys s + range.
  void AddTile(std::int64_t s, KeyRange range) {
    for (std::int64_t j = range.begin / V::kLanes * V::kLanes; j < range.end; j += V::kLanes) {
      const KeyRange all{j < range.begin ? range.begin : j,
                         range.end < j + V::kLanes ? range.end : j + V::kLanes};
      const E* const keys = Transposable(s, j, all);
      if (keys != nullptr) {
        Logits(keys, args_.key_stride, j);
      } else {
        LogitsOfCopy(j);
      }
      for (std::int64_t r = 0; args_.soft_cap != 0 && r < rows_; ++r) {
        T* const at = logits_ + r * kKeys + j;
        jax_softmax2p::CapLogits<V, 1>(args_.soft_cap, at).z[0].Store(at);
      }
    }
    const bool masked = ApplyOperands(s, range);
    bool any = false;
    for (std::int64_t r = 0; r < rows_; ++r) any = Exponentials(r, range) || any;
    // Nobody attends to what is masked for all.
    if (!any) return;
    AddValues(s, range, masked);
  }

  // The keys of a vector where they can be transposed as they lie there, or null and a copy of them.
  SOFTMAX2P_INLINE const E* Transposable(std::int64_t s, std::int64_t j, KeyRange range) {
    if constexpr (std::is_same_v<E, T>) {
      if (range.end - range.begin == V::kLanes && args_.size == depth_) {
        return args_.key + (s + j) * args_.key_stride;
      }
    }
    const bool partial = range.end - range.begin < V::kLanes || args_.size != depth_;
    for (std::int64_t i = 0; partial && i < V::kLanes * depth_; ++i) keys_[i] = 0;
    for (std::int64_t i = range.begin; i < range.end; ++i) {
      T* const to = keys_ + (i - j) * depth_;
      const E* const from = args_.key + (s + i) * args_.key_stride;
      ForVectors<V>(static_cast<int>(args_.size),
                    [&](int, int h, const auto& access) { access.Store(access.Load(from + h, 0), to + h); });
    }
    return nullptr;
  }

  SOFTMAX2P_INLINE void LogitsOfCopy(std::int64_t j) { LogitsOf(keys_, depth_, j); }
  SOFTMAX2P_INLINE void Logits(const E* keys, std::int64_t stride, std::int64_t j) {
    if constexpr (std::is_same_v<E, T>) LogitsOf(keys, stride, j);
  }

  // The scaled logits of a vector of keys for all rows.
  void LogitsOf(const T* keys, std::int64_t stride, std::int64_t j) {
    switch (rows_) {
      case 1:
        return LogitsOfRows<1>(keys, stride, 0, j);
      case 2:
        return LogitsOfRows<2>(keys, stride, 0, j);
      case 3:
        return LogitsOfRows<3>(keys, stride, 0, j);
      case 4:
        return LogitsOfRows<4>(keys, stride, 0, j);
      default:
        LogitsOfRows<4>(keys, stride, 0, j);
        // Some rows may be computed twice.
        LogitsOfRows<4>(keys, stride, rows_ - 4, j);
    }
  }

  template <int rows>
  SOFTMAX2P_INLINE void LogitsOfRows(const T* keys, std::int64_t stride, std::int64_t row, std::int64_t j) {
    V sums[rows][2];
    SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = V::Broadcast(0);
    for (std::int64_t d = 0; d < depth_; d += kStep) {
      V columns[kStep];
      V::LoadTransposed(keys + d, stride, columns);
      SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) {
        const T* const query = queries_ + (row + r) * depth_ + d;
        SOFTMAX2P_UNROLL for (int c = 0; c < kStep; ++c) {
          sums[r][c % 2] = Fma(columns[c], V::Broadcast(query[c]), sums[r][c % 2]);
        }
      }
    }
    SOFTMAX2P_UNROLL for (int r = 0; r < rows; ++r) {
      ((sums[r][0] + sums[r][1]) * V::Broadcast(args_.scale)).Store(logits_ + (row + r) * kKeys + j);
    }
  }

  // Adds the biases and masks with -inf, what lies outside the range, too. Returns whether anything is masked
  // that is not so for all rows by the range.
  bool ApplyOperands(std::int64_t s, KeyRange range) {
    const bool cut = Tiles::BandCuts(args_, 0, rows_, s, range);
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
  bool Exponentials(std::int64_t r, KeyRange range) {
    T* const logits = logits_ + r * kKeys;
    T* const state = partial_ + r * size_;
    constexpr std::int64_t kGroup = kUnroll * V::kLanes > kKeys ? kKeys / V::kLanes : kUnroll;
    const std::int64_t end = RoundUp(range.end, kGroup * V::kLanes);
    V maximum = V::Broadcast(kMinusInfinity<V>);
    for (std::int64_t j = 0; j < end; j += V::kLanes) maximum = Max(V::Load(logits + j), maximum);
    const T largest = maximum.ReduceMax();
    T factor = 1;
    if (Tiles::RaiseReferences(1, &largest, state + kReference, state + kShift, state + kLimit, &factor)) {
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
  void AddValues(std::int64_t s, KeyRange range, bool masked) {
    std::int64_t h = 0;
    for (; h + kWide * V::kLanes <= args_.value_size; h += kWide * V::kLanes) {
      AddColumns<kWide>(s, range, masked, h, FullVector<V>{});
    }
    for (; h + V::kLanes <= args_.value_size; h += V::kLanes) {
      AddColumns<1>(s, range, masked, h, FullVector<V>{});
    }
    if (h < args_.value_size) {
      AddColumns<1>(s, range, masked, h, Tail<V>{static_cast<int>(args_.value_size - h)});
    }
  }

  template <int wide, typename Access>
  SOFTMAX2P_INLINE void AddColumns(std::int64_t s, KeyRange range, bool masked, std::int64_t h,
                                   const Access& access) {
    std::int64_t r = 0;
    if (!masked) {
      for (; r + 4 <= rows_; r += 4) AddRows<4, wide, false>(s, range, r, h, access);
      for (; r + 2 <= rows_; r += 2) AddRows<2, wide, false>(s, range, r, h, access);
      if (r < rows_) AddRows<1, wide, false>(s, range, r, h, access);
      return;
    }
    for (; r < rows_; ++r) AddRows<1, wide, true>(s, range, r, h, access);
  }

  template <int rows, int wide, bool masked, typename Access>
  SOFTMAX2P_INLINE void AddRows(std::int64_t s, KeyRange range, std::int64_t row, std::int64_t h,
                                const Access& access) {
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
    const T power = from[kReference] - to[kReference];
    if (from[kShift] == to[kShift]) return std::ldexp(T{1}, static_cast<int>(power));
    const double shift = static_cast<double>(from[kShift]) - to[kShift];
    return static_cast<T>(std::exp(shift + power * Format<T>::kLn2));
  }

  static void Finish(const AttentionArgs<E>& args, std::int64_t r, T* state) {
    T* const output = state + kState;
    T lse;
    Tiles::LseOf(1, state + kReference, state + kShift, state + kSum, &lse);
    if (r / args.heads >= args.query_length) {
      for (std::int64_t h = 0; h < args.value_size; ++h) output[h] = 0;
      lse = static_cast<T>(kMaskedLogit);
    } else if (args.masked && !(state[kBest] > static_cast<T>(kMaskedLogit)) && state[kSum] == state[kSum]) {
      Tiles::MeanOfValues(args, output);
      lse = static_cast<T>(kMaskedLogit);
    } else {
      for (std::int64_t h = 0; h < args.value_size; ++h) output[h] /= state[kSum];
    }
    Tiles::WriteRow(args, r, output, lse);
  }

  const AttentionArgs<E>& args_;
  const std::int64_t rows_;
  const std::int64_t size_;
  const std::int64_t depth_;
  T* const partial_;
  T* const queries_;
  T* const logits_;
  T* const keys_;
};

}  // namespace jax_softmax2p
