// Softmax of contiguous rows: which row is in which pass, and where what pass 1 keeps lies.

#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>

#include "ffi/ops/guarded_sum.h"
#include "ffi/ops/logits_row.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"
#include "ffi/ops/write_row.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

// Up to so many elements, pass 1 of a row comes before pass 2 of the row above it: what ends pass 1, a chain
// of operations on single numbers, takes some 40 ns that the CPU fills with pass 2 of the other. Two rows and
// what is kept of them stay in the first-level cache.
constexpr std::int64_t kMaxInterleavedRow = 1 << 11;

// 1/sum as a T and what that T leaves out.
template <typename T>
RowScale<T> ScaleFromSum(const GuardedRowSum<T>& row_sum) {
  const CompensatedSum& mantissa = row_sum.sum.mantissa;
  const double inverse = 1 / mantissa.hi;
  const double error = (std::fma(-inverse, mantissa.hi, 1.0) - inverse * mantissa.lo) * inverse;
  const DoubleDouble<T> rounded = ToDoubleDouble<T>(inverse, error);
  RowScale<T> scale{};
  scale.hi = rounded.hi;
  scale.lo = rounded.lo;
  scale.exponent = row_sum.sum.exponent;
  scale.subtract_shift = row_sum.subtract;
  if (row_sum.subtract) scale.shift_hi = row_sum.maximum;
  return scale;
}

// Both passes over rows of one array. Rows that are interleaved have two slots of scratch, which they take
// in turn.
template <typename E>
class RowsSoftmax {
  using T = ComputeOf<E>;

 public:
  RowsSoftmax(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits,
              E* y)
      : kernels_(kernels),
        executor_(executor),
        plan_(plan),
        logits_(logits),
        y_(y),
        slots_(logits.n <= kMaxInterleavedRow ? 2 : 1),
        reload_(plan.reload && LogitsRow<E>::IsReloadable(logits)),
        kept_in_y_(std::is_same_v<E, T> && logits.x != y && !plan.non_temporal),
        buffer_size_(LogitsRow<E>::BufferSize(logits)) {
    const std::int64_t size = slots_ * ((reload_ && !kept_in_y_ ? logits.n : 0) + buffer_size_);
    // Without memory for scratch the rows are recomputed instead.
    if (size != 0) scratch_.reset(new (std::nothrow) T[size]);
  }

  void Compute(std::int64_t first, std::int64_t end) {
    if (slots_ == 1) {
      for (std::int64_t r = first; r < end; ++r) Write(r, Sum(r));
    } else if (first < end) {
      RowScale<T> next = Sum(first);
      for (std::int64_t r = first; r < end; ++r) {
        const RowScale<T> scale = next;
        if (r + 1 < end) next = Sum(r + 1);
        Write(r, scale);
      }
    }
    if (plan_.non_temporal) FenceNonTemporalStores();
  }

 private:
  // Where what pass 1 keeps of a row goes: y will do, unless x is still needed there, or y has no room for a
  // T, or must not come into the caches.
  T* Kept(std::int64_t r, const LogitsRow<E>& row) const {
    if (!reload_) return nullptr;
    if constexpr (std::is_same_v<E, T>) {
      if (kept_in_y_) return y_ + r * logits_.n + row.begin();
    }
    return scratch_ == nullptr ? nullptr : scratch_.get() + slots_ * buffer_size_ + r % slots_ * logits_.n;
  }

  // Pass 1.
  RowScale<T> Sum(std::int64_t r) {
    T* const buffer =
        buffer_size_ == 0 || scratch_ == nullptr ? nullptr : scratch_.get() + r % slots_ * buffer_size_;
    const LogitsRow<E>& row = rows_[r % slots_].emplace(kernels_, logits_, r, buffer);
    return ScaleFromSum(GuardedSum(row, Segments(executor_, row.size()), kernels_.Of<E>().max_exponent,
                                   Kept(r, row), plan_.maximum_first));
  }

  // Pass 2.
  void Write(std::int64_t r, const RowScale<T>& scale) const {
    const LogitsRow<E>& row = *rows_[r % slots_];
    E* const y = y_ + r * logits_.n;
    WriteRow(row, Segments(executor_, row.size()), Kept(r, row), y + row.begin(), scale, plan_.non_temporal);
    if (!logits_.HasMask()) return;
    if (std::isnan(scale.hi)) {
      row.FillMasked(y, E{});
    } else {
      row.FillOutside(y, E{});
    }
  }

  const Kernels& kernels_;
  Executor& executor_;
  SoftmaxPlan plan_;
  const Logits<E>& logits_;
  E* y_;
  std::int64_t slots_;
  bool reload_;
  bool kept_in_y_;
  std::int64_t buffer_size_;  // of one slot
  std::unique_ptr<T[]> scratch_;
  std::optional<LogitsRow<E>> rows_[2];
};

}  // namespace

template <typename E>
void SoftmaxRows(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits,
                 E* y) {
  ParallelForRows(executor, logits.rows, logits.n,
                  [&](std::int64_t first, std::int64_t end, Executor& segments_executor) {
                    RowsSoftmax<E>(kernels, segments_executor, plan, logits, y).Compute(first, end);
                  });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void SoftmaxRows(const Kernels&, Executor&, const SoftmaxPlan&, const Logits<E>&, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
