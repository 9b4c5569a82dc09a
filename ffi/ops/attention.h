// Attention of whole arrays, shared out among threads.
#pragma once

#include <cstdint>

#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/table.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// The strides of an array by example and by head of keys; 0 where it broadcasts.
struct UnitStrides {
  std::int64_t batch = 0;
  std::int64_t head = 0;
};

// Attention of `batch` examples with `key_heads` heads of keys and values each. `first` is that of the first
// example and head; its lengths are not read. Lengths are those of every example, or null.
template <typename E>
struct Attention {
  AttentionArgs<E> first;
  std::int64_t batch;
  std::int64_t key_heads;
  UnitStrides query, key, value, output, lse, bias, mask, dropout_mask, sinks;
  const std::int32_t* query_lengths = nullptr;
  const std::int32_t* key_lengths = nullptr;
};

// Query (B, T, N, H), key (B, S, K, H), value (B, S, K, H'), output (B, T, N, H') and lse (B, T, N, parts),
// with `parts` as in AttentionArgs.
struct AttentionSizes {
  std::int64_t batch, queries, keys, heads, key_heads, size, value_size;
  std::int64_t lse_parts = 1;
};

// Attention of such arrays, without operands. A negative limit of the band is none.
template <typename E>
Attention<E> ContiguousAttention(const AttentionSizes& s, const E* query, const E* key, const E* value,
                                 E* output, ComputeOf<E>* lse, ComputeOf<E> scale, std::int64_t before,
                                 std::int64_t after) {
  // No array has so many rows, and sums with it do not overflow.
  constexpr std::int64_t kNoLimit = std::int64_t{1} << 60;
  const auto limit = [](std::int64_t x) { return x < 0 || x > kNoLimit ? kNoLimit : x; };
  const std::int64_t group = s.heads / s.key_heads;
  Attention<E> attention{};
  attention.batch = s.batch;
  attention.key_heads = s.key_heads;
  AttentionArgs<E>& first = attention.first;
  first.query = query;
  first.key = key;
  first.value = value;
  first.output = output;
  first.lse = lse;
  first.query_stride = s.heads * s.size;
  first.key_stride = s.key_heads * s.size;
  first.value_stride = s.key_heads * s.value_size;
  first.output_stride = s.heads * s.value_size;
  first.lse_stride = s.heads * s.lse_parts;
  first.lse_parts = s.lse_parts;
  first.heads = group;
  first.queries = s.queries;
  first.keys = s.keys;
  first.size = s.size;
  first.value_size = s.value_size;
  first.before = limit(before);
  first.after = limit(after);
  first.scale = scale;
  first.masked = before >= 0 || after >= 0;
  attention.query = {s.queries * first.query_stride, group * s.size};
  attention.key = {s.keys * first.key_stride, s.size};
  attention.value = {s.keys * first.value_stride, s.value_size};
  attention.output = {s.queries * first.output_stride, group * s.value_size};
  attention.lse = {s.queries * first.lse_stride, group * s.lse_parts};
  return attention;
}

// The arrays of the gradient beside those of `attention`, whose results are arguments here. Gradients are
// laid out as their arrays, of which none but the bias broadcasts.
template <typename E>
struct AttentionGradient {
  Attention<E> attention;
  const E* cotangent;
  E* query_gradient;
  E* key_gradient;
  E* value_gradient;
  // Null, or the gradient of the bias, in its shape, of so many elements. Its keys must not broadcast.
  ComputeOf<E>* bias_gradient = nullptr;
  std::int64_t bias_elements = 0;
};

// Output and lse of all queries. A query that attends to no key attends to all keys alike, and one beyond its
// length gives 0; their lse is kMaskedLogit. Sinks come after that. The bits of a query do not depend on the
// number of threads.
template <typename E>
void Attend(const KernelTable<E>& kernels, Executor& executor, const Attention<E>& attention);

// The gradient in queries, keys and values, and in the bias where that is wanted. Its bits do not depend on
// the number of threads, either.
template <typename E>
void AttendGradient(const KernelTable<E>& kernels, Executor& executor, const AttentionGradient<E>& gradient);

}  // namespace jax_softmax2p
