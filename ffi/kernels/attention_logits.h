// Tiles of the logits of attention: the products of which they are made, their biases and masks. Nothing here
// depends on the type of queries, keys and values, which are packed and copied as T.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/gemm.h"
#include "ffi/kernels/soft_cap.h"

namespace jax_softmax2p {

// A tile of logits [keys][width], with room for its biases and for one mask at a time.
template <typename T>
struct LogitsTile {
  T* logits;
  T* bias;
  std::uint8_t* mask;
  std::int64_t width;
};

template <typename V>
class AttentionLogits {
  using T = typename V::Scalar;
  using Product = Gemm<V>;

 public:
  // Of a tile, at most.
  static constexpr std::int64_t kKeys = 64;

  // An odd number of cache lines between copied keys or values: rows that are a power of two apart would
  // share a few sets.
  static SOFTMAX2P_INLINE std::int64_t CopiedStride(std::int64_t size) {
    constexpr std::int64_t kLine = 64 / sizeof(T);
    return (CeilDiv(RoundUp(size, Product::kRows), kLine) | 1) * kLine;
  }

  // Of the tile of `count` keys from s on, those from `keys`, with the ones before them in a tile of kRows.
  static SOFTMAX2P_INLINE KeyRange RangeInTile(KeyRange keys, std::int64_t s, std::int64_t count) {
    const std::int64_t first = keys.begin - s, last = keys.end - s;
    return {first <= 0 ? 0 : first / Product::kRows * Product::kRows, last < count ? last : count};
  }

