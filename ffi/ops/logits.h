// What the kernels take a softmax of: rows of x, with the scale, the bias and the masks that are applied to
// them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "ffi/kernels/table.h"
#include "ffi/ops/column_tiles.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {

// An operand that broadcasts against x: element i of a row lies at data[(the row's offset) + i * step].
template <typename T>
struct Broadcast {
  const T* data = nullptr;
  std::vector<std::int64_t> strides;  // one for each of Logits::dims
  std::int64_t step = 0;
};

// Of row i of a matrix, the elements from i - before to i + after take part.
struct Band {
  static constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();
  std::int64_t before = kUnlimited;
  std::int64_t after = kUnlimited;
};

// scale·x + bias where the masks let it through. x is [rows/inner, n, inner], C-contiguous, along n. A row is
// found in the operands by its number, `first_row` more than that in x, counted by `dims`.
template <typename E>
struct Logits {
  const E* x = nullptr;
  std::vector<std::int64_t> dims;
  std::int64_t rows = 0;
  std::int64_t n = 0;
  std::int64_t inner = 1;
  std::int64_t first_row = 0;
  Broadcast<ComputeOf<E>> scale;
  Broadcast<E> bias;
  Broadcast<std::uint8_t> where;
  Band band;

  bool Banded() const { return band.before != Band::kUnlimited || band.after != Band::kUnlimited; }
  bool Masked() const { return where.data != nullptr || Banded(); }
  bool Plain() const { return scale.data == nullptr && bias.data == nullptr && !Masked(); }
};

// Elements to which the operands are applied at a time, where a row has more: 16 KiB of float32.
inline constexpr std::int64_t kLogitsBlock = 1 << 12;

// A row, of logits of inner 1, as the kernels are to see it: as it is, or with the operands applied, to all
// of it in a buffer, or to one block after the other.
template <typename E>
class LogitsRow {
  using T = ComputeOf<E>;

 public:
  // `buffer` has room for kLogitsBlock elements, or is null: then blocks are used. It is the row's until the
  // next one's construction.
  LogitsRow(const Kernels& kernels, const Logits<E>& logits, std::int64_t row, T* buffer)
      : kernels_(&kernels),
        where_(logits.where.data),
        bias_step_(logits.bias.step),
        where_step_(logits.where.step),
        full_(logits.n) {
    run_ = {logits.x + row * logits.n, nullptr, nullptr, 1, 0, -std::numeric_limits<T>::infinity()};
    begin_ = 0;
    end_ = full_;
    plain_ = logits.Plain();
    if (plain_) return;
    Place(logits, logits.first_row + row);
    if (buffer != nullptr && size() <= kLogitsBlock) {
      maximum_ = ApplyScaleBiasMask(0, size(), buffer);
      fused_ = buffer;
    }
  }

  // The elements that may take part, by their place in the row; the methods below count from the first.
  std::int64_t begin() const { return begin_; }
  std::int64_t size() const { return end_ - begin_; }

  // NaNs passed over.
  T Maximum(std::int64_t at, std::int64_t size) const {
    if (plain_) return kernels_->Of<E>().row_max(run_.x + at, size);
    T maximum = -std::numeric_limits<T>::infinity();
    ForBlocks(at, size, [&](std::int64_t, const T*, std::int64_t, T of_block) {
      maximum = std::max(maximum, of_block);
    });
    return maximum;
  }

  RowSum<T> Sum(std::int64_t at, std::int64_t size, T* kept, const KnownMaximum<T>& known) const {
    if (plain_) return kernels_->Of<E>().row_sum(run_.x + at, kept, size, known);
    RowSum<T> sum;
    ForBlocks(at, size, [&](std::int64_t i, const T* z, std::int64_t count, T of_block) {
      // Known from applying the operands, it need not be looked for.
      const bool subtracts = known.use == KnownMaximum<T>::kSubtract;
      const KnownMaximum<T> here{subtracts ? known.use : KnownMaximum<T>::kReference,
                                 subtracts ? known.value : of_block};
      sum.Combine(kernels_->Of<T>().row_sum(z, kept == nullptr ? nullptr : kept + i, count, here));
    });
    return sum;
  }

