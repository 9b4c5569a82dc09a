// Panels of rows in attention.h: what is known of them, and how a tile of packed keys and copied values is
// added. Nothing here depends on the type of the arrays.
#pragma once

#include <cstdint>

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/attention_logits.h"
#include "ffi/kernels/attention_rows.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/gemm.h"
#include "ffi/kernels/scratch_buffers.h"

namespace jax_softmax2p {

template <typename V>
class AttentionPanels {
  using T = typename V::Scalar;
  using Product = Gemm<V>;
  using Rows = AttentionRows<V, T>;
  using Tiles = AttentionLogits<V>;
  static constexpr int kColumns = Product::kColumns;
  static constexpr std::int64_t kKeys = Tiles::kKeys;

 public:
  // What is known of the rows of a panel, one after the other: see the top of attention.h.
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
    State state;

    std::int64_t Columns() const { return vectors * V::kLanes; }
  };

  // For the rows from `begin` to `end`.
  AttentionPanels(const AttentionShape<T>& shape, std::int64_t begin, std::int64_t end, T* scratch)
      : shape_(shape),
        begin_(begin),
        end_(end),
        layout_(shape, end - begin),
        scratch_(ScratchLayout::Aligned(scratch)) {}

  static std::int64_t Scratch(const AttentionShape<T>& shape, std::int64_t rows) {
    return ScratchLayout(shape, rows).total();
  }

  // Of packed queries and keys, and of the outputs of a panel.
  std::int64_t depth() const { return layout_.depth; }
  std::int64_t value_rows() const { return layout_.value_rows; }
  // Buffers: a tile of packed keys, one of copied values, rows before they are packed or written, and a row
  // of values.
  T* keys() const { return At(0); }
  T* values() const { return At(1); }
  T* rows() const { return At(2); }
  T* mean() const { return At(6); }

  // Calls body(panel) for one after the other.
  template <typename Body>
  void ForEach(const Body& body) const {
    std::int64_t i = 0;
    for (std::int64_t row = begin_; row < end_; ++i) {
      const Panel panel = PanelAt(row, i);
      body(panel);
      row += panel.rows;
    }
  }

  // A panel that attends to nothing yet.
  void Clear(const Panel& panel) const {
    for (std::int64_t i = 0; i < layout_.value_rows * panel.Columns(); ++i) panel.output[i] = 0;
    const State& state = panel.state;
    for (std::int64_t i = 0; i < panel.Columns(); ++i) {
      state.reference[i] = state.shift[i] = state.sum[i] = 0;
      state.limit[i] = state.best[i] = kMinusInfinity<V>;
    }
  }

  // Adds the tile of `count` keys from s on to a panel, if that attends to any. Returns false where the
  // copied values, which are `finite` or not, are as they were no more.
  bool AddTile(const Panel& panel, std::int64_t s, std::int64_t count, bool finite) const {
    const KeyRange range = Tiles::RangeInTile(panel.keys, s, count);
    if (range.begin >= range.end) return true;
    bool unchanged = true;
    Product::WithVectors(panel.vectors,
                         [&](auto vectors) { unchanged = AddKeys<vectors.value>(panel, s, range, finite); });
    return unchanged;
  }

  // Divides the outputs by the sums, leaves them row by row in rows(), and finds the lse.
  void Finish(const Panel& panel, DoubleDouble<T>* lse) const {
    const std::int64_t columns = panel.Columns();
    const State& state = panel.state;
    for (std::int64_t i = 0; i < layout_.value_rows; ++i) {
      for (std::int64_t c = 0; c < columns; c += V::kLanes) {
        T* const at = panel.output + i * columns + c;
        (V::Load(at) / V::Load(state.sum + c)).Store(at);
      }
    }
    Product::Unpack(panel.output, columns, layout_.value_rows, columns, rows(), layout_.value_rows);
    Rows::LseOf(columns, state.reference, state.shift, state.sum, lse);
  }

 private:
  // Where things lie in the scratch memory.
  struct ScratchLayout : ScratchBuffers<T, 8> {
    ScratchLayout(const AttentionShape<T>& shape, std::int64_t rows)
        : depth(RoundUp(shape.size, Product::kTranspose)),
          value_rows(RoundUp(shape.value_size, Product::kAlign)),
          panels(CeilDiv(rows, kColumns) + 1),
          panel_size((depth + value_rows) * kColumns + 5 * kColumns) {
      const std::int64_t widest = kColumns * (depth > value_rows ? depth : value_rows);
      const std::int64_t sizes[] = {kKeys * depth,
                                    kKeys * Tiles::CopiedStride(shape.value_size),
                                    widest > kKeys * depth ? widest : kKeys * depth,
                                    kKeys * kColumns,
                                    shape.bias.data != nullptr ? kKeys * kColumns : 0,
                                    kKeys * kColumns / static_cast<std::int64_t>(sizeof(T)),
                                    value_rows,
                                    panels * panel_size};
      this->Allot(sizes);
    }
    std::int64_t depth, value_rows, panels, panel_size;
  };

