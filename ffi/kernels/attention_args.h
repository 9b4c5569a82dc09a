// The arrays of attention as its kernels see them: one example, one head of keys and values, and the heads of
// queries that share it.
#pragma once

#include <cstdint>

#include "ffi/base/half.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p {

// What jax.nn writes over masked logits, of any type: the lse of queries that attend to no key.
inline constexpr double kMaskedLogit = -0.7 * 3.4028234663852886e38;

// An array that broadcasts to the logits; data is null where there is none.
template <typename Element>
struct LogitsOperand {
  const Element* data = nullptr;
  std::int64_t query = 0;
  std::int64_t head = 0;
  std::int64_t key = 0;

  // The element for query t, head g and key s.
  SOFTMAX2P_INLINE const Element& At(std::int64_t t, std::int64_t g, std::int64_t s) const {
    return data[t * query + g * head + s * key];
  }
};

struct KeyRange {
  std::int64_t begin;
  std::int64_t end;
};

// What of T queries of G heads, and S keys, has no element type of theirs: sizes, masks, biases, sinks.
template <typename T>
struct AttentionShape {
  std::int64_t heads;       // G
  std::int64_t queries;     // T
  std::int64_t keys;        // S
  std::int64_t size;        // of a head
  std::int64_t value_size;  // of a head of values

  // The queries and keys that are not padding.
  std::int64_t query_length;
  std::int64_t key_length;
  // Query t attends to the keys from t - before to t + after.
  std::int64_t before;
  std::int64_t after;
  T scale;
  // Scaled logits z become soft_cap·tanh(z / soft_cap), before the bias; 0: they stay.
  T soft_cap;
  LogitsOperand<T> bias;
  LogitsOperand<std::uint8_t> mask;
  // Which weights, already divided by their sum, are kept; the others become 0.
  LogitsOperand<std::uint8_t> dropout_mask;
  // Of every head, a logit that takes part in the sum of exponentials alone, or null.
  const T* sinks;
  // Whether there is a mask of any kind, a band and lengths of keys included.
  bool masked;

  // Rows are the queries of all heads, those of one query side by side.
  SOFTMAX2P_INLINE std::int64_t Rows() const { return queries * heads; }

  SOFTMAX2P_INLINE bool HasDropout() const { return dropout_mask.data != nullptr; }

  // The keys that any of the rows from `begin` to `end` attends to, by the band and the lengths.
  SOFTMAX2P_INLINE KeyRange KeysOfRows(std::int64_t begin, std::int64_t end) const {
    const std::int64_t first = begin / heads, last = (end - 1) / heads;
    KeyRange range{first - before, last + after + 1};
    if (range.begin < 0) range.begin = 0;
    if (range.end > key_length) range.end = key_length;
    const bool none = first >= query_length || range.begin >= range.end;
    return none ? KeyRange{keys, 0} : range;
  }

  // Whether the band masks any of the keys s + range for any of the rows from `begin` to `end`.
  SOFTMAX2P_INLINE bool BandCuts(std::int64_t begin, std::int64_t end, std::int64_t s, KeyRange range) const {
    const std::int64_t first = begin / heads, last = (end - 1) / heads;
    return last - before > s + range.begin || first + after < s + range.end - 1;
  }
};

// The heads of all arrays lie side by side, (..., heads, size), and strides are those from one query, or one
// key, to the next.
template <typename E>
struct AttentionArgs : AttentionShape<ComputeOf<E>> {
  using T = ComputeOf<E>;
  const E* query;
  const E* key;
  const E* value;
  E* output;
  T* lse;
  std::int64_t query_stride;
  std::int64_t key_stride;
  std::int64_t value_stride;
  std::int64_t output_stride;
  std::int64_t lse_stride;
  // From one head to the next: 1, or 2 where every lse is two numbers, its rounding hi and the rest lo.
  std::int64_t lse_parts;
};

// The same, with the results `output` and `lse`, for the gradient. Gradients have the layouts of their
// arrays.
template <typename E>
struct AttentionGradientArgs : AttentionArgs<E> {
  using T = ComputeOf<E>;
  const E* cotangent;  // laid out as output
  E* query_gradient;
  E* key_gradient;
  E* value_gradient;
  // Null, or what the gradient of the bias is added to, laid out as the bias, whose keys do not broadcast.
  T* bias_gradient;
};

}  // namespace jax_softmax2p
