#include "ffi/ops/measurement/passes.h"

#include <cmath>
#include <vector>

#include "ffi/ops/guarded_sum.h"
#include "ffi/ops/logits_row.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"
#include "ffi/ops/write_row.h"
#include "ffi/runtime/float_mode.h"

namespace jax_softmax2p {
namespace {

double ValueOf(const Kernels& kernels, const RowSum<float>& row_sum) {
  return std::ldexp(row_sum.sum.mantissa.hi / kernels.f32.factor, row_sum.sum.exponent);
}

// The exponent of a scale, and of what is kept when the maximum is known, is even.
int Exponent(float maximum) { return 2 * static_cast<int>(std::floor(maximum * (1.44269504F / 2))); }

void WriteResult(const Kernels& kernels, const LogitsRow<float>& row, const Segments& segments,
                 const KeptRow<float>& kept, float* y, float maximum, bool non_temporal) {
  const bool odd = static_cast<int>(std::floor(maximum * 1.44269504F)) > Exponent(maximum);
  const DoubleDouble<float> unit = ToDoubleDouble<float>((odd ? 0.5 : 1) / kernels.f32.factor, 0);
  RowScale<float> scale{};
  scale.hi = unit.hi;
  scale.lo = unit.lo;
  scale.exponent = Exponent(maximum);
  WriteRow(row, segments, kept, y, scale, non_temporal);
}

}  // namespace

std::optional<double> RunPass(const Kernels& kernels, Executor& executor, Pass pass, const float* x, float* y,
                              std::int64_t n, float maximum) {
  const ScopedFloatMode mode;
  const Logits<float> logits = PlainLogits(x, {1, n, 1});
  const LogitsRow<float> row(kernels, logits, 0, nullptr);
  const Segments segments(executor, n);
  const auto non_temporal = [&](Algorithm algorithm) {
    return PlanSoftmax<float>(algorithm, {1, n, 1}, kernels.f32.lanes).non_temporal;
  };
  const KnownMaximum<float> known{KnownMaximum<float>::kReference, maximum};
  const bool keeps = pass == Pass::kExpStore || pass == Pass::kScale;
  // Without an allocation where one will do, which would show in short rows.
  float reference = static_cast<float>(Exponent(maximum));
  std::vector<float> references(keeps && n > kRowBlock<float> ? CeilDiv(n, kRowBlock<float>) : 0, reference);
  const KeptRow<float> kept{keeps ? y : nullptr, references.empty() ? &reference : references.data()};
  switch (pass) {
    case Pass::kMax:
      return MaximumOfRow(row, segments);
    case Pass::kSumExp:
    case Pass::kExpStore:
      return ValueOf(kernels, SumOfRow(row, segments, kept, known));
    case Pass::kExtendedSum:
      return ValueOf(kernels, SumOfRow(row, segments, kept, {}));
    case Pass::kScale:
      WriteResult(kernels, row, segments, kept, y, maximum, non_temporal(Algorithm::kThreePassReload));
      break;
    case Pass::kExtendedWrite:
      WriteResult(kernels, row, segments, kept, y, maximum, non_temporal(Algorithm::kTwoPass));
      break;
  }
  return std::nullopt;
}

}  // namespace jax_softmax2p
