// A panel of columns of logits as the kernels take it: what logits_row.h is for rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "ffi/kernels/table.h"
#include "ffi/ops/column_panels.h"
#include "ffi/ops/logits.h"

namespace jax_softmax2p {

// Calls body(offset, step, columns) for runs of columns of an operand, from row `row` of the logits on, until
// `width` columns are done: column c of a run begins at data[offset + c * step].
template <typename Body>
void ForOperandRuns(const std::vector<std::int64_t>& dims, const std::vector<std::int64_t>& strides,
                    std::int64_t row, std::int64_t width, const Body& body) {
  const std::size_t last = dims.size() - 1;
  for (std::int64_t done = 0; done < width;) {
    std::int64_t offset = 0, rest = row + done;
    for (std::size_t d = dims.size(); d-- > 0; rest /= dims[d]) offset += rest % dims[d] * strides[d];
    const std::int64_t columns = std::min(width - done, dims[last] - (row + done) % dims[last]);
    body(offset, strides[last], columns);
    done += columns;
  }
}

// A bias or a mask of a panel: read where it lies, if its columns are adjacent or all the same, and otherwise
// copied, once where it does not vary along the axis, or block by block.
template <typename Element>
class PanelOperandRows {
 public:
  // Becomes that of `width` columns from row `row` of the logits on.
  void Move(const BroadcastOperand<Element>& operand, const std::vector<std::int64_t>& dims, std::int64_t row,
            int width) {
    data_ = operand.data;
    if (data_ == nullptr) return;
    stride_ = operand.step;
    columns_.clear();
    ForOperandRuns(dims, operand.strides, row, width,
                   [&](std::int64_t offset, std::int64_t step, std::int64_t columns) {
                     for (std::int64_t c = 0; c < columns; ++c) columns_.push_back(offset + c * step);
                   });
    step_ = width > 1 ? static_cast<int>(std::clamp<std::int64_t>(columns_[1] - columns_[0], 0, 1)) : 0;
    is_regular_ = true;
    for (int c = 1; c < width; ++c) is_regular_ = is_regular_ && columns_[c] == columns_[0] + c * step_;
    if (!is_regular_ && stride_ == 0) Copy(0, 1, copy_);
  }

  // Rows from `begin` on; they may be copied into the buffer, which has room for kPanelBlock of them.
  PanelOperand<Element> Rows(std::int64_t begin, std::int64_t rows, Element* buffer) const {
    if (data_ == nullptr) return {nullptr, 0, 0};
    if (is_regular_) return {data_ + columns_[0] + begin * stride_, stride_, step_};
    if (stride_ == 0) return {copy_, 0, 1};
    Copy(begin, rows, buffer);
    return {buffer, kPanelWidth, 1};
  }

  // Element i of column c, or null.
  const Element* At(int c, std::int64_t i) const {
    return data_ == nullptr ? nullptr : data_ + columns_[c] + i * stride_;
  }

 private:
  void Copy(std::int64_t begin, std::int64_t rows, Element* to) const {
    for (std::int64_t i = 0; i < rows; ++i) {
      const Element* const from = data_ + (begin + i) * stride_;
      for (std::size_t c = 0; c < columns_.size(); ++c) to[i * kPanelWidth + c] = from[columns_[c]];
    }
  }

  const Element* data_ = nullptr;
  std::vector<std::int64_t> columns_;  // where they begin
  std::int64_t stride_ = 0;
  int step_ = 0;
  bool is_regular_ = true;
  Element copy_[kPanelWidth];
};

// A panel of logits: x itself where that is a T and lies as the kernels take it; otherwise z = scale·x +
// bias, masked, which is made block by block.
template <typename E>
class LogitsPanel {
  using T = ComputeOf<E>;

 public:
  LogitsPanel(const Kernels& kernels, const Logits<E>& logits, const ColumnPanel& panel)
      : kernels_(&kernels),
        logits_(&logits),
        panel_(panel),
        scale_(static_cast<std::size_t>(panel.width())) {}

  // Becomes panel number p.
  void Move(std::int64_t p) {
    panel_.Move(p);
    if (IsX()) return;
    const std::int64_t row = panel_.row();
    const int width = panel_.width();
    bias_.Move(logits_->bias, logits_->dims, row, width);
    where_.Move(logits_->where, logits_->dims, row, width);
    std::fill(scale_.begin(), scale_.end(), T{1});
    if (logits_->scale.data == nullptr) return;
    auto to = scale_.begin();
    ForOperandRuns(logits_->dims, logits_->scale.strides, row, width,
                   [&](std::int64_t offset, std::int64_t step, std::int64_t columns) {
                     for (std::int64_t c = 0; c < columns; ++c)
                       *to++ = logits_->scale.data[offset + c * step];
                   });
  }

