// Attention of a block of queries, fused: tiles of logits, their exponentials and the product with the
// values, none of which leaves the first cache levels.
//
// The rows (queries of all heads that share keys) lie in the lanes of vectors, kColumns of them in a panel;
// the keys go from top to bottom. So the maxima and the sums of softmax are lane by lane, and keys and values
// are the operand of both products that is read an element at a time. For tiles of kKeys keys:
//
//   logits[keys][rows] = K·Q^T      P = e^logits      O^T[values' size][rows] += V^T·P
//
// Exponentials are held relative to 2^reference, an integer of each row's own. It is raised, and what has
// been summed rescaled by a power of two, exactly, when a logit exceeds it by more than kHeadroom: rarely but
// for the first tile. Rows with logits beyond the exact range of the exponential are also shifted by their
// maximum.
//
// Nothing depends on which rows share a panel, nor on which tiles are skipped: a tile begins at a multiple of
// kKeys, masked logits are -inf, and their exponentials 0.
//
// Sources: T. Dao et al., "FlashAttention", arXiv 2205.14135, for the tiles and the running reference; M.
// Milakov & N. Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
#pragma once

#include <cstdint>

#include "ffi/base/error_free.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_logits.h"
#include "ffi/kernels/attention_panels.h"
#include "ffi/kernels/attention_rows.h"
#include "ffi/kernels/attention_tiles.h"
#include "ffi/kernels/gemm.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class AttentionKernels {
  using T = typename V::Scalar;
  using Product = Gemm<V>;
  using Panels = AttentionPanels<V>;
  using Panel = typename Panels::Panel;
  using Rows = AttentionRows<V, E>;
  using Tiles = AttentionTiles<V, E>;
  static constexpr std::int64_t kKeys = AttentionLogits<V>::kKeys;

 public:
  static std::int64_t Scratch(const AttentionArgs<E>& args, std::int64_t rows) {
    return Panels::Scratch(args, rows);
  }

  static void Attend(const AttentionArgs<E>& args, std::int64_t begin, std::int64_t end, T* scratch) {
    AttentionKernels(args, begin, end, scratch).Run();
  }

 private:
  AttentionKernels(const AttentionArgs<E>& args, std::int64_t begin, std::int64_t end, T* scratch)
      : args_(args), begin_(begin), end_(end), panels_(args, begin, end, scratch) {}

  void Run() {
    KeyRange all{args_.keys, 0};
    panels_.ForEach([&](const Panel& panel) {
      Tiles::PrefetchRows(args_, args_.query, args_.query_stride, args_.size, panel.row + panel.rows, end_);
      Start(panel);
      if (panel.keys.begin < all.begin) all.begin = panel.keys.begin;
      if (panel.keys.end > all.end) all.end = panel.keys.end;
    });
    PrefetchOutputs(begin_);
    for (std::int64_t s = all.begin / kKeys * kKeys; s < all.end; s += kKeys) AddTile(s, all.end);
    panels_.ForEach([&](const Panel& panel) {
      PrefetchOutputs(panel.row + panel.rows);
      Finish(panel);
    });
  }

  void PrefetchOutputs(std::int64_t row) const {
    Tiles::template PrefetchRows<true>(args_, args_.output, args_.output_stride, args_.value_size, row, end_);
  }

  void Start(const Panel& panel) const {
    const std::int64_t columns = panel.Columns(), depth = panels_.depth();
    Tiles::CopyRows(args_.query, args_.query_stride, args_.size, args_.heads, panel.row, panel.rows, columns,
                    panels_.rows(), depth);
    Product::Pack(panels_.rows(), depth, columns, depth, columns, panel.queries);
    panels_.Clear(panel);
  }

  // Adds the keys from s on, kKeys of them or what there are, to all panels that attend to any; `end` is that
  // of the last key.
  void AddTile(std::int64_t s, std::int64_t end) const {
    const std::int64_t left = args_.key_length - s, count = left < kKeys ? left : kKeys;
    Tiles::Pack(args_.key + s * args_.key_stride, args_.key_stride, args_.size, count, panels_.depth(),
                panels_.rows(), panels_.keys());
    const bool finite = CopyValues(s, count);
    Tiles::PrefetchKeys(args_, s + kKeys, args_.key_length < end ? args_.key_length : end);
    panels_.ForEach([&](const Panel& panel) {
      if (!panels_.AddTile(panel, s, count, finite)) CopyValues(s, count);
    });
  }

  bool CopyValues(std::int64_t s, std::int64_t count) const {
    return Tiles::Copy(args_.value + s * args_.value_stride, args_.value_stride, args_.value_size, count,
                       panels_.values());
  }

  // Writes the output and the lse of a panel.
  void Finish(const Panel& panel) {
    DoubleDouble<T> lses[Product::kColumns];
    panels_.Finish(panel, lses);
    for (std::int64_t i = 0; i < panel.rows; ++i) {
      Rows::Write(args_, panel.row + i, panel.state.sum[i], panel.state.best[i], lses[i],
                  panels_.rows() + i * panels_.value_rows(), [&] { return MeanOfValues(panel.row + i); });
    }
  }

  // Without dropout all rows share it.
  const T* MeanOfValues(std::int64_t row) {
    if (args_.HasDropout()) {
      Rows::MeanOfKeptValues(args_, row, panels_.mean());
    } else if (!has_mean_) {
      Rows::MeanOfValues(args_, panels_.mean());
      has_mean_ = true;
    }
    return panels_.mean();
  }

  const AttentionArgs<E>& args_;
  const std::int64_t begin_;
  const std::int64_t end_;
  const Panels panels_;
  bool has_mean_ = false;
};

}  // namespace jax_softmax2p
