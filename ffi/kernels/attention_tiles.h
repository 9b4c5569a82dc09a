// What goes into the tiles of attention.h and attention_gradient.h: rows, packed keys, copied values, masks
// and biases.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/gemm.h"

namespace jax_softmax2p {

struct KeyRange {
  std::int64_t begin;
  std::int64_t end;
};

// A tile of logits [keys][width], with room for its biases and its mask.
template <typename T>
struct LogitsTile {
  T* logits;
  T* bias;
  std::uint8_t* mask;
  std::int64_t width;
};

// Buffers in scratch memory, each of which begins at a cache line. The memory itself need not.
template <typename T, int count>
class ScratchBuffers {
 public:
  SOFTMAX2P_INLINE std::int64_t total() const { return total_; }
  SOFTMAX2P_INLINE T* At(T* aligned_scratch, int i) const { return aligned_scratch + at_[i]; }

  static SOFTMAX2P_INLINE T* Aligned(T* scratch) { return scratch + ElementsToAlignment<kAlign>(scratch); }

 protected:
  // `sizes` are in elements.
  SOFTMAX2P_INLINE void Allot(const std::int64_t (&sizes)[count]) {
    for (int i = 0; i < count; ++i) {
      at_[i] = total_ - kAlign;
      total_ += RoundUp(sizes[i], kAlign);
    }
  }

 private:
  static constexpr int kAlign = 64 / sizeof(T);
  std::int64_t at_[count];
  std::int64_t total_ = kAlign;
};

template <typename V, typename E>
class AttentionTiles {
  using T = typename V::Scalar;
  using Product = Gemm<V>;

 public:
  static constexpr std::int64_t kKeys = 64;

  // The sizes of buffers, in elements.
  static std::int64_t KeyElements(std::int64_t depth) { return kKeys * depth; }
  static std::int64_t ValueElements(std::int64_t size) { return kKeys * ValueStride(size); }
  static std::int64_t RowElements(std::int64_t depth, std::int64_t value_rows) {
    const std::int64_t rows = Product::kColumns * (depth > value_rows ? depth : value_rows);
    return rows > kKeys * depth ? rows : kKeys * depth;
  }
  // An odd number of cache lines: rows that are a power of two apart would share a few sets.
  static SOFTMAX2P_INLINE std::int64_t ValueStride(std::int64_t size) {
    constexpr std::int64_t kLine = 64 / sizeof(T);
    return (CeilDiv(RoundUp(size, Product::kRows), kLine) | 1) * kLine;
  }

  // The keys that any of the rows attends to, by the band and the lengths.
  static KeyRange KeysOfRows(const AttentionArgs<E>& args, std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin / args.heads, last = (end - 1) / args.heads;
    KeyRange keys{first - args.before, last + args.after + 1};
    if (keys.begin < 0) keys.begin = 0;
    if (keys.end > args.key_length) keys.end = args.key_length;
    const bool none = first >= args.query_length || keys.begin >= keys.end;
    return none ? KeyRange{args.keys, 0} : keys;
  }

  // Whether the band masks any of the keys s + range for any of the rows.
  static bool BandCuts(const AttentionArgs<E>& args, std::int64_t begin, std::int64_t end, std::int64_t s,
                       KeyRange range) {
    const std::int64_t first = begin / args.heads, last = (end - 1) / args.heads;
    return last - args.before > s + range.begin || first + args.after < s + range.end - 1;
  }

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

  // Copies `count` keys or values for products across them, with zeros after them, and returns whether all
  // are finite.
  static bool Copy(const E* x, std::int64_t stride, std::int64_t size, std::int64_t count, T* to) {
    const std::int64_t to_stride = ValueStride(size), padded = RoundUp(size, Product::kRows);
    V check = V::Broadcast(0);
    for (std::int64_t j = 0; j < count; ++j) {
      check = check + CopyRow(x + j * stride, size, to + j * to_stride, padded);
    }
    for (std::int64_t i = count * to_stride; i < RoundUp(count, kUnroll) * to_stride; ++i) to[i] = 0;
    T lanes[V::kLanes];
    check.Store(lanes);
    bool finite = true;
    for (int i = 0; i < V::kLanes; ++i) finite = finite && lanes[i] == 0;
    return finite;
  }