  // y is where the first of these elements' results go.
  void Write(std::int64_t at, std::int64_t size, const T* kept, E* y, const RowScale<T>& scale,
             bool non_temporal) const {
    const KernelTable<E>& own = kernels_->Of<E>();
    if (plain_) return own.row_write(run_.x + at, kept, y, size, scale, non_temporal);
    ForBlocks(at, size, [&](std::int64_t i, const T* z, std::int64_t count, T) {
      own.logits_row_write(z, kept == nullptr ? nullptr : kept + i, y + i, count, scale, non_temporal);
    });
  }

  void WriteLog(std::int64_t at, std::int64_t size, E* y, const LseTerms<T>& sum, bool non_temporal) const {
    const KernelTable<E>& own = kernels_->Of<E>();
    if (plain_) return own.row_write_log(run_.x + at, y, size, sum, non_temporal);
    ForBlocks(at, size, [&](std::int64_t i, const T* z, std::int64_t count, T) {
      own.logits_row_write_log(z, y + i, count, sum, non_temporal);
    });
  }

  // Calls body(place among the `size` from `at`, scale·e^z as T, their number) for one block after the other.
  template <typename Body>
  void ForScaled(std::int64_t at, std::int64_t size, const RowScale<T>& scale, const Body& body) const {
    T y[kLogitsBlock];
    for (std::int64_t i = 0; i < size; i += kLogitsBlock) {
      const std::int64_t count = std::min(kLogitsBlock, size - i);
      if constexpr (std::is_same_v<E, T>) {
        if (plain_) {
          kernels_->Of<T>().row_write(run_.x + at + i, nullptr, y, count, scale, false);
          body(i, y, count);
          continue;
        }
      }
      ApplyScaleBiasMask(at + i, count, y);
      kernels_->Of<T>().row_write(y, nullptr, y, count, scale, false);
      body(i, y, count);
    }
  }

  bool Masked(std::int64_t i) const {
    return i < begin_ || i >= end_ || (where_ != nullptr && where_[i * where_step_] == 0);
  }

  bool HasNan() const {
    T z[kLogitsBlock];
    for (std::int64_t i = 0; i < size(); i += kLogitsBlock) {
      const std::int64_t count = std::min(kLogitsBlock, size() - i);
      ApplyScaleBiasMask(i, count, z);
      if (std::any_of(z, z + count, [](T value) { return std::isnan(value); })) return true;
    }
    return false;
  }

  // Gives y, the whole row, the value where a mask is.
  void FillMasked(E* y, E value) const {
    FillOutside(y, value);
    if (where_ == nullptr) return;
    for (std::int64_t i = begin_; i < end_; ++i) {
      if (where_[i * where_step_] == 0) y[i] = value;
    }
  }
  // The same where the band is alone.
  void FillOutside(E* y, E value) const {
    std::fill(y, y + begin_, value);
    std::fill(y + end_, y + full_, value);
  }

  // Of up to kLogitsBlock elements, as T, with the operands applied. Returns the largest, NaNs passed over.
  T ApplyScaleBiasMask(std::int64_t at, std::int64_t count, T* z) const {
    ScaleBiasMaskArgs<E> args = run_;
    args.x += at;
    E bias[kLogitsBlock];
    std::uint8_t where[kLogitsBlock];
    args.bias = Contiguous(args.bias, at, count, bias_step_, bias);
    args.where = Contiguous(args.where, at, count, where_step_, where);
    return kernels_->Of<E>().apply_scale_bias_mask(args, z, count);
  }

 private:
  // Finds the row's part of every operand.
  void Place(const Logits<E>& logits, std::int64_t row) {
    std::int64_t scale = 0, bias = 0, where = 0, rest = row;
    for (std::size_t d = logits.dims.size(); d-- > 0;) {
      const std::int64_t i = rest % logits.dims[d];
      rest /= logits.dims[d];
      if (logits.scale.data != nullptr) scale += i * logits.scale.strides[d];
      if (logits.bias.data != nullptr) bias += i * logits.bias.strides[d];
      if (logits.where.data != nullptr) where += i * logits.where.strides[d];
    }
    if (logits.Banded()) {
      const std::int64_t i = row % logits.dims.back();
      if (logits.band.before < i) begin_ = std::min(full_, i - logits.band.before);
      if (logits.band.after < full_ - 1 - i) end_ = std::max<std::int64_t>(0, i + logits.band.after + 1);
      end_ = std::max(begin_, end_);
    }
    if (logits.scale.data != nullptr) run_.scale = logits.scale.data[scale];
    if (logits.bias.data != nullptr) {
      if (logits.bias.step == 0) {
        run_.shift = static_cast<T>(Widen(logits.bias.data[bias]));
      } else {
        run_.bias = logits.bias.data + bias + begin_ * bias_step_;
      }
    }
    run_.x += begin_;
    if (where_ == nullptr) return;
    where_ += where;
    if (where_step_ != 0) {
      run_.where = where_ + begin_ * where_step_;
    } else if (*where_ == 0) {
      end_ = begin_;
    }
  }

