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

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_rows.h"
#include "ffi/kernels/attention_tiles.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/gemm.h"
#include "ffi/kernels/soft_cap.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class AttentionKernels {
  using T = typename V::Scalar;
  using Product = Gemm<V>;
  using Rows = AttentionRows<V, E>;
  using Tiles = AttentionTiles<V, E>;
  static constexpr int kColumns = Product::kColumns;
  static constexpr int kKeys = Tiles::kKeys;

 public:
  static std::int64_t Scratch(const AttentionArgs<E>& args, std::int64_t rows) {
    return ScratchLayout(args, rows).total();
  }

  static void Attend(const AttentionArgs<E>& args, std::int64_t begin, std::int64_t end, T* scratch) {
    AttentionKernels(args, begin, end, scratch).Run();
  }

 private:
  // Where things lie in the scratch memory.
  struct ScratchLayout : ScratchBuffers<T, 8> {
    ScratchLayout(const AttentionArgs<E>& args, std::int64_t rows)
        : depth(RoundUp(args.size, Product::kTranspose)),
          value_rows(RoundUp(args.value_size, kValueAlign)),
          panels(CeilDiv(rows, kColumns) + 1),
          panel_size((depth + value_rows) * kColumns + 5 * kColumns) {
      const std::int64_t sizes[] = {Tiles::KeyElements(depth),
                                    Tiles::ValueElements(args.value_size),
                                    Tiles::RowElements(depth, value_rows),
                                    kKeys * kColumns,
                                    args.bias.data != nullptr ? kKeys * kColumns : 0,
                                    kKeys * kColumns / static_cast<std::int64_t>(sizeof(T)),
                                    value_rows,
                                    panels * panel_size};
      this->Allot(sizes);
    }
    static constexpr std::int64_t kValueAlign =
        Product::kRows > Product::kTranspose ? Product::kRows : Product::kTranspose;
    std::int64_t depth, value_rows, panels, panel_size;
  };

  // What is known of the rows of a panel, one after the other: see the top of this file.
  struct State {
    explicit State(T* at)
        : reference(at),
          shift(at + kColumns),
          limit(at + 2 * kColumns),
          sum(at + 3 * kColumns),
          best(at + 4 * kColumns) {}
    T* reference;
    T* shift;
    T* limit;  // the largest logit that needs no other reference
    T* sum;
    T* best;  // the largest bias of a key that a row attends to, 0 without biases; -inf where there is none
  };

  struct Panel {
    int vectors;
    std::int64_t row;
    std::int64_t rows;
    KeyRange keys;
    T* queries;
    T* output;
    T* state;
  };

  AttentionKernels(const AttentionArgs<E>& args, std::int64_t begin, std::int64_t end, T* scratch)
      : args_(args),
        begin_(begin),
        end_(end),
        layout_(args, end - begin),
        scratch_(ScratchLayout::Aligned(scratch)) {}

  T* At(int i) const { return layout_.At(scratch_, i); }
  T* keys() const { return At(0); }
  T* values() const { return At(1); }
  T* rows() const { return At(2); }
  T* logits() const { return At(3); }
  T* bias() const { return At(4); }
  std::uint8_t* mask() const { return reinterpret_cast<std::uint8_t*>(At(5)); }
  T* mean() const { return At(6); }

  void Run() {
    Panel panel;
    KeyRange all{args_.keys, 0};
    for (std::int64_t row = begin_, i = 0; row < end_; row += panel.rows, ++i) {
      panel = PanelAt(row, i);
      Tiles::PrefetchRows(args_, args_.query, args_.query_stride, args_.size, row + panel.rows, end_);
      Start(panel);
      if (panel.keys.begin < all.begin) all.begin = panel.keys.begin;
      if (panel.keys.end > all.end) all.end = panel.keys.end;
    }
    Tiles::template PrefetchRows<true>(args_, args_.output, args_.output_stride, args_.value_size, begin_,
                                       end_);
    for (std::int64_t s = all.begin / kKeys * kKeys; s < all.end; s += kKeys) AddTile(s, all.end);
    for (std::int64_t row = begin_, i = 0; row < end_; row += panel.rows, ++i) {
      panel = PanelAt(row, i);
      Tiles::template PrefetchRows<true>(args_, args_.output, args_.output_stride, args_.value_size,
                                         row + panel.rows, end_);
      Finish(panel);
    }
  }

  // The panel that begins at a row.
  Panel PanelAt(std::int64_t row, std::int64_t i) const {
    Panel panel;
    panel.vectors = Product::VectorsOfPanel(CeilDiv(end_ - row, V::kLanes));
    panel.row = row;
    panel.rows = panel.vectors * V::kLanes < end_ - row ? panel.vectors * V::kLanes : end_ - row;
    panel.keys = Tiles::KeysOfRows(args_, row, row + panel.rows);
    panel.state = At(7) + i * layout_.panel_size;
    panel.queries = panel.state + 5 * kColumns;
    panel.output = panel.queries + layout_.depth * kColumns;
    return panel;
  }

  void Start(const Panel& panel) {
    const std::int64_t columns = panel.vectors * V::kLanes;
    Tiles::CopyRows(args_.query, args_.query_stride, args_.size, args_.heads, panel.row, panel.rows, columns,
                    rows(), layout_.depth);
    Product::Pack(rows(), layout_.depth, columns, layout_.depth, columns, panel.queries);
    for (std::int64_t i = 0; i < layout_.value_rows * columns; ++i) panel.output[i] = 0;
    const State state(panel.state);
    for (std::int64_t i = 0; i < columns; ++i) {
      state.reference[i] = state.shift[i] = state.sum[i] = 0;
      state.limit[i] = state.best[i] = kMinusInfinity<V>;
    }
  }

  // Adds the keys from s on, kKeys of them or what there are, to all panels that attend to any; `end` is that
  // of the last key.
  void AddTile(std::int64_t s, std::int64_t end) {
    const std::int64_t left = args_.key_length - s, count = left < kKeys ? left : kKeys;
    Tiles::Pack(args_.key + s * args_.key_stride, args_.key_stride, args_.size, count, layout_.depth, rows(),
                keys());
    const bool finite = CopyValues(s, count);
    Tiles::PrefetchKeys(args_, s + kKeys, args_.key_length < end ? args_.key_length : end);
    Panel panel;
    for (std::int64_t row = begin_, i = 0; row < end_; row += panel.rows, ++i) {
      panel = PanelAt(row, i);
      // Tiles of kRows keys are computed, and exponentials of kUnroll.
      const std::int64_t first = panel.keys.begin - s, last = panel.keys.end - s;
      const KeyRange range{first <= 0 ? 0 : first / Product::kRows * Product::kRows,
                           last < count ? last : count};
      if (range.begin >= range.end) continue;
      Product::WithVectors(panel.vectors, [&](auto vectors) {
        AddTileToPanel<vectors.value>(panel, s, count, range, finite);
      });
    }
  }

  bool CopyValues(std::int64_t s, std::int64_t count) {
    return Tiles::Copy(args_.value + s * args_.value_stride, args_.value_stride, args_.value_size, count,
                       values());
  }

  template <int vectors>
  SOFTMAX2P_INLINE void AddTileToPanel(const Panel& panel, std::int64_t s, std::int64_t count, KeyRange range,
                                       bool finite) {
    const bool cut = Tiles::BandCuts(args_, panel.row, panel.row + panel.rows, s, range);
    const bool plain = !cut && args_.bias.data == nullptr && args_.mask.data == nullptr;
    const State state(panel.state);
    V maxima[vectors];
    Logits<vectors>(panel.queries, range, maxima);
    if (args_.soft_cap != 0) CapLogits<vectors>(range, maxima);
    if (!plain) {
      const LogitsTile<T> tile{logits(), bias(), mask(), vectors * V::kLanes};
      Tiles::template ApplyOperands<vectors>(args_, panel.row, panel.rows, s, range, cut, tile, state.best,
                                             maxima);
    } else {
      for (int i = 0; i < vectors * V::kLanes; ++i) state.best[i] = 0;
    }
    Raise<vectors>(state, panel.output, maxima) ? Exponentials<vectors, true>(state, range)
                                                : Exponentials<vectors, false>(state, range);
    const std::int64_t padded = RoundUp(range.end, kUnroll);
    if (finite || (!cut && args_.mask.data == nullptr)) {
      return AddValues<vectors>(panel.output, range.begin, padded);
    }
    Tiles::template TakeNonFinite<vectors>(values(), args_.value_size, range, logits(), panel.output);
    AddValues<vectors>(panel.output, range.begin, padded);
    CopyValues(s, count);
  }

  // logits = scale·K·Q^T, and the maxima of every row.
  template <int vectors>
  SOFTMAX2P_INLINE void Logits(const T* queries, KeyRange range, V (&maxima)[vectors]) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const V scale = V::Broadcast(args_.scale);
    SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) maxima[v] = V::Broadcast(kMinusInfinity<V>);
    for (std::int64_t j = range.begin; j < range.end; j += Product::kRows) {
      typename Product::template Tile<vectors> tile;
      tile.Clear();
      tile.AddProduct(Product::PackedTile(keys(), j, layout_.depth), Product::kPackedRows, queries,
                      layout_.depth);
      T* const to = logits() + j * kWidth;
      const std::int64_t count = range.end - j;
      SOFTMAX2P_UNROLL for (int i = 0; i < Product::kRows; ++i) {
        SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
          const V logit = i < count ? tile.c[i][v] * scale : V::Broadcast(kMinusInfinity<V>);
          logit.Store(to + i * kWidth + v * V::kLanes);
          maxima[v] = Max(logit, maxima[v]);
        }
      }
    }
  }

  // The same with the soft cap.
  template <int vectors>
  SOFTMAX2P_INLINE void CapLogits(KeyRange range, V (&maxima)[vectors]) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) maxima[v] = V::Broadcast(kMinusInfinity<V>);
    for (std::int64_t j = range.begin; j < range.end; ++j) {
      T* const at = logits() + j * kWidth;
      const auto capped = jax_softmax2p::CapLogits<V, vectors>(args_.soft_cap, at);
      SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
        capped.z[v].Store(at + v * V::kLanes);
        maxima[v] = Max(capped.z[v], maxima[v]);
      }
    }
  }

  // Raises the references of rows whose maximum exceeds their limit, and rescales what they have summed.
  // Returns whether any row is shifted.
  template <int vectors>
  SOFTMAX2P_INLINE bool Raise(const State& state, T* output, const V (&maxima)[vectors]) {
    bool raises = false;
    SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
      raises = raises || AnyGreater(maxima[v], V::Load(state.limit + v * V::kLanes));
    }
    if (raises) {
      alignas(64) T maximum[vectors * V::kLanes], factor[vectors * V::kLanes];
      SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) maxima[v].Store(maximum + v * V::kLanes);
      if (Rows::RaiseReferences(vectors * V::kLanes, maximum, state.reference, state.shift, state.limit,
                                factor)) {
        Rescale<vectors>(factor, state.sum, 1);
        Rescale<vectors>(factor, output, layout_.value_rows);
      }
    }
    for (int i = 0; i < vectors * V::kLanes; ++i) {
      if (state.shift[i] != 0) return true;
    }
    return false;
  }

  template <int vectors>
  static SOFTMAX2P_INLINE void Rescale(const T* factor, T* x, std::int64_t rows) {
    V factors[vectors];
    SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) factors[v] = V::Load(factor + v * V::kLanes);
    for (std::int64_t i = 0; i < rows; ++i) {
      SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
        T* const at = x + (i * vectors + v) * V::kLanes;
        (V::Load(at) * factors[v]).Store(at);
      }
    }
  }

  // Replaces the logits by their exponentials, and adds these to the sums.
  template <int vectors, bool shifted>
  SOFTMAX2P_INLINE void Exponentials(const State& state, KeyRange range) {
    constexpr std::int64_t kWidth = vectors * V::kLanes;
    const std::int64_t end = RoundUp(range.end, kUnroll);
    for (int v = 0; v < vectors; ++v) {
      const ExtExpKernel<V, 0> exp(V::Load(state.reference + v * V::kLanes));
      const V shift = V::Load(state.shift + v * V::kLanes);
      V sums[kUnroll];
      SOFTMAX2P_UNROLL for (int k = 0; k < kUnroll; ++k) sums[k] = V::Broadcast(0);
      T* at = logits() + range.begin * kWidth + v * V::kLanes;
      for (std::int64_t j = range.begin; j < end; j += kUnroll, at += kUnroll * kWidth) {
        V x[kUnroll];
        SOFTMAX2P_UNROLL for (int k = 0; k < kUnroll; ++k) {
          x[k] = V::Load(at + k * kWidth);
          if constexpr (shifted) x[k] = x[k] - shift;
        }
        const ExtExp<V, kUnroll> e = exp(x);
        SOFTMAX2P_UNROLL for (int k = 0; k < kUnroll; ++k) {
          const V p = e.Value(k);
          p.Store(at + k * kWidth);
          sums[k] = sums[k] + p;
        }
      }
      T* const sum = state.sum + v * V::kLanes;
      (V::Load(sum) + ((sums[0] + sums[1]) + (sums[2] + sums[3]))).Store(sum);
    }
  }

  template <int vectors>
  SOFTMAX2P_INLINE void AddValues(T* output, std::int64_t begin, std::int64_t end) {
    const std::int64_t stride = Tiles::ValueStride(args_.value_size);
    Product::template Accumulate<vectors>(values() + begin * stride, Product::kRows, stride,
                                          logits() + begin * vectors * V::kLanes,
                                          RoundUp(args_.value_size, Product::kRows), end - begin, output);
  }

  // Writes the output and the lse of a panel.
  void Finish(const Panel& panel) {
    const std::int64_t columns = panel.vectors * V::kLanes;
    const State state(panel.state);
    for (std::int64_t i = 0; i < layout_.value_rows; ++i) {
      for (std::int64_t c = 0; c < columns; c += V::kLanes) {
        T* const at = panel.output + i * columns + c;
        (V::Load(at) / V::Load(state.sum + c)).Store(at);
      }
    }
    Product::Unpack(panel.output, columns, layout_.value_rows, columns, rows(), layout_.value_rows);
    DoubleDouble<T> lses[kColumns];
    Rows::LseOf(columns, state.reference, state.shift, state.sum, lses);
    for (std::int64_t i = 0; i < panel.rows; ++i) {
      Rows::Write(args_, panel.row + i, state.sum[i], state.best[i], lses[i], rows() + i * layout_.value_rows,
                  [&] { return MeanOfValues(); });
    }
  }

  const T* MeanOfValues() {
    if (!has_mean_) Rows::MeanOfValues(args_, mean());
    has_mean_ = true;
    return mean();
  }

  const AttentionArgs<E>& args_;
  const std::int64_t begin_;
  const std::int64_t end_;
  const ScratchLayout layout_;
  T* const scratch_;
  bool has_mean_ = false;
};

}  // namespace jax_softmax2p