  // Adds the bias to a tile of logits, and masks it with -inf. Finds the maxima of the rows, and of the
  // biases of the keys that they attend to.
  template <int vectors>
  static void ApplyOperands(const AttentionArgs<E>& args, std::int64_t row, std::int64_t rows, std::int64_t s,
                            KeyRange range, bool cut, const LogitsTile<T>& tile, T* best,
                            V (&maxima)[vectors]) {
    const bool biased = args.bias.data != nullptr;
    const bool masked = cut || args.mask.data != nullptr;
    if (biased) {
      const std::int64_t filled = TransposeBias(args, row, rows, s, range, tile);
      FillFrom(args.bias, args.heads, row, rows, s, range, T{0}, tile.width, tile.bias, filled);
    }
    if (masked && args.heads == 1 && args.mask.data == nullptr) {
      const BandMask mask{row - args.before - s, row + args.after - s};
      return biased ? Apply<vectors, true, true>(range, tile, mask, best, maxima)
                    : Apply<vectors, false, true>(range, tile, mask, best, maxima);
    }
    const TileMask mask{tile.mask, tile.width};
    if (masked) {
      FillFrom(args.mask, args.heads, row, rows, s, range, std::uint8_t{1}, tile.width, tile.mask);
      if (cut) FillBand(args, row, rows, s, range, tile);
    }
    if (!masked) return Apply<vectors, true, false>(range, tile, mask, best, maxima);
    biased ? Apply<vectors, true, true>(range, tile, mask, best, maxima)
           : Apply<vectors, false, true>(range, tile, mask, best, maxima);
  }

  // Replaces elements of the copied keys or values that are not finite by 0, and adds their products with the
  // factors that are not 0: a masked NaN harms nobody.
  template <int vectors>
  static void TakeNonFinite(T* copied, std::int64_t size, KeyRange range, const T* factors, T* output) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const std::int64_t stride = ValueStride(size);
    for (std::int64_t j = range.begin; j < range.end; ++j) {
      for (std::int64_t h = 0; h < size; ++h) {
        T& value = copied[j * stride + h];
        if (value - value == 0) continue;
        for (std::int64_t i = 0; i < kWidth; ++i) {
          if (factors[j * kWidth + i] != 0) output[h * kWidth + i] += factors[j * kWidth + i] * value;
        }
        value = 0;
      }
    }
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

  // How a tile is masked: the lanes from `lane` on, of the keys j, where the mask is False become `other`.
  struct TileMask {
    const std::uint8_t* mask;
    std::int64_t width;
    SOFTMAX2P_INLINE V Apply(V x, V other, std::int64_t j, std::int64_t lane) const {
      return V::Where(mask + j * width + lane, x, other);
    }
  };
  // The first row attends to the keys from `first` to `last` of the tile, and each other row to those one
  // later.
  struct BandMask {
    std::int64_t first;
    std::int64_t last;
    SOFTMAX2P_INLINE V Apply(V x, V other, std::int64_t j, std::int64_t lane) const {
      constexpr std::int64_t kWidth = Product::kColumns;
      // Lanes before the first, and after the last of these, are masked.
      std::int64_t begin = j - last, end = j - first + 1;
      begin = begin < 0 ? 0 : begin > kWidth ? kWidth : begin;
      end = end < 0 ? 0 : end > kWidth ? kWidth : end;
      x = V::Where(kSteps.up + kWidth - begin + lane, x, other);
      return V::Where(kSteps.down + kWidth - end + lane, x, other);
    }
  };
  // Zeros and then ones, and ones and then zeros.
  struct Steps {
    constexpr Steps() : up(), down() {
      for (int i = 0; i < Product::kColumns; ++i) up[Product::kColumns + i] = down[i] = 1;
    }
    std::uint8_t up[2 * Product::kColumns];
    std::uint8_t down[2 * Product::kColumns];
  };
  static constexpr Steps kSteps{};

