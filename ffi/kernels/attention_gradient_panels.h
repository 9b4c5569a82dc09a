// Panels of rows in attention_gradient.h: their part of the gradients for a tile of packed keys and values.
// Nothing here depends on the type of the arrays.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_logits.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/gemm.h"
#include "ffi/kernels/scratch_buffers.h"

namespace jax_softmax2p {

template <typename V>
class AttentionGradientPanels {
  using T = typename V::Scalar;
  using Product = Gemm<V>;
  using Tiles = AttentionLogits<V>;
  static constexpr int kColumns = Product::kColumns;
  static constexpr std::int64_t kKeys = Tiles::kKeys;

 public:
  // How many there are at a time.
  static constexpr std::int64_t kPanels = 4;

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

    std::int64_t Columns() const { return vectors * V::kLanes; }
  };

  // For the keys from `begin` to `end`. What is added to the gradient of the bias goes to `bias_gradient`,
  // unless that is null.
  AttentionGradientPanels(const AttentionShape<T>& shape, T* bias_gradient, std::int64_t begin,
                          std::int64_t end, T* scratch)
      : shape_(shape),
        bias_gradient_(bias_gradient),
        begin_(begin),
        layout_(shape, bias_gradient != nullptr, end - begin),
        scratch_(ScratchLayout::Aligned(scratch)) {}

  static std::int64_t Scratch(const AttentionShape<T>& shape, bool has_bias_gradient, std::int64_t keys) {
    return ScratchLayout(shape, has_bias_gradient, keys).total();
  }

  // Of packed queries and keys, and of packed values; and from one key to the next in the gradients, and from
  // one row to the next in query_rows and cotangent_rows.
  std::int64_t depth() const { return layout_.depth; }
  std::int64_t value_depth() const { return layout_.value_depth; }
  std::int64_t row() const { return layout_.row; }
  std::int64_t value_row() const { return layout_.value_row; }
  // Buffers: a tile of packed keys, the same copied, one of packed values, rows before they are packed or
  // written, the gradients of all keys and values, and the sum of the cotangents of rows that attend to all
  // alike.
  T* keys() const { return At(0); }
  T* key_rows() const { return At(1); }
  T* values() const { return At(2); }
  T* rows() const { return At(3); }
  T* key_gradient() const { return At(9); }
  T* value_gradient() const { return At(10); }
  T* mean_cotangent() const { return At(11); }

  // Panel number i, of `left` rows from `row` on or as many as it takes.
  Panel PanelAt(std::int64_t row, std::int64_t left, int i) const {
    Panel panel{};
    panel.vectors = Product::VectorsOfPanel(CeilDiv(left, V::kLanes));
    panel.row = row;
    panel.rows = left < panel.Columns() ? left : panel.Columns();
    panel.keys = shape_.KeysOfRows(row, row + panel.rows);
    T* at = At(8) + i * layout_.panel_size;
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
    return panel;
  }

  // The rows of a panel that are not padding.
  std::int64_t RowsThere(const Panel& panel) const {
    const std::int64_t left = shape_.query_length * shape_.heads - panel.row;
    return left < 0 ? 0 : left < panel.rows ? left : panel.rows;
  }

  // Adds what a panel gives to the gradients for the keys s + range. Returns false where the copied keys,
  // which are `finite` or not, are as they were no more.
  bool AddTile(const Panel& panel, std::int64_t s, KeyRange range, bool finite) const {
    bool unchanged = true;
    Product::WithVectors(panel.vectors,
                         [&](auto vectors) { unchanged = AddKeys<vectors.value>(panel, s, range, finite); });
    return unchanged;
  }

  // Leaves dQ of a panel, scaled, row by row in rows().
  void UnpackQueryGradient(const Panel& panel) const {
    Product::Unpack(panel.gradient, panel.Columns(), layout_.depth, panel.Columns(), rows(), layout_.depth);
    for (std::int64_t i = 0; i < panel.rows * layout_.depth; ++i) rows()[i] *= shape_.scale;
  }

 private:
  // Where things lie in the scratch memory.
  struct ScratchLayout : ScratchBuffers<T, 13> {
    ScratchLayout(const AttentionShape<T>& shape, bool has_bias_gradient, std::int64_t keys)
        : depth(RoundUp(shape.size, Product::kAlign)),
          value_depth(RoundUp(shape.value_size, Product::kAlign)),
          row(RoundUp(shape.size, V::kLanes)),
          value_row(RoundUp(shape.value_size, V::kLanes)),
          panel_size(kColumns * (2 * depth + value_depth + row + value_row + 3)) {
      const std::int64_t most_rows = kKeys > kColumns ? kKeys : kColumns;
      const std::int64_t widest = depth > value_depth ? depth : value_depth;
      const std::int64_t row_width = has_bias_gradient && widest < kKeys ? kKeys : widest;
      const std::int64_t sizes[] = {
          kKeys * depth,
          kKeys * Tiles::CopiedStride(shape.size),
          kKeys * value_depth,
          most_rows * row_width,
          kKeys * kColumns,
          kKeys * kColumns,
          shape.bias.data != nullptr ? kKeys * kColumns : 0,
          kKeys * kColumns / static_cast<std::int64_t>(sizeof(T)),
          kPanels * panel_size,
          RoundUp(keys, kKeys) * row,
          RoundUp(keys, kKeys) * value_row,
          value_row,
          shape.soft_cap != 0 ? kKeys * kColumns : 0,
      };
      this->Allot(sizes);
    }
    std::int64_t depth, value_depth, row, value_row, panel_size;
  };

