#include "ffi/ops/measurement/passes.h"

#include <cmath>

#include "ffi/ops/guarded_sum.h"
#include "ffi/ops/logits_row.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"
#include "ffi/ops/write_row.h"
#include "ffi/runtime/float_mode.h"

namespace jax_softmax2p {
namespace {

double ValueOf(const RowSum<float>& row_sum) {
  return std::ldexp(row_sum.sum.mantissa.hi, row_sum.sum.exponent);
}

void WriteResult(const LogitsRow<float>& row, const Segments& segments, const float* kept, float* y,
                 float maximum, bool non_temporal) {
  RowScale<float> scale{};
  scale.hi = 1;
  scale.exponent = static_cast<int>(std::floor(maximum * 1.44269504F));
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
  switch (pass) {
    case Pass::kMax:
      return MaximumOfRow(row, segments);
    case Pass::kSumExp:
      return ValueOf(SumOfRow(row, segments, nullptr, known));
    case Pass::kExpStore:
      return ValueOf(SumOfRow(row, segments, y, known));
    case Pass::kExtendedSum:
      return ValueOf(SumOfRow(row, segments, nullptr, {}));
    case Pass::kScale:
      WriteResult(row, segments, y, y, maximum, non_temporal(Algorithm::kThreePassReload));
      break;
    case Pass::kExtendedWrite:
      WriteResult(row, segments, nullptr, y, maximum, non_temporal(Algorithm::kTwoPass));
      break;
  }
  return std::nullopt;
}

}  // namespace jax_softmax2p