  // Fills the biases of whole vectors of rows, where those are evenly spaced. Returns for how many rows it
  // has.
  static std::int64_t TransposeBias(const AttentionArgs<E>& args, std::int64_t row, std::int64_t rows,
                                    std::int64_t s, KeyRange range, const LogitsTile<T>& tile) {
    constexpr int kStep = V::kTransposeRows;
    if (args.heads != 1 || args.bias.key != 1 || args.bias.query == 0) return 0;
    const std::int64_t whole = rows / V::kLanes * V::kLanes;
    for (std::int64_t i = 0; i < whole; i += V::kLanes) {
      const T* const from = args.bias.data + (row + i) * args.bias.query + s;
      std::int64_t j = range.begin;
      for (; j + kStep <= range.end; j += kStep) {
        V transposed[kStep];
        V::LoadTransposed(from + j, args.bias.query, transposed);
        SOFTMAX2P_UNROLL for (int k = 0; k < kStep; ++k) {
          transposed[k].Store(tile.bias + (j + k) * tile.width + i);
        }
      }
      for (; j < range.end; ++j) {
        for (int l = 0; l < V::kLanes; ++l) tile.bias[j * tile.width + i + l] = from[l * args.bias.query + j];
      }
    }
    return whole;
  }

  // The elements of an operand that belong to a tile, but for the rows that are filled, or `fill` for all
  // where there is no operand.
  template <typename Element>
  static void FillFrom(const LogitsOperand<Element>& operand, std::int64_t heads, std::int64_t row,
                       std::int64_t rows, std::int64_t s, KeyRange range, Element fill, std::int64_t width,
                       Element* to, std::int64_t filled = 0) {
    if (operand.data == nullptr || (operand.query == 0 && (heads == 1 || operand.head == 0))) {
      for (std::int64_t j = range.begin; j < range.end; ++j) {
        const Element x = operand.data == nullptr ? fill : operand.data[(s + j) * operand.key];
        for (std::int64_t i = 0; i < width; ++i) to[j * width + i] = x;
      }
      return;
    }
    for (std::int64_t i = filled; i < width; ++i) {
      const std::int64_t r = row + (i < rows ? i : rows - 1);
      const Element* const from =
          operand.data + r / heads * operand.query + r % heads * operand.head + s * operand.key;
      for (std::int64_t j = range.begin; j < range.end; ++j) to[j * width + i] = from[j * operand.key];
    }
  }

  // Masks what lies outside the band.
  static void FillBand(const AttentionArgs<E>& args, std::int64_t row, std::int64_t rows, std::int64_t s,
                       KeyRange range, const LogitsTile<T>& tile) {
    std::int32_t first[Product::kColumns], last[Product::kColumns];
    const auto in_tile = [](std::int64_t key) {
      return static_cast<std::int32_t>(key < -1 ? -1 : key > kKeys ? kKeys : key);
    };
    for (std::int64_t i = 0; i < tile.width; ++i) {
      const std::int64_t t = (row + (i < rows ? i : rows - 1)) / args.heads;
      first[i] = in_tile(t - args.before - s);
      last[i] = in_tile(t + args.after - s);
    }
    for (std::int64_t j = range.begin; j < range.end; ++j) {
      std::uint8_t* const mask = tile.mask + j * tile.width;
      for (std::int64_t i = 0; i < tile.width; ++i) {
        mask[i] = mask[i] != 0 && j >= first[i] && j <= last[i];
      }
    }
  }

  template <int vectors, bool biased, bool masked, typename Mask>
  static SOFTMAX2P_INLINE void Apply(KeyRange range, const LogitsTile<T>& tile, const Mask& mask, T* best,
                                     V (&maxima)[vectors]) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const V nothing = V::Broadcast(kMinusInfinity<V>);
    V largest[vectors];
    SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
      maxima[v] = nothing;
      largest[v] = V::Load(best + v * V::kLanes);
    }
    for (std::int64_t j = range.begin; j < range.end; ++j) {
      SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
        const std::int64_t at = j * kWidth + v * V::kLanes;
        V logit = V::Load(tile.logits + at), bias = V::Broadcast(0);
        if constexpr (biased) {
          bias = V::Load(tile.bias + at);
          logit = logit + bias;
        }
        if constexpr (masked) {
          logit = mask.Apply(logit, nothing, j, v * V::kLanes);
          bias = mask.Apply(bias, nothing, j, v * V::kLanes);
        }
        logit.Store(tile.logits + at);
        maxima[v] = Max(logit, maxima[v]);
        largest[v] = Max(bias, largest[v]);
      }
    }
    SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) largest[v].Store(best + v * V::kLanes);
  }
};

}  // namespace jax_softmax2p
