// One row of logits as the kernels take it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "ffi/kernels/table.h"
#include "ffi/ops/logits.h"

namespace jax_softmax2p {

// Elements to which the operands are applied at a time, where a row has more: 16 KiB of float32.
inline constexpr std::int64_t kLogitsBlock = 1 << 12;

// A row of logits of inner 1: x itself where there are no operands, otherwise z = scale·x + bias, masked,
// which is made in a buffer for the whole row, or for one block after the other.
//
// Masked elements at the row's ends are left out: elements count from begin(), and there are size() of them.
// In the methods `at` and `size` choose some of these.
template <typename E>
class LogitsRow {
  using T = ComputeOf<E>;

 public:
  // The elements of T that a row's constructor wants as buffer: none where a row is x itself, or too long.
  static std::int64_t BufferSize(const Logits<E>& logits) {
    return logits.HasOperands() && logits.n <= kLogitsBlock ? logits.n : 0;
  }
  // Whether what pass 1 computes of a row is worth keeping. Where operands are applied block by block, it is
  // computed again.
  static bool IsReloadable(const Logits<E>& logits) {
    return !logits.HasOperands() || logits.n <= kLogitsBlock;
  }

  // `buffer` has room for BufferSize(logits) elements, or is null: then operands are applied block by block.
  // It is the row's until another is constructed with it.
  LogitsRow(const Kernels& kernels, const Logits<E>& logits, std::int64_t row, T* buffer)
      : kernels_(&kernels), where_(logits.where.data), where_step_(logits.where.step), full_(logits.n) {
    args_ = {logits.x + row * logits.n, nullptr, nullptr, 1, 0, -std::numeric_limits<T>::infinity()};
    begin_ = 0;
    end_ = full_;
    has_operands_ = logits.HasOperands();
    if (!has_operands_) return;
    FindOperands(logits, row);
    if (buffer != nullptr) {
      maximum_ = ApplyOperands(0, size(), buffer);
      z_ = buffer;
    }
  }

  std::int64_t begin() const { return begin_; }
  std::int64_t size() const { return end_ - begin_; }

  // The largest element, NaNs passed over.
  T Maximum(std::int64_t at, std::int64_t size) const {
    if (!has_operands_) return kernels_->Of<E>().row_max(args_.x + at, size);
    T maximum = -std::numeric_limits<T>::infinity();
    ForBlocks(at, size, [&](std::int64_t, const T*, std::int64_t, T of_block) {
      maximum = std::max(maximum, of_block);
    });
    return maximum;
  }

  // Pass 1, as KernelTable::row_sum. `kept` is that of these elements.
  RowSum<T> Sum(std::int64_t at, std::int64_t size, const KeptRow<T>& kept,
                const KnownMaximum<T>& known) const {
    if (!has_operands_) return kernels_->Of<E>().row_sum(args_.x + at, kept, size, known);
    RowSum<T> sum;
    ForBlocks(at, size, [&](std::int64_t i, const T* z, std::int64_t count, T of_block) {
      // The maximum of a block is known from applying the operands.
      const bool subtracts = known.use == KnownMaximum<T>::kSubtract;
      const KnownMaximum<T> here{subtracts ? known.use : KnownMaximum<T>::kReference,
                                 subtracts ? known.value : of_block};
      sum.Combine(kernels_->Of<T>().row_sum(z, kept + i, count, here));
    });
    return sum;
  }

  // As KernelTable::row_split_sum. The maximum is known where it is to be subtracted alone.
  SplitSum<T> SumInParts(std::int64_t at, std::int64_t size, const KnownMaximum<T>& known) const {
    if (!has_operands_) return kernels_->Of<E>().row_split_sum(args_.x + at, size, known);
    SplitSum<T> sum;
    ForBlocks(at, size, [&](std::int64_t, const T* z, std::int64_t count, T) {
      sum.Combine(kernels_->Of<T>().row_split_sum(z, count, known));
    });
    return sum;
  }

  // Pass 2, as KernelTable::row_write. y is where the first of these elements' results go.
  void Write(std::int64_t at, std::int64_t size, const KeptRow<T>& kept, E* y, const RowScale<T>& scale,
             bool non_temporal) const {
    const KernelTable<E>& table = kernels_->Of<E>();
    if (!has_operands_) return table.row_write(args_.x + at, kept, y, size, scale, non_temporal);
    ForBlocks(at, size, [&](std::int64_t i, const T* z, std::int64_t count, T) {
      table.logits_row_write(z, kept + i, y + i, count, scale, non_temporal);
    });
  }

  // As KernelTable::row_write_log.
  void WriteLog(std::int64_t at, std::int64_t size, E* y, const LseTerms<T>& lse, bool non_temporal) const {
    const KernelTable<E>& table = kernels_->Of<E>();
    if (!has_operands_) return table.row_write_log(args_.x + at, y, size, lse, non_temporal);
    ForBlocks(at, size, [&](std::int64_t i, const T* z, std::int64_t count, T) {
      table.logits_row_write_log(z, y + i, count, lse, non_temporal);
    });
  }

