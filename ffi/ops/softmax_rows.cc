#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>

#include "ffi/ops/logits.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

// Up to so many elements, pass 1 of a row comes before pass 2 of the row above it: what ends pass 1, a chain
// of operations on single numbers, takes some 40 ns that the CPU fills with pass 2 of the other. Two rows and
// what is kept of them stay in the first-level cache.
constexpr std::int64_t kInterleavedRow = 1 << 11;

// 1/sum as a T and what that T leaves out.
template <typename T>
RowScale<T> ScaleFor(const RowTotal<T>& total) {
  const CompensatedSum& mantissa = total.sum.mantissa;
  const double hi = 1 / mantissa.hi;
  const double error = (std::fma(-hi, mantissa.hi, 1.0) - hi * mantissa.lo) * hi;
  RowScale<T> scale{};
  const DoubleDouble<T> rounded = ToDoubleDouble<T>(hi, error);
  scale.hi = rounded.hi;
  scale.lo = rounded.lo;
  scale.exponent = total.sum.exponent;
  scale.subtract = total.subtract;
  if (total.subtract) scale.maximum = total.maximum;
  return scale;
}

// The rows of an array.
template <typename E>
class Rows {
  using T = ComputeOf<E>;

 public:
  Rows(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits)
      : kernels_(kernels), executor_(executor), plan_(plan), logits_(logits) {}

  void Compute(E* y, std::int64_t first, std::int64_t end) const {
    const std::int64_t n = logits_.n;
    const bool interleaved = n <= kInterleavedRow;
    const std::int64_t turns = interleaved ? 2 : 1;
    // Where operands are applied block by block, what pass 1 computes is computed again.
    const bool fused = !logits_.Plain(), whole = !fused || n <= kLogitsBlock;
    // y will do for what pass 1 keeps, unless x is still needed there, or it has no room for a T, or must not
    // come into the caches. Without memory for scratch the row is recomputed instead.
    const bool reload = plan_.reload && whole;
    const bool in_y = std::is_same_v<E, T> && logits_.x != y && !plan_.non_temporal;
    const std::int64_t for_kept = reload && !in_y ? turns * n : 0, for_fused = fused && whole ? turns * n : 0;
    const std::unique_ptr<T[]> scratch(
        for_kept + for_fused == 0 ? nullptr : new (std::nothrow) T[for_kept + for_fused]);
    std::optional<LogitsRow<E>> two[2];
    const auto row = [&](std::int64_t r) -> const LogitsRow<E>& {
      T* const buffer = for_fused == 0 || scratch == nullptr ? nullptr : scratch.get() + r % turns * n;
      return two[r % turns].emplace(kernels_, logits_, r, buffer);
    };
    const auto kept = [&](std::int64_t r, const LogitsRow<E>& of) -> T* {
      if (!reload) return nullptr;
      if constexpr (std::is_same_v<E, T>) {
        if (in_y) return y + r * n + of.begin();
      }
      return scratch == nullptr ? nullptr : scratch.get() + for_fused + r % turns * n;
    };
    if (!interleaved) {
      for (std::int64_t r = first; r < end; ++r) {
        const LogitsRow<E>& one = row(r);
        T* const place = kept(r, one);
        Write(one, place, y + r * n, Scale(one, place));
      }
    } else if (first < end) {
      const auto scale_of = [&](std::int64_t r) {
        const LogitsRow<E>& one = row(r);
        return Scale(one, kept(r, one));
      };
      RowScale<T> next = scale_of(first);
      for (std::int64_t r = first; r < end; ++r) {
        const RowScale<T> scale = next;
        if (r + 1 < end) next = scale_of(r + 1);
        const LogitsRow<E>& one = *two[r % turns];
        Write(one, kept(r, one), y + r * n, scale);
      }
    }
    if (plan_.non_temporal) FenceNonTemporalStores();
  }

 private:
  RowScale<T> Scale(const LogitsRow<E>& row, T* kept) const {
    const int max_exponent = kernels_.Of<E>().max_exponent;
    return ScaleFor(TotalOf(row, Segments(executor_, row.size()), max_exponent, kept, plan_.maximum_first));
  }

  // Pass 2.
  void Write(const LogitsRow<E>& row, const T* kept, E* y, const RowScale<T>& scale) const {
    WriteOf(row, Segments(executor_, row.size()), kept, y + row.begin(), scale, plan_.non_temporal);
    if (!logits_.Masked()) return;
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
};

}  // namespace

template <typename E>
void SoftmaxRows(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits,
                 E* y) {
  ForRows(executor, logits.rows, logits.n, [&](std::int64_t first, std::int64_t end, Executor& for_segments) {
    Rows<E>(kernels, for_segments, plan, logits).Compute(y, first, end);
  });
}

template void SoftmaxRows(const Kernels&, Executor&, const SoftmaxPlan&, const Logits<float>&, float*);
template void SoftmaxRows(const Kernels&, Executor&, const SoftmaxPlan&, const Logits<double>&, double*);
template void SoftmaxRows(const Kernels&, Executor&, const SoftmaxPlan&, const Logits<BFloat16>&, BFloat16*);
template void SoftmaxRows(const Kernels&, Executor&, const SoftmaxPlan&, const Logits<Float16>&, Float16*);

}  // namespace jax_softmax2p