  const ColumnPanel& panel() const { return panel_; }

  // Calls body(z, panel of its rows, first row) for all rows of a segment in order.
  template <typename Body>
  void ForBlocks(const ColumnPanel::Segment& segment, const Body& body) const {
    if constexpr (std::is_same_v<E, T>) {
      if (IsX()) {
        const std::int64_t stride = panel_.stride();
        return body(logits_->x + panel_.first() + segment.begin * stride,
                    panel_.Rows(segment, segment.rows, stride), segment.begin);
      }
    }
    PanelRows<const E> x(panel_, logits_->x);
    alignas(64) T z[kPanelBlock * kPanelWidth];
    ForPanelRows(segment, true, [&](std::int64_t begin, std::int64_t rows) {
      if constexpr (std::is_same_v<E, T>) {
        if (!logits_->HasOperands()) {
          const T* from = x.Load(begin, rows);
          if (!panel_.IsGroup()) {
            CopyRows<T>(from, x.stride(), z, kPanelWidth, rows, panel_.width());
            from = z;
          }
          return body(from, panel_.Rows(segment, rows, kPanelWidth), begin);
        }
      }
      E bias[kPanelBlock * kPanelWidth];
      std::uint8_t where[kPanelBlock * kPanelWidth];
      const PanelLogits<E> logits{x.Load(begin, rows), x.stride(), scale_.data(),
                                  bias_.Rows(begin, rows, bias), where_.Rows(begin, rows, where)};
      kernels_->Of<E>().panel_apply(logits, rows, panel_.width(), z, kPanelWidth);
      body(z, panel_.Rows(segment, rows, kPanelWidth), begin);
    });
  }

  bool IsMasked(int c, std::int64_t i) const {
    const std::uint8_t* const where = where_.At(c, i);
    return where != nullptr && *where == 0;
  }

  bool IsFullyMasked(int c) const {
    for (std::int64_t i = 0; i < logits_->n; ++i) {
      if (!IsMasked(c, i)) return false;
    }
    return true;
  }

  // Element i of column c.
  T At(int c, std::int64_t i) const {
    const E* const x = logits_->x + panel_.FirstOf(c) + i * panel_.stride();
    if constexpr (std::is_same_v<E, T>) {
      if (!logits_->HasOperands()) return *x;
    }
    if (IsMasked(c, i)) return -std::numeric_limits<T>::infinity();  // A call takes longer.
    T z;
    const PanelLogits<E> logits{x, 0, &scale_[static_cast<std::size_t>(c)], {bias_.At(c, i), 0, 0}, {}};
    kernels_->Of<E>().panel_apply(logits, 1, 1, &z, 1);
    return z;
  }

  // Of every column c the element indices[c], if that is not below 0 and not masked.
  void ReadElements(const std::int64_t* indices, T* z, bool* has_element) const {
    const int width = panel_.width();
    if constexpr (std::is_same_v<E, T>) {
      if (!logits_->HasOperands() && !panel_.IsGroup()) {
        const E* const x = logits_->x + panel_.first();
        const std::int64_t stride = panel_.stride();
        for (int c = 0; c < width; ++c) {
          has_element[c] = indices[c] >= 0;
          z[c] = x[c + std::max<std::int64_t>(indices[c], 0) * stride];
        }
        return;
      }
    }
    for (int c = 0; c < width; ++c) {
      has_element[c] = indices[c] >= 0 && !IsMasked(c, indices[c]);
      z[c] = has_element[c] ? At(c, indices[c]) : T{0};
    }
  }

  bool HasNan(int c) const {
    for (std::int64_t i = 0; i < logits_->n; ++i) {
      if (std::isnan(At(c, i))) return true;
    }
    return false;
  }

  // Gives y the value at all masked elements of column c.
  void FillMasked(int c, E* y, E value) const {
    E* const column = y + panel_.FirstOf(c);
    for (std::int64_t i = 0; i < logits_->n; ++i) {
      if (IsMasked(c, i)) column[i * panel_.stride()] = value;
    }
  }

 private:
  bool IsX() const {
    return std::is_same_v<E, T> && !logits_->HasOperands() && !panel_.IsGroup() && !RowsShareSets();
  }
  // Whether a block's rows would push each other out of a first-level cache of 8 ways and 4096 bytes each.
  bool RowsShareSets() const { return panel_.stride() * static_cast<std::int64_t>(sizeof(E)) % 4096 == 0; }

  const Kernels* kernels_;
  const Logits<E>* logits_;
  ColumnPanel panel_;
  std::vector<T> scale_;
  PanelOperandRows<E> bias_;
  PanelOperandRows<std::uint8_t> where_;
};

}  // namespace jax_softmax2p