  // Elements from `at` on, copied where there is a step between them, as there is along an axis that is not
  // the last.
  template <typename Element>
  static const Element* Contiguous(const Element* from, std::int64_t at, std::int64_t count,
                                   std::int64_t step, Element* buffer) {
    if (from == nullptr) return nullptr;
    from += at * step;
    if (step == 1) return from;
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = from[i * step];
    return buffer;
  }

  // Calls body(place among the `size` from `at`, logits, their number, the largest of them or more).
  template <typename Body>
  void ForBlocks(std::int64_t at, std::int64_t size, const Body& body) const {
    if (fused_ != nullptr) return body(0, fused_ + at, size, maximum_);
    T z[kLogitsBlock];
    for (std::int64_t i = 0; i < size; i += kLogitsBlock) {
      const std::int64_t count = std::min(kLogitsBlock, size - i);
      const T of_block = ApplyScaleBiasMask(at + i, count, z);
      body(i, z, count, of_block);
    }
  }

  const Kernels* kernels_;
  ScaleBiasMaskArgs<E> run_;
  const std::uint8_t* where_;
  std::int64_t bias_step_;
  std::int64_t where_step_;
  std::int64_t full_;
  std::int64_t begin_;
  std::int64_t end_;
  bool plain_;
  const T* fused_ = nullptr;
  T maximum_ = 0;
};

// What pass 1 finds: the sum of e^z, or of e^(z - maximum) where `subtract`.
template <typename T>
struct RowTotal : RowSum<T> {
  bool subtract = false;
};

template <typename E>
ComputeOf<E> MaximumOf(const LogitsRow<E>& row, const Segments& segments) {
  using T = ComputeOf<E>;
  return segments.Reduce<T>([&](std::int64_t at, std::int64_t size) { return row.Maximum(at, size); },
                            [](T& a, T b) { a = std::max(a, b); });
}

template <typename E>
RowSum<ComputeOf<E>> SumOf(const LogitsRow<E>& row, const Segments& segments, ComputeOf<E>* kept,
                           const KnownMaximum<ComputeOf<E>>& known) {
  using Sum = RowSum<ComputeOf<E>>;
  return segments.Reduce<Sum>(
      [&](std::int64_t at, std::int64_t size) {
        return row.Sum(at, size, kept == nullptr ? nullptr : kept + at, known);
      },
      [](Sum& a, const Sum& b) { a.Combine(b); });
}

// y is where the first element's result goes.
template <typename E>
void WriteOf(const LogitsRow<E>& row, const Segments& segments, const ComputeOf<E>* kept, E* y,
             const RowScale<ComputeOf<E>>& scale, bool non_temporal) {
  // In the caches, what pass 1 did last is nearest: 2^20 float32 on two threads took 0.098 ns an element so,
  // and 0.110 forward. From memory, forward is faster: 0.26 against 0.29, at 2^24 on one (Zen 5).
  segments.ForEach(non_temporal ? Order::kForward : Order::kBackward,
                   [&](std::int64_t at, std::int64_t size) {
                     row.Write(at, size, kept == nullptr ? nullptr : kept + at, y + at, scale, non_temporal);
                     if (non_temporal && row.size() > kSegment) FenceNonTemporalStores();
                   });
}

// Pass 1, and the guard: where the row's largest element takes the sum out of the range in which kernels are
// exact, a third pass subtracts the maximum. At that size, by Sterbenz's lemma, z - maximum is exact wherever
// e^(z - maximum) does not vanish. A maximum that is infinite is not subtracted: the sum is NaN then.
template <typename E>
RowTotal<ComputeOf<E>> TotalOf(const LogitsRow<E>& row, const Segments& segments, int max_exponent,
                               ComputeOf<E>* kept, bool maximum_first) {
  using T = ComputeOf<E>;
  KnownMaximum<T> known;
  if (maximum_first) known = {KnownMaximum<T>::kReference, MaximumOf(row, segments)};
  RowTotal<T> total{SumOf(row, segments, kept, known)};
  if (std::abs(total.sum.exponent) < max_exponent) return total;
  total.subtract = true;
  if (std::isinf(total.maximum)) {
    total.sum.mantissa.hi = std::numeric_limits<double>::quiet_NaN();
  } else {
    total.sum = SumOf(row, segments, nullptr, {KnownMaximum<T>::kSubtract, total.maximum}).sum;
  }
  return total;
}