  T* At(int i) const { return layout_.At(scratch_, i); }
  T* logits() const { return At(3); }
  T* bias() const { return At(4); }
  std::uint8_t* mask() const { return reinterpret_cast<std::uint8_t*>(At(5)); }

  // The panel that begins at a row.
  Panel PanelAt(std::int64_t row, std::int64_t i) const {
    const int vectors = Product::VectorsOfPanel(CeilDiv(end_ - row, V::kLanes));
    const std::int64_t columns = vectors * V::kLanes, rows = columns < end_ - row ? columns : end_ - row;
    T* const state = At(7) + i * layout_.panel_size;
    T* const queries = state + 5 * kColumns;
    return {vectors,     row,
            rows,        shape_.KeysOfRows(row, row + rows),
            queries,     queries + layout_.depth * kColumns,
            State(state)};
  }

  template <int vectors>
  bool AddKeys(const Panel& panel, std::int64_t s, KeyRange range, bool finite) const {
    const bool cut = shape_.BandCuts(panel.row, panel.row + panel.rows, s, range);
    const bool masked = cut || shape_.mask.data != nullptr;
    const State& state = panel.state;
    V maxima[vectors];
    const auto clear = [&] {
      SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) maxima[v] = V::Broadcast(kMinusInfinity<V>);
    };
    clear();
    Tiles::template Multiply<vectors>(keys(), panel.queries, layout_.depth, shape_.scale, kMinusInfinity<V>,
                                      range, logits(), [&](V x, int v) { maxima[v] = Max(x, maxima[v]); });
    if (shape_.soft_cap != 0) {
      clear();
      Tiles::template Cap<vectors>(shape_.soft_cap, range, logits(), [&](const auto& capped, std::int64_t) {
        SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) maxima[v] = Max(capped.z[v], maxima[v]);
      });
    }
    const LogitsTile<T> tile{logits(), bias(), mask(), vectors * V::kLanes};
    if (masked || shape_.bias.data != nullptr) {
      Tiles::template ApplyOperands<vectors>(shape_, panel.row, panel.rows, s, range, cut, tile, state.best,
                                             maxima);
    } else {
      for (int i = 0; i < vectors * V::kLanes; ++i) state.best[i] = 0;
    }
    Rescale<vectors>(state, panel.output, maxima) ? Exponentials<vectors, true>(state, range)
                                                  : Exponentials<vectors, false>(state, range);
    if (shape_.HasDropout()) {
      Tiles::ReadDropoutMask(shape_, panel.row, panel.rows, s, range, tile);
      Tiles::template Drop<vectors>(range, mask(), logits());
    }
    return Tiles::template AddCopied<vectors>(values(), shape_.value_size, range, logits(), finite,
                                              masked || shape_.HasDropout(), panel.output);
  }

  // Raises the references of rows whose maximum exceeds their limit, and rescales what they have summed.
  // Returns whether any row is shifted.
  template <int vectors>
  SOFTMAX2P_INLINE bool Rescale(const State& state, T* output, const V (&maxima)[vectors]) const {
    bool raises = false;
    SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) {
      raises = raises || AnyGreater(maxima[v], V::Load(state.limit + v * V::kLanes));
    }
    if (raises) {
      alignas(64) T maximum[vectors * V::kLanes], factor[vectors * V::kLanes];
      SOFTMAX2P_UNROLL for (int v = 0; v < vectors; ++v) maxima[v].Store(maximum + v * V::kLanes);
      if (Rows::UpdateReferences(vectors * V::kLanes, maximum, state.reference, state.shift, state.limit,
                                 factor)) {
        MultiplyRows<vectors>(factor, state.sum, 1);
        MultiplyRows<vectors>(factor, output, layout_.value_rows);
      }
    }
    for (int i = 0; i < vectors * V::kLanes; ++i) {
      if (state.shift[i] != 0) return true;
    }
    return false;
  }

  template <int vectors>
  static SOFTMAX2P_INLINE void MultiplyRows(const T* factor, T* x, std::int64_t rows) {
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
  SOFTMAX2P_INLINE void Exponentials(const State& state, KeyRange range) const {
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

  const AttentionShape<T>& shape_;
  const std::int64_t begin_;
  const std::int64_t end_;
  const ScratchLayout layout_;
  T* const scratch_;
};

}  // namespace jax_softmax2p
