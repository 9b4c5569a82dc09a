// What goes into the tiles of attention.h and attention_gradient.h, from arrays of E: rows, packed keys and
// copied values.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_logits.h"
#include "ffi/kernels/gemm.h"

namespace jax_softmax2p {

template <typename V, typename E>
class AttentionTiles {
  using T = typename V::Scalar;
  using Product = Gemm<V>;
  static constexpr std::int64_t kKeys = AttentionLogits<V>::kKeys;

 public:
  // Fetches rows into the second-level cache: those of one head are too far apart for the CPU to foresee
  // them. Without it a sixth of the time went into waiting for keys and values, (3, 1000, 12, 64) on a Zen 4.
  template <bool for_write = false>
  static void Prefetch(const E* x, std::int64_t stride, std::int64_t size, std::int64_t count) {
    constexpr std::int64_t kLine = 64 / sizeof(E);
    for (std::int64_t j = 0; j < count; ++j) {
      for (std::int64_t h = 0; h < size; h += kLine) {
        __builtin_prefetch(x + j * stride + h, for_write ? 1 : 0, 2);
      }
    }
  }
  // Keys and values from s on, a tile of them, or up to `end`.
  static void PrefetchKeys(const AttentionArgs<E>& args, std::int64_t s, std::int64_t end) {
    const std::int64_t count = end - s < kKeys ? end - s : kKeys;
    Prefetch(args.key + s * args.key_stride, args.key_stride, args.size, count);
    Prefetch(args.value + s * args.value_stride, args.value_stride, args.value_size, count);
  }
  // Queries of the rows from `row` on, or another array of their layout, up to `end`.
  template <bool for_write = false>
  static void PrefetchRows(const AttentionArgs<E>& args, const E* x, std::int64_t stride, std::int64_t size,
                           std::int64_t row, std::int64_t end) {
    const std::int64_t most = row + Product::kColumns, last = most < end ? most : end;
    const std::int64_t first = row / args.heads;
    if (row >= last) return;
    Prefetch<for_write>(x + first * stride, stride, args.heads * size, (last - 1) / args.heads + 1 - first);
  }

  // Rows of an array of queries, contiguous, with zeros up to `columns` and `depth`.
  static void CopyRows(const E* x, std::int64_t stride, std::int64_t size, std::int64_t heads,
                       std::int64_t row, std::int64_t rows, std::int64_t columns, T* to, std::int64_t depth) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t t = (row + i) / heads, g = (row + i) % heads;
      CopyRow(x + t * stride + g * size, size, to + i * depth, depth);
    }
    for (std::int64_t i = rows * depth; i < columns * depth; ++i) to[i] = 0;
  }

  // Packs `count` keys for products along them, with zeros after them.
  static void Pack(const E* x, std::int64_t stride, std::int64_t size, std::int64_t count, std::int64_t depth,
                   T* rows, T* packed) {
    std::int64_t direct = 0;
    if constexpr (std::is_same_v<E, T>) {
      // Keys that need neither conversion nor padding are packed from where they lie.
      if (size == depth) direct = count / Product::kPackedRows * Product::kPackedRows;
      Product::Pack(x, stride, direct, depth, Product::kPackedRows, packed);
    }
    const std::int64_t left = count - direct, padded = RoundUp(left, Product::kPackedRows);
    for (std::int64_t j = 0; j < left; ++j) {
      CopyRow(x + (direct + j) * stride, size, rows + j * depth, depth);
    }
    for (std::int64_t i = left * depth; i < padded * depth; ++i) rows[i] = 0;
    Product::Pack(rows, depth, padded, depth, Product::kPackedRows, packed + direct * depth);
  }

  // Copies `count` keys or values for products across them, and returns whether all are finite.
  static bool Copy(const E* x, std::int64_t stride, std::int64_t size, std::int64_t count, T* to) {
    const std::int64_t to_stride = AttentionLogits<V>::CopiedStride(size),
                       padded = RoundUp(size, Product::kRows);
    V check = V::Broadcast(0);
    for (std::int64_t j = 0; j < count; ++j) {
      check = check + CopyRow(x + j * stride, size, to + j * to_stride, padded);
    }
    T lanes[V::kLanes];
    check.Store(lanes);
    bool finite = true;
    for (int i = 0; i < V::kLanes; ++i) finite = finite && lanes[i] == 0;
    return finite;
  }

 private:
  // Copies n elements and appends zeros up to `padded`. Returns 0, or NaN in a lane with an element that is
  // not finite.
  static SOFTMAX2P_INLINE V CopyRow(const E* from, std::int64_t n, T* to, std::int64_t padded) {
    V check = V::Broadcast(0);
    std::int64_t h = 0;
    for (; h + V::kLanes <= n; h += V::kLanes) {
      const V x = V::Load(from + h);
      check = check + (x - x);
      x.Store(to + h);
    }
    if (h < n) {
      const int rest = static_cast<int>(n - h);
      const V x = V::LoadPartial(from + h, rest, 0);
      check = check + (x - x);
      x.StorePartial(to + h, rest);
    }
    for (h = n; h < padded; ++h) to[h] = 0;
    return check;
  }
};

}  // namespace jax_softmax2p
