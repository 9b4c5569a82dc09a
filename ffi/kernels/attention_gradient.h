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
// it broadcasts over. With a soft cap, dS is then multiplied by its derivative. With dropout, dP, and P in
// dV, are 0 where it drops a weight.
//
// Queries are taken in blocks, whose dQ and packed queries stay in a second-level cache, and all keys of a
// chunk of them for each, whose dK and dV are kept.
//
// Source: T. Dao et al., "FlashAttention", arXiv 2205.14135, algorithm 4.
#pragma once

#include <cstdint>

#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_gradient_panels.h"
#include "ffi/kernels/attention_logits.h"
#include "ffi/kernels/attention_tiles.h"
#include "ffi/kernels/gemm.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class AttentionGradientKernels {
  using T = typename V::Scalar;
  using Product = Gemm<V>;
  using Panels = AttentionGradientPanels<V>;
  using Panel = typename Panels::Panel;
  using Tiles = AttentionTiles<V, E>;
  static constexpr std::int64_t kKeys = AttentionLogits<V>::kKeys;
  static constexpr std::int64_t kPanels = Panels::kPanels;

 public:
  static std::int64_t Scratch(const AttentionGradientArgs<E>& args, std::int64_t keys) {
    return Panels::Scratch(args, args.bias_gradient != nullptr, keys);
  }

  static void Compute(const AttentionGradientArgs<E>& args, std::int64_t begin, std::int64_t end, T* partial,
                      T* scratch) {
    AttentionGradientKernels(args, begin, end, partial, scratch).Run();
  }

 private:
  AttentionGradientKernels(const AttentionGradientArgs<E>& args, std::int64_t begin, std::int64_t end,
                           T* partial, T* scratch)
      : args_(args),
        begin_(begin),
        end_(end),
        partial_(partial),
        panels_(args, args.bias_gradient, begin, end, scratch) {}

  void Run() const {
    const std::int64_t keys = RoundUp(end_ - begin_, kKeys);
    Zero(panels_.key_gradient(), keys * panels_.row());
    Zero(panels_.value_gradient(), keys * panels_.value_row());
    Zero(panels_.mean_cotangent(), panels_.value_row());
    const std::int64_t all = args_.Rows(), block = kPanels * Product::kColumns;
    for (std::int64_t row = 0; row < all; row += block) {
      AddBlock(row, all - row < block ? all : row + block);
    }
    Finish();
  }

  static void Zero(T* x, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = 0;
  }

  // All keys for the rows from `row` to `end`.
  void AddBlock(std::int64_t row, std::int64_t end) const {
    Panel panels[kPanels];
    int count = 0;
    KeyRange all{end_, 0};
    for (std::int64_t at = row; at < end; at += panels[count++].rows) {
      panels[count] = panels_.PanelAt(at, end - at, count);
      Start(panels[count], end);
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

  // Packs the queries and cotangents of a panel; `end` is that of the last row of its block.
  void Start(const Panel& panel, std::int64_t end) const {
    const std::int64_t next = panel.row + panel.rows;
    Tiles::PrefetchRows(args_, args_.query, args_.query_stride, args_.size, next, end);
    Tiles::PrefetchRows(args_, args_.cotangent, args_.output_stride, args_.value_size, next, end);
    Tiles::PrefetchRows(args_, args_.output, args_.output_stride, args_.value_size, next, end);
    Zero(panel.gradient, panels_.depth() * panel.Columns());
    CopyPanel(args_.query, args_.query_stride, args_.size, panel, panel.query_rows, panels_.row(),
              panel.queries, panels_.depth());
    CopyPanel(args_.cotangent, args_.output_stride, args_.value_size, panel, panel.cotangent_rows,
              panels_.value_row(), panel.cotangents, panels_.value_depth());
    for (std::int64_t i = 0; i < panel.Columns(); ++i) SetRow(panel, i);
  }

  // The rows of a panel of an array, with zeros for padding, which may be NaN: packed, and as they are.
  void CopyPanel(const E* x, std::int64_t stride, std::int64_t size, const Panel& panel, T* to,
                 std::int64_t to_stride, T* packed, std::int64_t depth) const {
    const std::int64_t columns = panel.Columns();
    T* const rows = panels_.rows();
    Tiles::CopyRows(x, stride, size, args_.heads, panel.row, panels_.RowsThere(panel), columns, rows, depth);
    Product::Pack(rows, depth, columns, depth, columns, packed);
    for (std::int64_t i = 0; i < columns; ++i) {
      const std::int64_t used = depth < to_stride ? depth : to_stride;
      for (std::int64_t h = 0; h < used; ++h) to[i * to_stride + h] = rows[i * depth + h];
      for (std::int64_t h = used; h < to_stride; ++h) to[i * to_stride + h] = 0;
    }
  }

  // The lse and delta of a row. Those that are padding, or attend to all keys alike, have no weights in
  // tiles.
  void SetRow(const Panel& panel, std::int64_t i) const {
    const std::int64_t t = (panel.row + i) / args_.heads, g = (panel.row + i) % args_.heads;
    const bool there = i < panel.rows && t < args_.query_length;
    panel.lse[i] = -kMinusInfinity<V>;
    panel.lse_rest[i] = 0;
    panel.delta[i] = 0;
    if (!there) return;
    const T* const cotangent = panel.cotangent_rows + i * panels_.value_row();
    const T* const lse = args_.lse + t * args_.lse_stride + g * args_.lse_parts;
    if (args_.masked && *lse == static_cast<T>(kMaskedLogit)) {
      return AddToAllValues(t, g, cotangent);
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

  // The cotangent of a row that attends to all keys alike.
  void AddToAllValues(std::int64_t t, std::int64_t g, const T* cotangent) const {
    if (!args_.HasDropout()) {
      for (std::int64_t h = 0; h < args_.value_size; ++h) panels_.mean_cotangent()[h] += cotangent[h];
      return;
    }
    const V share = V::Broadcast(1 / static_cast<T>(args_.keys));
    for (std::int64_t j = begin_; j < end_; ++j) {
      if (args_.dropout_mask.At(t, g, j) == 0) continue;
      T* const value = panels_.value_gradient() + (j - begin_) * panels_.value_row();
      for (std::int64_t h = 0; h < args_.value_size; h += V::kLanes) {
        Fma(share, V::Load(cotangent + h), V::Load(value + h)).Store(value + h);
      }
    }
  }

  void AddTile(const Panel* panels, int count, std::int64_t s, std::int64_t keys_in_tile) const {
    bool packed = false, finite = true;
    for (int i = 0; i < count; ++i) {
      const KeyRange range = AttentionLogits<V>::RangeInTile(panels[i].keys, s, keys_in_tile);
      if (range.begin >= range.end) continue;
      if (!packed) {
        finite = PackTile(s, keys_in_tile);
        Tiles::PrefetchKeys(args_, s + kKeys, end_);
      }
      packed = true;
      if (!panels_.AddTile(panels[i], s, range, finite)) CopyKeys(s, keys_in_tile);
    }
  }

  // Returns whether all keys are finite.
  bool PackTile(std::int64_t s, std::int64_t count) const {
    const E* const key = args_.key + s * args_.key_stride;
    const E* const value = args_.value + s * args_.value_stride;
    Tiles::Pack(key, args_.key_stride, args_.size, count, panels_.depth(), panels_.rows(), panels_.keys());
    const bool finite = CopyKeys(s, count);
    Tiles::Pack(value, args_.value_stride, args_.value_size, count, panels_.value_depth(), panels_.rows(),
                panels_.values());
    return finite;
  }

  bool CopyKeys(std::int64_t s, std::int64_t count) const {
    return Tiles::Copy(args_.key + s * args_.key_stride, args_.key_stride, args_.size, count,
                       panels_.key_rows());
  }

  // dQ of a panel: of this chunk of keys where the caller adds chunks up.
  void WriteQueryGradient(const Panel& panel) const {
    panels_.UnpackQueryGradient(panel);
    for (std::int64_t i = 0; i < panel.rows; ++i) {
      const T* const row = panels_.rows() + i * panels_.depth();
      if (partial_ != nullptr) {
        for (std::int64_t h = 0; h < args_.size; ++h) partial_[(panel.row + i) * args_.size + h] = row[h];
        continue;
      }
      const std::int64_t t = (panel.row + i) / args_.heads, g = (panel.row + i) % args_.heads;
      StoreElements<V>(row, args_.size, args_.query_gradient + t * args_.query_stride + g * args_.size);
    }
  }

  void Finish() const {
    const T share = 1 / static_cast<T>(args_.keys);
    for (std::int64_t j = 0; j < end_ - begin_; ++j) {
      T* const key = panels_.key_gradient() + j * panels_.row();
      T* const value = panels_.value_gradient() + j * panels_.value_row();
      for (std::int64_t h = 0; h < args_.size; ++h) key[h] *= args_.scale;
      for (std::int64_t h = 0; h < args_.value_size; ++h) value[h] += share * panels_.mean_cotangent()[h];
      StoreElements<V>(key, args_.size, args_.key_gradient + (begin_ + j) * args_.key_stride);
      StoreElements<V>(value, args_.value_size, args_.value_gradient + (begin_ + j) * args_.value_stride);
    }
  }

  const AttentionGradientArgs<E>& args_;
  const std::int64_t begin_;
  const std::int64_t end_;
  T* const partial_;
  const Panels panels_;
};

}  // namespace jax_softmax2p