  T* At(int i) const { return layout_.At(scratch_, i); }
  T* weights() const { return At(4); }
  T* products() const { return At(5); }
  T* cap_derivatives() const { return At(12); }

  // Leaves the logits in weights(), and the derivatives of the soft cap in cap_derivatives().
  template <int vectors>
  SOFTMAX2P_INLINE void ComputeLogits(const Panel& panel, std::int64_t s, KeyRange range, bool cut,
                                      const LogitsTile<T>& tile) const {
    Tiles::template Multiply<vectors>(keys(), panel.queries, layout_.depth, shape_.scale, kMinusInfinity<V>,
                                      range, weights(), [](V, int) {});
    if (shape_.soft_cap != 0) {
      Tiles::template Cap<vectors>(shape_.soft_cap, range, weights(),
                                   [&](const auto& capped, std::int64_t at) {
                                     SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
                                       capped.derivative[v].Store(cap_derivatives() + at + v * V::kLanes);
                                     }
                                   });
    }
    if (cut || shape_.mask.data != nullptr || shape_.bias.data != nullptr) {
      V maxima[vectors];
      alignas(64) T best[kColumns] = {};
      Tiles::template ApplyOperands<vectors>(shape_, panel.row, panel.rows, s, range, cut, tile, best,
                                             maxima);
    }
  }

  template <int vectors>
  bool AddKeys(const Panel& panel, std::int64_t s, KeyRange range, bool finite) const {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const LogitsTile<T> tile{weights(), At(6), reinterpret_cast<std::uint8_t*>(At(7)), kWidth};
    const bool cut = shape_.BandCuts(panel.row, panel.row + panel.rows, s, range);
    const bool masked = cut || shape_.mask.data != nullptr;
    ComputeLogits<vectors>(panel, s, range, cut, tile);
    if (shape_.bias.data != nullptr || !finite) ClearPadding<vectors>(panel, range);
    Tiles::template Multiply<vectors>(values(), panel.cotangents, layout_.value_depth, T{1}, T{0}, range,
                                      products(), [](V, int) {});
    if (shape_.HasDropout()) {
      Tiles::ReadDropoutMask(shape_, panel.row, panel.rows, s, range, tile);
      Tiles::template Drop<vectors>(range, tile.mask, products());
    }
    const std::int64_t end = RoundUp(range.end, Product::kRows);
    masked ? Weights<vectors, true>(panel, range.begin, end)
           : Weights<vectors, false>(panel, range.begin, end);
    if (shape_.HasDropout()) Tiles::template Drop<vectors>(range, tile.mask, weights());
    if (bias_gradient_ != nullptr) AddBiasGradient<vectors>(panel, s, range);
    if (shape_.soft_cap != 0) ApplyCapDerivatives<vectors>(range);
    const bool unchanged = Tiles::template AddCopied<vectors>(key_rows(), shape_.size, range, products(),
                                                              finite, masked, panel.gradient);
    T* const key = key_gradient() + (s - begin_) * layout_.row;
    T* const value = value_gradient() + (s - begin_) * layout_.value_row;
    AddRows<kWidth>(weights(), panel.cotangent_rows, layout_.value_row, range.begin, end, value);
    AddRows<kWidth>(products(), panel.query_rows, layout_.row, range.begin, end, key);
    return unchanged;
  }

  // Padding may have a bias that is not finite, and has a logit of NaN for keys that are not, which its lse
  // would not make a weight of 0.
  template <int vectors>
  SOFTMAX2P_INLINE void ClearPadding(const Panel& panel, KeyRange range) const {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    for (std::int64_t i = RowsThere(panel); i < kWidth; ++i) {
      for (std::int64_t j = range.begin; j < range.end; ++j) weights()[j * kWidth + i] = 0;
    }
  }

  // Adds dS to the gradient of the bias, row by row.
  template <int vectors>
  SOFTMAX2P_INLINE void AddBiasGradient(const Panel& panel, std::int64_t s, KeyRange range) const {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    Product::Unpack(products(), kWidth, kKeys, kWidth, rows(), kKeys);
    const int count = static_cast<int>(range.end - range.begin);
    for (std::int64_t i = 0; i < RowsThere(panel); ++i) {
      const std::int64_t t = (panel.row + i) / shape_.heads, g = (panel.row + i) % shape_.heads;
      const T* const from = rows() + i * kKeys + range.begin;
      T* const to =
          bias_gradient_ + t * shape_.bias.query + g * shape_.bias.head + (s + range.begin) * shape_.bias.key;
      ForVectors<V>(count, [&](int, int at, const auto& access) {
        access.Store(access.Load(to + at, 0) + access.Load(from + at, 0), to + at);
      });
    }
  }

  // Multiplies dS by the derivatives of the soft cap.
  template <int vectors>
  SOFTMAX2P_INLINE void ApplyCapDerivatives(KeyRange range) const {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    for (std::int64_t at = range.begin * kWidth; at < range.end * kWidth; at += V::kLanes) {
      (V::Load(products() + at) * V::Load(cap_derivatives() + at)).Store(products() + at);
    }
  }

  // Replaces the logits by the weights P, and dP by dS. Where there are masks, dS is 0 where P is, also for
  // values that are not finite.
  template <int vectors, bool masked>
  SOFTMAX2P_INLINE void Weights(const Panel& panel, std::int64_t begin, std::int64_t end) const {
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

  const AttentionShape<T>& shape_;
  T* const bias_gradient_;
  const std::int64_t begin_;
  const ScratchLayout layout_;
  T* const scratch_;
};

}  // namespace jax_softmax2p
