// The gradient of attention in queries, keys and values, fused: tiles of weights are computed again from the
// lse of their rows, and nothing of queries times keys is stored.
//
// With rows in the lanes of vectors and keys from top to bottom, as in attention.h, five products make a
// tile:
//
//   logits[keys][rows] = K·Q^T      P = e^(logits - lse)      dP = V·dO^T      dS = P·(dP - delta)
//   dQ^T += K^T·dS      dV += P·dO      dK += dS·Q
//
// where dO is the cotangent and delta = <dO, O> of every row. The gradient of a bias is dS, summed over what
// it broadcasts over. With a soft cap, dS is then multiplied by its derivative.
//
// Queries are taken in blocks, whose dQ and packed queries stay in a second-level cache, and all keys of a
// chunk of them for each, whose dK and dV are kept.
//
// Source: T. Dao et al., "FlashAttention", arXiv 2205.14135, algorithm 4.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_tiles.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/gemm.h"
#include "ffi/kernels/soft_cap.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class AttentionGradientKernels {
  using T = typename V::Scalar;
  using Product = Gemm<V>;
  using Tiles = AttentionTiles<V, E>;
  static constexpr int kColumns = Product::kColumns;
  static constexpr int kKeys = Tiles::kKeys;
  static constexpr std::int64_t kPanels = 4;

 public:
  static std::int64_t Scratch(const AttentionGradientArgs<E>& args, std::int64_t keys) {
    return ScratchLayout(args, keys).total();
  }

  static void Compute(const AttentionGradientArgs<E>& args, std::int64_t begin, std::int64_t end, T* partial,
                      T* scratch) {
    AttentionGradientKernels(args, begin, end, partial, scratch).Run();
  }

 private:
  // Where things lie in the scratch memory.
  struct ScratchLayout : ScratchBuffers<T, 13> {
    ScratchLayout(const AttentionGradientArgs<E>& args, std::int64_t keys)
        : depth(RoundUp(args.size, kAlignRows)),
          value_depth(RoundUp(args.value_size, kAlignRows)),
          row(RoundUp(args.size, V::kLanes)),
          value_row(RoundUp(args.value_size, V::kLanes)),
          panel_size(kColumns * (2 * depth + value_depth + row + value_row + 3)) {
      const std::int64_t rows = kKeys > kColumns ? kKeys : kColumns;
      const std::int64_t widest = depth > value_depth ? depth : value_depth;
      const std::int64_t row_width = args.bias_gradient != nullptr && widest < kKeys ? kKeys : widest;
      const std::int64_t sizes[] = {
          kKeys * depth,
          Tiles::ValueElements(args.size),
          kKeys * value_depth,
          rows * row_width,
          kKeys * kColumns,
          kKeys * kColumns,
          args.bias.data != nullptr ? kKeys * kColumns : 0,
          kKeys * kColumns / static_cast<std::int64_t>(sizeof(T)),
          kPanels * panel_size,
          RoundUp(keys, kKeys) * row,
          RoundUp(keys, kKeys) * value_row,
          value_row,
          args.soft_cap != 0 ? kKeys * kColumns : 0,
      };
      this->Allot(sizes);
    }
    static constexpr std::int64_t kAlignRows =
        Product::kRows > Product::kTranspose ? Product::kRows : Product::kTranspose;
    std::int64_t depth, value_depth, row, value_row, panel_size;
  };

  // Some rows: their queries and cotangents, packed and row by row, and dQ^T.
  struct Panel {
    int vectors;
    std::int64_t row;
    std::int64_t rows;
    KeyRange keys;
    T* queries;
    T* gradient;
    T* cotangents;
    T* query_rows;
    T* cotangent_rows;
    T* lse;
    T* lse_rest;
    T* delta;
  };

  AttentionGradientKernels(const AttentionGradientArgs<E>& args, std::int64_t begin, std::int64_t end,
                           T* partial, T* scratch)
      : args_(args),
        begin_(begin),
        end_(end),
        partial_(partial),
        layout_(args, end - begin),
        scratch_(ScratchLayout::Aligned(scratch)) {}

  T* At(int i) const { return layout_.At(scratch_, i); }
  T* keys() const { return At(0); }
  T* key_rows() const { return At(1); }
  T* values() const { return At(2); }
  T* rows() const { return At(3); }
  T* weights() const { return At(4); }
  T* products() const { return At(5); }
  T* key_gradient() const { return At(9); }
  T* value_gradient() const { return At(10); }
  T* mean_cotangent() const { return At(11); }
  T* cap_derivatives() const { return At(12); }

  void Run() {
    Zero(key_gradient(), RoundUp(end_ - begin_, kKeys) * layout_.row);
    Zero(value_gradient(), RoundUp(end_ - begin_, kKeys) * layout_.value_row);
    Zero(mean_cotangent(), layout_.value_row);
    const std::int64_t all = args_.Rows(), block = kPanels * kColumns;
    for (std::int64_t row = 0; row < all; row += block) {
      AddBlock(row, all - row < block ? all - row : block);
    }
    Finish();
  }

  static void Zero(T* x, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = 0;
  }

  // All keys for a block of rows.
  void AddBlock(std::int64_t row, std::int64_t rows) {
    Panel panels[kPanels];
    int count = 0;
    KeyRange all{end_, 0};
    for (std::int64_t at = row; at < row + rows; at += panels[count++].rows) {
      const int vectors = Product::VectorsOfPanel(CeilDiv(row + rows - at, V::kLanes));
      panels[count] = Start(at, row + rows - at, vectors, count);
      const KeyRange& keys = panels[count].keys;
      if (keys.begin < all.begin) all.begin = keys.begin;
      if (keys.end > all.end) all.end = keys.end;
    }
    if (all.begin < begin_) all.begin = begin_;
    if (all.end > end_) all.end = end_;
    for (std::int64_t s = all.begin / kKeys * kKeys; s < all.end; s += kKeys) {
      const std::int64_t left = (end_ < args_.key_length ? end_ : args_.key_length) - s;
      AddTile(panels, count, s, left < kKeys ? left : kKeys);
    }
    for (int i = 0; i < count; ++i) WriteQueryGradient(panels[i]);
  }

  Panel Start(std::int64_t row, std::int64_t left, int vectors, int index) {
    const std::int64_t columns = vectors * V::kLanes, rows = left < columns ? left : columns;
    Panel panel{};
    panel.vectors = vectors;
    panel.row = row;
    panel.rows = rows;
    panel.keys = Tiles::KeysOfRows(args_, row, row + rows);
    T* at = At(8) + index * layout_.panel_size;
    const auto next = [&](std::int64_t size) {
      T* const here = at;
      at += kColumns * size;
      return here;
    };
    panel.queries = next(layout_.depth);
    panel.gradient = next(layout_.depth);
    panel.cotangents = next(layout_.value_depth);
    panel.query_rows = next(layout_.row);
    panel.cotangent_rows = next(layout_.value_row);
    panel.lse = next(1);
    panel.lse_rest = next(1);
    panel.delta = next(1);
    Tiles::PrefetchRows(args_, args_.query, args_.query_stride, args_.size, row + rows, row + left);
    Tiles::PrefetchRows(args_, args_.cotangent, args_.output_stride, args_.value_size, row + rows,
                        row + left);
    Tiles::PrefetchRows(args_, args_.output, args_.output_stride, args_.value_size, row + rows, row + left);
    Zero(panel.gradient, layout_.depth * columns);
    CopyPanel(args_.query, args_.query_stride, args_.size, panel, panel.query_rows, layout_.row,
              panel.queries, layout_.depth);
    CopyPanel(args_.cotangent, args_.output_stride, args_.value_size, panel, panel.cotangent_rows,
              layout_.value_row, panel.cotangents, layout_.value_depth);
    for (std::int64_t i = 0; i < columns; ++i) SetRow(panel, i);
    return panel;
  }

  // The rows of a panel of an array, with zeros for padding, which may be NaN: packed, and as they are.
  void CopyPanel(const E* x, std::int64_t stride, std::int64_t size, const Panel& panel, T* to,
                 std::int64_t to_stride, T* packed, std::int64_t depth) {
    const std::int64_t columns = panel.vectors * V::kLanes;
    Tiles::CopyRows(x, stride, size, args_.heads, panel.row, RowsThere(panel), columns, rows(), depth);
    Product::Pack(rows(), depth, columns, depth, columns, packed);
    for (std::int64_t i = 0; i < columns; ++i) {
      const std::int64_t used = depth < to_stride ? depth : to_stride;
      for (std::int64_t h = 0; h < used; ++h) to[i * to_stride + h] = rows()[i * depth + h];
      for (std::int64_t h = used; h < to_stride; ++h) to[i * to_stride + h] = 0;
    }
  }

  // The lse and delta of a row. Those that are padding, or attend to all keys alike, have no weights in
  // tiles.
  void SetRow(const Panel& panel, std::int64_t i) {
    const std::int64_t t = (panel.row + i) / args_.heads, g = (panel.row + i) % args_.heads;
    const bool there = i < panel.rows && t < args_.query_length;
    panel.lse[i] = -kMinusInfinity<V>;
    panel.lse_rest[i] = 0;
    panel.delta[i] = 0;
    if (!there) return;
    const T* const cotangent = panel.cotangent_rows + i * layout_.value_row;
    const T* const lse = args_.lse + t * args_.lse_stride + g * args_.lse_parts;
    if (args_.masked && *lse == static_cast<T>(kMaskedLogit)) {
      for (std::int64_t h = 0; h < args_.value_size; ++h) mean_cotangent()[h] += cotangent[h];
      return;
    }
    panel.lse[i] = lse[0];
    if (args_.lse_parts == 2) panel.lse_rest[i] = lse[1];
    const E* const output = args_.output + t * args_.output_stride + g * args_.value_size;
    V sum = V::Broadcast(0);
    ForVectors<V>(static_cast<int>(args_.value_size), [&](int, int h, const auto& access) {
      sum = Fma(access.Load(cotangent + h, 0), access.Load(output + h, 0), sum);
    });
    T lanes[V::kLanes];
    sum.Store(lanes);
    for (int l = 0; l < V::kLanes; ++l) panel.delta[i] += lanes[l];
  }

  void AddTile(const Panel* panels, int count, std::int64_t s, std::int64_t keys_in_tile) {
    bool packed = false;
    for (int i = 0; i < count; ++i) {
      const Panel& panel = panels[i];
      const std::int64_t first = panel.keys.begin - s, last = panel.keys.end - s;
      const KeyRange range{first <= 0 ? 0 : first / Product::kRows * Product::kRows,
                           last < keys_in_tile ? last : keys_in_tile};
      if (range.begin >= range.end) continue;
      if (!packed) {
        PackTile(s, keys_in_tile);
        Tiles::PrefetchKeys(args_, s + kKeys, end_);
      }
      packed = true;
      Product::WithVectors(
          panel.vectors, [&](auto vectors) { AddTileOfPanel<vectors.value>(panel, s, keys_in_tile, range); });
    }
  }

  void PackTile(std::int64_t s, std::int64_t count) {
    const E *const key = args_.key + s * args_.key_stride, *const value =
                                                               args_.value + s * args_.value_stride;
    Tiles::Pack(key, args_.key_stride, args_.size, count, layout_.depth, rows(), keys());
    keys_are_finite_ = CopyKeys(s, count);
    Tiles::Pack(value, args_.value_stride, args_.value_size, count, layout_.value_depth, rows(), values());
  }

  bool CopyKeys(std::int64_t s, std::int64_t count) {
    return Tiles::Copy(args_.key + s * args_.key_stride, args_.key_stride, args_.size, count, key_rows());
  }

  template <int vectors>
  SOFTMAX2P_INLINE void AddTileOfPanel(const Panel& panel, std::int64_t s, std::int64_t count,
                                       KeyRange range) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    TileOfKeys<vectors>(keys(), panel.queries, layout_.depth, args_.scale, kMinusInfinity<V>, range,
                        weights());
    if (args_.soft_cap != 0) CapLogits<vectors>(range);
    const bool cut = Tiles::BandCuts(args_, panel.row, panel.row + panel.rows, s, range);
    const bool masked = cut || args_.mask.data != nullptr;
    if (masked || args_.bias.data != nullptr) {
      const LogitsTile<T> tile{weights(), At(6), reinterpret_cast<std::uint8_t*>(At(7)), kWidth};
      V maxima[vectors];
      alignas(64) T best[kColumns] = {};
      Tiles::template ApplyOperands<vectors>(args_, panel.row, panel.rows, s, range, cut, tile, best, maxima);
    }
    if (args_.bias.data != nullptr || !keys_are_finite_) ClearPadding<vectors>(panel, range);
    TileOfKeys<vectors>(values(), panel.cotangents, layout_.value_depth, T{1}, T{0}, range, products());
    const std::int64_t end = RoundUp(range.end, Product::kRows);
    masked ? Weights<vectors, true>(panel, range.begin, end)
           : Weights<vectors, false>(panel, range.begin, end);
    if (args_.bias_gradient != nullptr) AddBiasGradient<vectors>(panel, s, range);
    if (args_.soft_cap != 0) ApplyCapDerivatives<vectors>(range);
    const std::int64_t stride = Tiles::ValueStride(args_.size), at = range.begin * kWidth;
    const bool takes_non_finite = masked && !keys_are_finite_;
    if (takes_non_finite) {
      Tiles::template TakeNonFinite<vectors>(key_rows(), args_.size, range, products(), panel.gradient);
    }
    Product::template Accumulate<vectors>(key_rows() + range.begin * stride, Product::kRows, stride,
                                          products() + at, RoundUp(args_.size, Product::kRows),
                                          RoundUp(range.end, kUnroll) - range.begin, panel.gradient);
    if (takes_non_finite) CopyKeys(s, count);
    T* const key = key_gradient() + (s - begin_) * layout_.row;
    T* const value = value_gradient() + (s - begin_) * layout_.value_row;
    AddRows<kWidth>(weights(), panel.cotangent_rows, layout_.value_row, range.begin, end, value);
    AddRows<kWidth>(products(), panel.query_rows, layout_.row, range.begin, end, key);
  }

  // to[keys][rows] = factor·A·B, for packed A, and `fill` beyond the range.
  template <int vectors>
  static SOFTMAX2P_INLINE void TileOfKeys(const T* a, const T* b, std::int64_t depth, T factor, T fill,
                                          KeyRange range, T* to) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const V factors = V::Broadcast(factor);
    for (std::int64_t j = range.begin; j < range.end; j += Product::kRows) {
      typename Product::template Tile<vectors> tile;
      tile.Clear();
      tile.AddProduct(Product::PackedTile(a, j, depth), Product::kPackedRows, b, depth);
      SOFTMAX2P_UNROLL for (int i = 0; i < Product::kRows; ++i) {
        SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
          (tile.c[i][v] * factors).Store(to + (j + i) * kWidth + v * V::kLanes);
        }
      }
    }
    for (std::int64_t i = range.end * kWidth; i < RoundUp(range.end, Product::kRows) * kWidth; ++i) {
      to[i] = fill;
    }
  }

  // Replaces the logits by those with the soft cap, and keeps the derivatives.
  template <int vectors>
  SOFTMAX2P_INLINE void CapLogits(KeyRange range) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    for (std::int64_t at = range.begin * kWidth; at < range.end * kWidth; at += kWidth) {
      const auto capped = jax_softmax2p::CapLogits<V, vectors>(args_.soft_cap, weights() + at);
      SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
        capped.z[v].Store(weights() + at + v * V::kLanes);
        capped.derivative[v].Store(cap_derivatives() + at + v * V::kLanes);
      }
    }
  }

  // The rows of a panel that are not padding.
  std::int64_t RowsThere(const Panel& panel) const {
    const std::int64_t left = args_.query_length * args_.heads - panel.row;
    return left < 0 ? 0 : left < panel.rows ? left : panel.rows;
  }

  // Padding may have a bias that is not finite, and has a logit of NaN for keys that are not, which its lse
  // would not make a weight of 0.
  template <int vectors>
  SOFTMAX2P_INLINE void ClearPadding(const Panel& panel, KeyRange range) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    for (std::int64_t i = RowsThere(panel); i < kWidth; ++i) {
      for (std::int64_t j = range.begin; j < range.end; ++j) weights()[j * kWidth + i] = 0;
    }
  }

  // Adds dS to the gradient of the bias, row by row.
  template <int vectors>
  SOFTMAX2P_INLINE void AddBiasGradient(const Panel& panel, std::int64_t s, KeyRange range) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    Product::Unpack(products(), kWidth, kKeys, kWidth, rows(), kKeys);
    const int count = static_cast<int>(range.end - range.begin);
    for (std::int64_t i = 0; i < RowsThere(panel); ++i) {
      const std::int64_t t = (panel.row + i) / args_.heads, g = (panel.row + i) % args_.heads;
      const T* const from = rows() + i * kKeys + range.begin;
      T* const to = args_.bias_gradient + t * args_.bias.query + g * args_.bias.head +
                    (s + range.begin) * args_.bias.key;
      ForVectors<V>(count, [&](int, int at, const auto& access) {
        access.Store(access.Load(to + at, 0) + access.Load(from + at, 0), to + at);
      });
    }
  }

  // Multiplies dS by these.
  template <int vectors>
  SOFTMAX2P_INLINE void ApplyCapDerivatives(KeyRange range) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    for (std::int64_t at = range.begin * kWidth; at < range.end * kWidth; at += V::kLanes) {
      (V::Load(products() + at) * V::Load(cap_derivatives() + at)).Store(products() + at);
    }
  }

  // Replaces the logits by the weights P, and dP by dS. Where there are masks, dS is 0 where P is, also for
  // values that are not finite.
  template <int vectors, bool masked>
  SOFTMAX2P_INLINE void Weights(const Panel& panel, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const ExtExpKernel<V, 0> exp(V::Broadcast(0));
    for (int v = 0; v < vectors; ++v) {
      const V lse = V::Load(panel.lse + v * V::kLanes), lse_rest = V::Load(panel.lse_rest + v * V::kLanes);
      const V delta = V::Load(panel.delta + v * V::kLanes);
      for (std::int64_t j = begin; j < end; j += kUnroll) {
        T* const weights_at = weights() + j * kWidth + v * V::kLanes;
        T* const products_at = products() + j * kWidth + v * V::kLanes;
        V x[kUnroll];
        SOFTMAX2P_UNROLL for (int k = 0; k < kUnroll; ++k) {
          x[k] = (V::Load(weights_at + k * kWidth) - lse) - lse_rest;
        }
        const ExtExp<V, kUnroll> e = exp(x);
        SOFTMAX2P_UNROLL for (int k = 0; k < kUnroll; ++k) {
          const V p = e.Value(k);
          p.Store(weights_at + k * kWidth);
          V ds = p * (V::Load(products_at + k * kWidth) - delta);
          if constexpr (masked) ds = WhereEqual(p, V::Broadcast(0), V::Broadcast(0), ds);
          ds.Store(products_at + k * kWidth);
        }
      }
    }
  }

  // to[keys][size] += A·B, for A [keys][width] and the rows of a panel as B.
  template <int width>
  static SOFTMAX2P_INLINE void AddRows(const T* a, const T* b, std::int64_t size, std::int64_t begin,
                                       std::int64_t end, T* to) {
    for (std::int64_t h = 0; h < size;) {
      const int vectors = Product::VectorsOfPanel((size - h) / V::kLanes);
      Product::WithVectors(vectors, [&](auto count) {
        for (std::int64_t j = begin; j < end; j += Product::kRows) {
          typename Product::template Tile<count.value> tile;
          tile.Clear();
          tile.template AddProductOfRows<width>(a + j * width, b + h, size, width);
          tile.AddTo(to + j * size + h, size);
        }
      });
      h += vectors * V::kLanes;
    }
  }

  // dQ of a panel, scaled: of this chunk of keys where the caller adds chunks up.
  void WriteQueryGradient(const Panel& panel) {
    const std::int64_t columns = panel.vectors * V::kLanes;
    Product::Unpack(panel.gradient, columns, layout_.depth, columns, rows(), layout_.depth);
    for (std::int64_t i = 0; i < panel.rows; ++i) {
      T* const row = rows() + i * layout_.depth;
      for (std::int64_t h = 0; h < args_.size; ++h) row[h] *= args_.scale;
      if (partial_ != nullptr) {
        for (std::int64_t h = 0; h < args_.size; ++h) partial_[(panel.row + i) * args_.size + h] = row[h];
        continue;
      }
      const std::int64_t t = (panel.row + i) / args_.heads, g = (panel.row + i) % args_.heads;
      StoreElements<V>(row, args_.size, args_.query_gradient + t * args_.query_stride + g * args_.size);
    }
  }

  void Finish() {
    const T share = 1 / static_cast<T>(args_.keys);
    for (std::int64_t j = 0; j < end_ - begin_; ++j) {
      T *const key = key_gradient() + j * layout_.row, *const value =
                                                           value_gradient() + j * layout_.value_row;
      for (std::int64_t h = 0; h < args_.size; ++h) key[h] *= args_.scale;
      for (std::int64_t h = 0; h < args_.value_size; ++h) value[h] += share * mean_cotangent()[h];
      StoreElements<V>(key, args_.size, args_.key_gradient + (begin_ + j) * args_.key_stride);
      StoreElements<V>(value, args_.value_size, args_.value_gradient + (begin_ + j) * args_.value_stride);
    }
  }

  const AttentionGradientArgs<E>& args_;
  const std::int64_t begin_;
  const std::int64_t end_;
  T* const partial_;
  const ScratchLayout layout_;
  T* const scratch_;
  bool keys_are_finite_ = true;  // of the tile
};

}  // namespace jax_softmax2p
