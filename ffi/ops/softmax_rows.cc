// Softmax of contiguous rows: which row is in which pass, and where what pass 1 keeps lies.

#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>

#include "ffi/kernels/log.h"
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
    const std::int64_t blocks = CeilDiv(logits.n, kRowBlock<T>);
    if (!reload_ || blocks <= kMaxFewBlocks) return;
    many_references_.reset(new (std::nothrow) T[blocks]);
    reload_ = many_references_ != nullptr;
  }

  void Compute(std::int64_t first, std::int64_t end) {
    if (slots_ == 1) {
      for (std::int64_t r = first; r < end; ++r) {
        Sum(r);
        Write(r);
      }
    } else if (first < end) {
      Sum(first);
      for (std::int64_t r = first; r < end; ++r) {
        if (r + 1 < end) Sum(r + 1);
        Write(r);
      }
    }
    if (plan_.non_temporal) FenceNonTemporalStores();
  }

 private:
  // A row of two slots has no more.
  static constexpr std::int64_t kMaxFewBlocks = kMaxInterleavedRow / kRowBlock<double>;

  // Where what pass 1 keeps of a row goes: y will do, unless x is still needed there, or y has no room for a
  // T, or must not come into the caches.
  KeptRow<T> Kept(std::int64_t r, const LogitsRow<E>& row) {
    if (!reload_) return {};
    T* const references = many_references_ != nullptr ? many_references_.get() : few_references_[r % slots_];
    if constexpr (std::is_same_v<E, T>) {
      if (kept_in_y_) return {y_ + r * logits_.n + row.begin(), references};
    }
    if (scratch_ == nullptr) return {};
    return {scratch_.get() + slots_ * buffer_size_ + r % slots_ * logits_.n, references};
  }

  // Pass 1.
  void Sum(std::int64_t r) {
    T* const buffer =
        buffer_size_ == 0 || scratch_ == nullptr ? nullptr : scratch_.get() + r % slots_ * buffer_size_;
    const LogitsRow<E>& row = rows_[r % slots_].emplace(kernels_, logits_, r, buffer);
    const GuardedRowSum<T> sum = GuardedSum(row, Segments(executor_, row.size()),
                                            kernels_.Of<E>().max_exponent, Kept(r, row), plan_.maximum_first);
    ScaleFromSum(sum.of.sum, sum.subtract, sum.of.maximum, scales_[r % slots_]);
    const KernelTable<E>& table = kernels_.Of<E>();
    if (table.factor == 1) return;
    const T largest = sum.subtract ? 0 : sum.of.maximum;
    const ExtendedSum& total = sum.of.sum;
    T expm1, pow2;
    table.exponentials(&largest, 1, total.exponent, &expm1, &pow2);
    scales_[r % slots_].dominated = IsDominated(total.mantissa.hi, total.mantissa.lo, pow2, expm1);
  }

  // Pass 2.
  void Write(std::int64_t r) {
    const RowScale<T>& scale = scales_[r % slots_];
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
  T few_references_[2][kMaxFewBlocks];
  std::unique_ptr<T[]> many_references_;  // of rows of more blocks, which are not interleaved
  RowScale<T> scales_[2];
  std::optional<LogitsRow<E>> rows_[2];
};

}  // namespace

template <typename E>
void SoftmaxRows(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits,
                 E* y) {
  if (plan.reload && !plan.maximum_first && !logits.HasOperands() && logits.n <= kRowBlock<ComputeOf<E>>) {
    return ParallelForWholeRows(executor, logits.rows, logits.n, [&](std::int64_t first, std::int64_t end) {
      const std::int64_t at = first * logits.n;
      kernels.Of<E>().block_rows(logits.x + at, y + at, end - first, logits.n, plan.non_temporal);
      if (plan.non_temporal) FenceNonTemporalStores();
    });
  }
  ParallelForRows(executor, logits.rows, logits.n,
                  [&](std::int64_t first, std::int64_t end, Executor& segments_executor) {
                    RowsSoftmax<E>(kernels, segments_executor, plan, logits, y).Compute(first, end);
                  });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void SoftmaxRows(const Kernels&, Executor&, const SoftmaxPlan&, const Logits<E>&, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