  // to[keys][rows] = factor·A·B, for packed A and a panel B, and `fill` beyond the range, up to a multiple of
  // kRows. Calls visit(products, vector) for every vector of them.
  template <int vectors, typename Visit>
  static SOFTMAX2P_INLINE void Multiply(const T* a, const T* b, std::int64_t depth, T factor, T fill,
                                        KeyRange range, T* to, const Visit& visit) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const V factors = V::Broadcast(factor);
    for (std::int64_t j = range.begin; j < range.end; j += Product::kRows) {
      typename Product::template Tile<vectors> tile;
      tile.Clear();
      tile.AddProduct(Product::PackedTile(a, j, depth), Product::kPackedRows, b, depth);
      const std::int64_t count = range.end - j;
      SOFTMAX2P_UNROLL for (int i = 0; i < Product::kRows; ++i) {
        SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
          const V x = i < count ? tile.c[i][v] * factors : V::Broadcast(fill);
          x.Store(to + (j + i) * kWidth + v * V::kLanes);
          visit(x, v);
        }
      }
    }
  }

  // Applies the soft cap to a tile of logits. Calls visit(capped logits, where they lie) for every key.
  template <int vectors, typename Visit>
  static SOFTMAX2P_INLINE void Cap(T soft_cap, KeyRange range, T* logits, const Visit& visit) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    for (std::int64_t at = range.begin * kWidth; at < range.end * kWidth; at += kWidth) {
      const auto capped = CapLogits<V, vectors>(soft_cap, logits + at);
      SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) capped.z[v].Store(logits + at + v * V::kLanes);
      visit(capped, at);
    }
  }

  // Adds the bias to a tile of logits, and masks it with -inf. Finds the maxima of the rows, and of the
  // biases of the keys that they attend to.
  template <int vectors>
  static void ApplyOperands(const AttentionShape<T>& shape, std::int64_t row, std::int64_t rows,
                            std::int64_t s, KeyRange range, bool cut, const LogitsTile<T>& tile, T* best,
                            V (&maxima)[vectors]) {
    const bool biased = shape.bias.data != nullptr;
    const bool masked = cut || shape.mask.data != nullptr;
    if (biased) {
      const std::int64_t filled = TransposeBias(shape, row, rows, s, range, tile);
      FillFrom(shape.bias, shape.heads, row, rows, s, range, T{0}, tile.width, tile.bias, filled);
    }
    if (masked && shape.heads == 1 && shape.mask.data == nullptr) {
      const BandMask mask{row - shape.before - s, row + shape.after - s};
      return biased ? Apply<vectors, true, true>(range, tile, mask, best, maxima)
                    : Apply<vectors, false, true>(range, tile, mask, best, maxima);
    }
    const TileMask mask{tile.mask, tile.width};
    if (masked) {
      FillFrom(shape.mask, shape.heads, row, rows, s, range, std::uint8_t{1}, tile.width, tile.mask);
      if (cut) FillBand(shape, row, rows, s, range, tile);
    }
    if (!masked) return Apply<vectors, true, false>(range, tile, mask, best, maxima);
    biased ? Apply<vectors, true, true>(range, tile, mask, best, maxima)
           : Apply<vectors, false, true>(range, tile, mask, best, maxima);
  }

  // Reads the dropout mask of a tile, for Drop. The masks of the logits have been applied: their room is
  // free.
  static void ReadDropoutMask(const AttentionShape<T>& shape, std::int64_t row, std::int64_t rows,
                              std::int64_t s, KeyRange range, const LogitsTile<T>& tile) {
    FillFrom(shape.dropout_mask, shape.heads, row, rows, s, range, std::uint8_t{1}, tile.width, tile.mask);
  }

  // Replaces what the tile's mask does not keep by 0, in x laid out as the tile.
  template <int vectors>
  static SOFTMAX2P_INLINE void Drop(KeyRange range, const std::uint8_t* mask, T* x) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    for (std::int64_t at = range.begin * kWidth; at < range.end * kWidth; at += V::kLanes) {
      V::Where(mask + at, V::Load(x + at), V::Broadcast(0)).Store(x + at);
    }
  }

  // output[size][rows] += A^T·factors, for those of copied keys or values A that are in the range: what comes
  // after it need not be finite, though its factors are 0. Returns whether these are as they were:
  // where they are not `finite`, and masks may hide them, those that are not finite become 0.
  template <int vectors>
  static SOFTMAX2P_INLINE bool AddCopied(T* copied, std::int64_t size, KeyRange range, const T* factors,
                                         bool finite, bool masked, T* output) {
    const bool unchanged = finite || !masked;
    if (!unchanged) TakeNonFinite<vectors>(copied, size, range, factors, output);
    const std::int64_t stride = CopiedStride(size);
    Product::template Accumulate<vectors>(copied + range.begin * stride, Product::kRows, stride,
                                          factors + range.begin * vectors * V::kLanes,
                                          RoundUp(size, Product::kRows), range.end - range.begin, output);
    return unchanged;
  }

 private:
  // Replaces elements of the copied keys or values that are not finite by 0, and adds their products with the
  // factors that are not 0: a masked NaN harms nobody.
  template <int vectors>
  static void TakeNonFinite(T* copied, std::int64_t size, KeyRange range, const T* factors, T* output) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const std::int64_t stride = CopiedStride(size);
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
  static std::int64_t TransposeBias(const AttentionShape<T>& shape, std::int64_t row, std::int64_t rows,
                                    std::int64_t s, KeyRange range, const LogitsTile<T>& tile) {
    constexpr int kStep = V::kTransposeRows;
    if (shape.heads != 1 || shape.bias.key != 1 || shape.bias.query == 0) return 0;
    const std::int64_t whole = rows / V::kLanes * V::kLanes;
    for (std::int64_t i = 0; i < whole; i += V::kLanes) {
      const T* const from = shape.bias.data + (row + i) * shape.bias.query + s;
      std::int64_t j = range.begin;
      for (; j + kStep <= range.end; j += kStep) {
        V transposed[kStep];
        V::LoadTransposed(from + j, shape.bias.query, transposed);
        SOFTMAX2P_UNROLL for (int k = 0; k < kStep; ++k) {
          transposed[k].Store(tile.bias + (j + k) * tile.width + i);
        }
      }
      for (; j < range.end; ++j) {
        for (int l = 0; l < V::kLanes; ++l)
          tile.bias[j * tile.width + i + l] = from[l * shape.bias.query + j];
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
      const Element* const from = &operand.At(r / heads, r % heads, s);
      for (std::int64_t j = range.begin; j < range.end; ++j) to[j * width + i] = from[j * operand.key];
    }
  }

  // Masks what lies outside the band.
  static void FillBand(const AttentionShape<T>& shape, std::int64_t row, std::int64_t rows, std::int64_t s,
                       KeyRange range, const LogitsTile<T>& tile) {
    std::int32_t first[Product::kColumns], last[Product::kColumns];
    const auto in_tile = [](std::int64_t key) {
      return static_cast<std::int32_t>(key < -1 ? -1 : key > kKeys ? kKeys : key);
    };
    for (std::int64_t i = 0; i < tile.width; ++i) {
      const std::int64_t t = (row + (i < rows ? i : rows - 1)) / shape.heads;
      first[i] = in_tile(t - shape.before - s);
      last[i] = in_tile(t + shape.after - s);
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