  // Calls body(place among the `size` from `at`, scale·e^z as T, their number) for one block after the other.
  template <typename Body>
  void ForScaled(std::int64_t at, std::int64_t size, const RowScale<T>& scale, const Body& body) const {
    T y[kLogitsBlock];
    for (std::int64_t i = 0; i < size; i += kLogitsBlock) {
      const std::int64_t count = std::min(kLogitsBlock, size - i);
      if constexpr (std::is_same_v<E, T>) {
        if (!has_operands_) {
          kernels_->Of<T>().row_write(args_.x + at + i, {}, y, count, scale, false);
          body(i, y, count);
          continue;
        }
      }
      ApplyOperands(at + i, count, y);
      kernels_->Of<T>().row_write(y, {}, y, count, scale, false);
      body(i, y, count);
    }
  }

  // Whether element i, counted from the row's first, is masked.
  bool IsMasked(std::int64_t i) const {
    return i < begin_ || i >= end_ || (where_ != nullptr && where_[i * where_step_] == 0);
  }

  bool IsFullyMasked() const {
    for (std::int64_t i = begin_; i < end_; ++i) {
      if (!IsMasked(i)) return false;
    }
    return true;
  }

  bool HasNan() const {
    T z[kLogitsBlock];
    for (std::int64_t i = 0; i < size(); i += kLogitsBlock) {
      const std::int64_t count = std::min(kLogitsBlock, size() - i);
      ApplyOperands(i, count, z);
      if (std::any_of(z, z + count, [](T value) { return std::isnan(value); })) return true;
    }
    return false;
  }

  // Gives y, the whole row, the value at all masked elements.
  void FillMasked(E* y, E value) const {
    FillOutside(y, value);
    if (where_ == nullptr) return;
    for (std::int64_t i = begin_; i < end_; ++i) {
      if (where_[i * where_step_] == 0) y[i] = value;
    }
  }
  // The same at those before begin() and after these size() alone.
  void FillOutside(E* y, E value) const {
    std::fill(y, y + begin_, value);
    std::fill(y + end_, y + full_, value);
  }

  // Writes z of up to kLogitsBlock elements. Returns the largest, NaNs passed over.
  T ApplyOperands(std::int64_t at, std::int64_t count, T* z) const {
    ScaleBiasMaskArgs<E> args = args_;
    args.x += at;
    if (args.bias != nullptr) args.bias += at;
    if (args.where != nullptr) args.where += at;
    return kernels_->Of<E>().apply_scale_bias_mask(args, z, count);
  }

 private:
  // Finds the row's place in every operand, and the range outside which every element is masked.
  void FindOperands(const Logits<E>& logits, std::int64_t row) {
    std::int64_t scale = 0, bias = 0, where = 0, rest = row;
    for (std::size_t d = logits.dims.size(); d-- > 0;) {
      const std::int64_t i = rest % logits.dims[d];
      rest /= logits.dims[d];
      if (logits.scale.data != nullptr) scale += i * logits.scale.strides[d];
      if (logits.bias.data != nullptr) bias += i * logits.bias.strides[d];
      if (logits.where.data != nullptr) where += i * logits.where.strides[d];
    }
    if (logits.HasBand()) {
      const std::int64_t i = row % logits.dims.back();
      if (logits.band.before < i) begin_ = std::min(full_, i - logits.band.before);
      if (logits.band.after < full_ - 1 - i) end_ = std::max<std::int64_t>(0, i + logits.band.after + 1);
      end_ = std::max(begin_, end_);
    }
    if (logits.scale.data != nullptr) args_.scale = logits.scale.data[scale];
    if (logits.bias.data != nullptr) {
      if (logits.bias.step == 0) {
        args_.shift = Widen(logits.bias.data[bias]);
      } else {
        args_.bias = logits.bias.data + bias + begin_;
      }
    }
    args_.x += begin_;
    if (where_ == nullptr) return;
    where_ += where;
    if (where_step_ != 0) {
      args_.where = where_ + begin_;
    } else if (*where_ == 0) {
      end_ = begin_;
    }
  }

  // Calls body(place among the `size` from `at`, z, their number, an upper bound of their maximum).
  template <typename Body>
  void ForBlocks(std::int64_t at, std::int64_t size, const Body& body) const {
    if (z_ != nullptr) return body(0, z_ + at, size, maximum_);
    T z[kLogitsBlock];
    for (std::int64_t i = 0; i < size; i += kLogitsBlock) {
      const std::int64_t count = std::min(kLogitsBlock, size - i);
      const T of_block = ApplyOperands(at + i, count, z);
      body(i, z, count, of_block);
    }
  }

  const Kernels* kernels_;
  ScaleBiasMaskArgs<E> args_;
  const std::uint8_t* where_;
  std::int64_t where_step_;
  std::int64_t full_;
  std::int64_t begin_;
  std::int64_t end_;
  bool has_operands_;
  const T* z_ = nullptr;
  T maximum_ = 0;
};

}  // namespace jax_softmax2p