// Calls body(first row, number of rows, z) for a few rows of up to kMaxSmall elements at a time, with their
// logits as T; z is null where no operand is to be applied, unless `always`.
template <typename E, typename Body>
void ForSmallRows(const Kernels& kernels, Executor& executor, const Logits<E>& logits, const Body& body,
                  bool always = false) {
  using T = ComputeOf<E>;
  const bool fused = !logits.Plain();
  const std::int64_t n = logits.n, most = kLogitsBlock / n;
  ForWholeRows(executor, logits.rows, n, [&](std::int64_t first, std::int64_t end) {
    T z[kLogitsBlock];
    for (std::int64_t r = first; r < end; r += most) {
      const std::int64_t count = std::min(most, end - r);
      for (std::int64_t i = 0; i < count && fused; ++i) {
        const LogitsRow<E> row(kernels, logits, r + i, nullptr);
        if (row.size() < n) std::fill(z + i * n, z + (i + 1) * n, -std::numeric_limits<T>::infinity());
        row.ApplyScaleBiasMask(0, row.size(), z + i * n + row.begin());
      }
      if (always && !fused) {
        const T no_mask = -std::numeric_limits<T>::infinity();
        kernels.Of<E>().apply_scale_bias_mask({logits.x + r * n, nullptr, nullptr, 1, 0, no_mask}, z,
                                              count * n);
      }
      body(r, count, fused || always ? z : nullptr);
    }
  });
}

// Leaves out of an operand's description what does not matter, and merges dimensions of x that all operands
// step through alike: fewer divisions to find a row's part.
template <typename E>
void Simplify(Logits<E>& logits) {
  // A band counts rows by the last dimension.
  const std::size_t fixed = logits.Banded() ? 1 : 0;
  const auto merges = [](const auto& operand, std::size_t d, std::int64_t size) {
    return operand.data == nullptr || operand.strides[d - 1] == operand.strides[d] * size;
  };
  for (std::size_t d = logits.dims.size() - fixed; d-- > 1;) {
    const std::int64_t size = logits.dims[d];
    if (!merges(logits.scale, d, size) || !merges(logits.bias, d, size) || !merges(logits.where, d, size)) {
      continue;
    }
    logits.dims[d - 1] *= size;
    logits.dims.erase(logits.dims.begin() + static_cast<std::ptrdiff_t>(d));
    const auto erase = [d](auto& operand) {
      if (operand.data == nullptr) return;
      operand.strides[d - 1] = operand.strides[d];
      operand.strides.erase(operand.strides.begin() + static_cast<std::ptrdiff_t>(d));
    };
    erase(logits.scale);
    erase(logits.bias);
    erase(logits.where);
  }
}

// Calls body(logits of inner 1, their rows of y, executor) for some columns of logits after the other, until
// all had their turn. The rows of y are those of x, too, until they are written. Where `y` is null they are
// not put back.
template <typename E, typename Body>
void ForColumnLogits(const Kernels& kernels, Executor& executor, const Logits<E>& logits, E* y,
                     const Body& body) {
  const auto some = [&](std::int64_t first, std::int64_t end, std::int64_t width, Executor& for_rows) {
    ColumnTile<E> tile(kernels.Of<E>(), logits.n, logits.inner, width);
    Logits<E> rows = logits;
    rows.x = tile.rows();
    rows.inner = 1;
    for (rows.first_row = first; rows.first_row < end; rows.first_row += width) {
      rows.rows = std::min(width, end - rows.first_row);
      tile.Pack(logits.x, rows.first_row, rows.rows);
      body(rows, tile.rows(), for_rows);
      if (y != nullptr) tile.Unpack(y, rows.first_row, rows.rows);
    }
  };
  ForColumns(executor, logits.rows, logits.n, some);
}

}  // namespace jax_softmax2p
