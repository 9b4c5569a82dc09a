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
  UnitStrides query, key, value, output, lse, bias, mask;
  const std::int32_t* query_lengths = nullptr;
  const std::int32_t* key_lengths = nullptr;
};

// The arrays of the gradient beside those of `attention`, whose results are arguments here. Gradients are
// laid out as their arrays, none of which broadcasts.
template <typename E>
struct AttentionGradient {
  Attention<E> attention;
  const E* cotangent;
  E* query_gradient;
  E* key_gradient;
  E* value_gradient;
};

// Output and lse of all queries. A query that attends to no key attends to all keys alike, and one beyond its
// length gives 0; their lse is kMaskedLogit. The bits of a query do not depend on the number of threads.
template <typename E>
void Attend(const KernelTable<E>& kernels, Executor& executor, const Attention<E>& attention);

// The gradient in queries, keys and values. Its bits do not depend on the number of threads, either.
template <typename E>
void AttendGradient(const KernelTable<E>& kernels, Executor& executor, const AttentionGradient<E>& gradient);

}  // namespace jax_softmax2p
