// Tests logsumexp, log_softmax, their derivatives, and softmax, with every combination of operands and masks,
// along any axis, against long double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "ffi/ops/logsumexp.h"
#include "ffi/ops/softmax.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {

struct FamilyCase {
  Layout layout;
  bool scale, bias, where, band;
};

// The inputs of one case.
template <typename E>
struct FamilyInput {
  using T = ComputeOf<E>;

  explicit FamilyInput(const FamilyCase& of) : layout(of.layout), given(of) {
    const std::int64_t rows = layout.outer * layout.inner;
    const std::size_t size = static_cast<std::size_t>(rows * layout.n);
    Random random(static_cast<std::uint64_t>(layout.n * 7 + layout.inner));
    for (auto* array : {&x, &bias, &t}) {
      array->resize(size);
      for (E& element : *array) Encode(random.Normal(), element);
    }
    where.resize(static_cast<std::size_t>(layout.n * layout.inner));
    for (std::uint8_t& element : where) element = random.Uniform() < 0.4 || !of.where;
    for (std::int64_t r = 0; r < rows; ++r) {
      // Powers of two, so that instruction sets without fused operations round logits no more than others.
      scale.push_back(of.scale ? static_cast<T>(r % 3 == 0 ? 0.5 : r % 3 == 1 ? -2 : 8) : T{1});
      factor.push_back(static_cast<T>(random.Normal()));
      labels.push_back(static_cast<std::int32_t>(random.Next() % static_cast<std::uint64_t>(layout.n + 2)) -
                       1);
      for (std::int64_t i = 0; i < layout.n; ++i) {
        if (!Masked(r, i)) continue;
        const std::size_t at = static_cast<std::size_t>(At(r, i));
        t[at] = E{};
        Encode(std::numeric_limits<double>::quiet_NaN(), x[at]);
      }
    }
  }

  std::int64_t At(std::int64_t row, std::int64_t i) const {
    return row / layout.inner * layout.n * layout.inner + i * layout.inner + row % layout.inner;
  }
  bool Masked(std::int64_t row, std::int64_t i) const {
    return (given.where && where[static_cast<std::size_t>(i * layout.inner + row % layout.inner)] == 0) ||
           (given.band && (i > row + 2 || i + 3 < row));
  }

  Logits<E> LogitsOf(const E* from) const {
    Logits<E> logits;
    logits.x = from;
    logits.dims = {layout.outer, layout.inner};
    logits.rows = layout.outer * layout.inner;
    logits.n = layout.n;
    logits.inner = layout.inner;
    if (given.scale) logits.scale = {scale.data(), {layout.inner, 1}, 0};
    if (given.bias) logits.bias = {bias.data(), {layout.n * layout.inner, 1}, layout.inner};
    if (given.where) logits.where = {where.data(), {0, 1}, layout.inner};
    if (given.band) {
      logits.dims = {layout.outer};
      for (auto* strides : {&logits.scale.strides, &logits.bias.strides, &logits.where.strides}) {
        if (!strides->empty()) strides->pop_back();
      }
      logits.band = {3, 2};
    }
    return logits;
  }

  Layout layout;
  FamilyCase given;
  std::vector<E> x, bias, t;
  std::vector<std::uint8_t> where;
  std::vector<T> scale, factor;
  std::vector<std::int32_t> labels;
};

// The inputs of one case with the exact logits and probabilities, in arrays like x, and the lse of every row.
template <typename E>
struct Family : FamilyInput<E> {
  using T = ComputeOf<E>;
  using FamilyInput<E>::At;
  using FamilyInput<E>::Masked;
  using FamilyInput<E>::bias;
  using FamilyInput<E>::given;
  using FamilyInput<E>::layout;
  using FamilyInput<E>::scale;
  using FamilyInput<E>::x;

  explicit Family(const FamilyCase& of) : FamilyInput<E>(of), z(x.size()), p(x.size()) {
    for (std::int64_t r = 0; r < layout.outer * layout.inner; ++r) SolveRow(r);
  }

  std::vector<T> z;
  std::vector<long double> p, lse, maximum;

 private:
  void SolveRow(std::int64_t r) {
    long double largest = -std::numeric_limits<long double>::infinity(), sum = 0;
    std::int64_t largest_at = -1;
    for (std::int64_t i = 0; i < layout.n; ++i) {
      const std::size_t at = static_cast<std::size_t>(At(r, i));
      const T scaled = scale[static_cast<std::size_t>(r)] * static_cast<T>(Decode(x[at]));
      z[at] = given.bias ? scaled + static_cast<T>(Decode(bias[at])) : scaled;
      if (!Masked(r, i) && z[at] > largest) {
        largest = z[at];
        largest_at = i;
      }
    }
    for (std::int64_t i = 0; i < layout.n; ++i) {
      if (!Masked(r, i) && i != largest_at) sum += std::exp(z[static_cast<std::size_t>(At(r, i))] - largest);
    }
    maximum.push_back(largest);
    lse.push_back(largest + std::log1p(sum));
    for (std::int64_t i = 0; i < layout.n; ++i) {
      const std::size_t at = static_cast<std::size_t>(At(r, i));
      p[at] = Masked(r, i) ? 0 : std::exp(z[at] - lse.back());
    }
  }
};

template <typename E>
class FamilyCheck {
  using T = ComputeOf<E>;

 public:
  FamilyCheck(const Kernels& kernels, Executor& executor, const Family<E>& family, Report& report)
      : kernels_(kernels),
        executor_(executor),
        in_(family),
        report_(report),
        rows_(static_cast<std::int64_t>(family.lse.size())),
        hi_(family.lse.size()),
        lo_(family.lse.size()) {}

  void Check() {
    x_ = array_.Prepare(in_.x, static_cast<int>(in_.layout.n % 5), GuardedArray<E>::kPoison);
    CheckLogSumExp();
    CheckSoftmax();
    CheckLogSoftmax();
    CheckLogSumExpVjp();
    CheckLogSumExpJvp();
    CheckLogSoftmaxVjp();
    if (!array_.GuardsIntact() || !out_.GuardsIntact()) Fail("an array", 0, 0, 0);
  }

 private:
  Logits<E> LogitsOfX() const { return in_.LogitsOf(x_); }
  LabelledLse<E> Sums(bool labelled) const {
    return {hi_.data(), lo_.data(), labelled ? in_.labels.data() : nullptr};
  }
  E* Out() {
    return out_.Prepare(static_cast<std::int64_t>(in_.x.size()), static_cast<int>(in_.layout.n % 3),
                        GuardedArray<E>::kUnwritten);
  }
  long double Unit(long double of) const { return UnitOf<T>(static_cast<double>(of)); }

  // The error that the rounding of a sum makes in its logarithm.
  static long double Least() { return sizeof(T) == sizeof(float) ? 0x1p-24L : 0x1p-50L; }

  void CheckLogSumExp() {
    LogSumExp(kernels_, executor_, LogitsOfX(), {hi_.data(), lo_.data()});
    for (std::int64_t r = 0; r < rows_; ++r) {
      const std::size_t at = static_cast<std::size_t>(r);
      const long double sum = static_cast<long double>(hi_[at]) + lo_[at], exact = in_.lse[at];
      Compare("lse", r, sum, exact, 2 * Least());
    }
  }

  void CheckSoftmax() {
    E* const y = Out();
    Softmax(kernels_, executor_, Algorithm::kAuto, LogitsOfX(), y);
    ForElements([&](std::int64_t r, std::int64_t, std::int64_t at) {
      const long double p = std::isinf(in_.lse[static_cast<std::size_t>(r)]) ? 0 : in_.p[at];
      Compare("softmax", at, Decode(y[at]), p, Rounding(p) + 4 * Unit(p));
    });
  }

  void CheckLogSoftmax() {
    E* const y = Out();
    std::vector<T> hi(hi_.size()), lo(lo_.size());
    LogSoftmax(kernels_, executor_, LogitsOfX(), y, {hi.data(), lo.data()});
    ForElements([&](std::int64_t r, std::int64_t i, std::int64_t at) {
      const std::size_t row = static_cast<std::size_t>(r);
      const long double exact =
          in_.Masked(r, i) ? -std::numeric_limits<long double>::infinity() : in_.z[at] - in_.lse[row];
      Compare("log_softmax", at, Decode(y[at]), exact,
              Rounding(exact) + std::max({2 * Unit(exact), Unit(in_.maximum[row]), Least()}));
    });
    if (hi != hi_ || lo != lo_) Fail("log_softmax's lse", 0, 0, 0);
  }

  void CheckLogSumExpVjp() {
    E* const y = Out();
    LogSumExpVjp(kernels_, executor_, LogitsOfX(), Sums(true), in_.factor.data(), y);
    ForElements([&](std::int64_t r, std::int64_t i, std::int64_t at) {
      const std::size_t row = static_cast<std::size_t>(r);
      const std::int64_t label = in_.labels[row] < 0 ? in_.labels[row] + in_.layout.n : in_.labels[row];
      const long double factor = in_.factor[row], exact = factor * (in_.p[at] - (i == label));
      Compare("lse's VJP", at, Decode(y[at]), exact, Rounding(exact) + 4 * Unit(factor));
    });
  }

  void CheckLogSumExpJvp() {
    std::vector<T> out(hi_.size());
    LogSumExpJvp(kernels_, executor_, LogitsOfX(), Sums(true), in_.t.data(), out.data());
    for (std::int64_t r = 0; r < rows_; ++r) {
      const std::size_t row = static_cast<std::size_t>(r);
      const std::int64_t label = in_.labels[row] < 0 ? in_.labels[row] + in_.layout.n : in_.labels[row];
      long double exact = 0, size = 0;
      for (std::int64_t i = 0; i < in_.layout.n; ++i) {
        const std::int64_t at = in_.At(r, i);
        const long double t = Decode(in_.t[at]), term = (in_.p[at] - (i == label)) * t;
        exact += term;
        size += std::fabs(in_.p[at] * t) + (i == label ? std::fabs(t) : 0);
      }
      Compare("lse's JVP", r, out[row], exact, 4 * Unit(size));
    }
  }

  void CheckLogSoftmaxVjp() {
    E* const y = Out();
    LogSoftmaxVjp(kernels_, executor_, LogitsOfX(), Sums(false), in_.t.data(), y);
    for (std::int64_t r = 0; r < rows_; ++r) {
      Sum<long double> total;
      for (std::int64_t i = 0; i < in_.layout.n; ++i) total.Add(Decode(in_.t[in_.At(r, i)]));
      const long double sum = total.hi() + total.lo();
      for (std::int64_t i = 0; i < in_.layout.n; ++i) {
        const std::int64_t at = in_.At(r, i);
        const long double t = Decode(in_.t[at]), exact = t - in_.p[at] * sum;
        Compare("log_softmax's VJP", at, Decode(y[at]), exact,
                Rounding(exact) + 4 * Unit(std::max(std::fabs(t), std::fabs(sum))));
      }
    }
  }

  // Half a unit of a 16-bit result, or, where an emulator flushes subnormal halves, the largest of those.
  static long double Rounding(long double exact) {
    if constexpr (!kIsHalf<E>) return 0;
    const double rounding = std::isinf(exact) ? 0 : UnitOf<E>(static_cast<double>(exact)) / 2;
    return flushes_halves && std::is_same_v<E, Float16> ? rounding + 0x1p-14 : rounding;
  }

  template <typename Body>
  void ForElements(const Body& body) {
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t i = 0; i < in_.layout.n; ++i) body(r, i, in_.At(r, i));
    }
  }

  void Compare(const char* what, std::int64_t at, long double actual, long double exact,
               long double tolerance) {
    ++report_.Of(kernels_).checks;
    if (actual == exact || std::fabs(actual - exact) <= tolerance) return;
    Fail(what, at, actual, exact);
  }

  void Fail(const char* what, std::int64_t at, long double actual, long double exact) {
    const FamilyCase& given = in_.given;
    char text[300];
    std::snprintf(text, sizeof text, "%s %s %s [%lld, %lld, %lld]%s%s%s%s: %lld is %.17Lg, not %.17Lg",
                  kernels_.name, Element<E>::kName, what, static_cast<long long>(in_.layout.outer),
                  static_cast<long long>(in_.layout.n), static_cast<long long>(in_.layout.inner),
                  given.scale ? ", scale" : "", given.bias ? ", bias" : "", given.where ? ", where" : "",
                  given.band ? ", band" : "", static_cast<long long>(at), actual, exact);
    report_.Fail(text);
  }

  const Kernels& kernels_;
  Executor& executor_;
  const Family<E>& in_;
  Report& report_;
  std::int64_t rows_;
  std::vector<T> hi_, lo_;
  GuardedArray<E> array_, out_;
  E* x_ = nullptr;
};

template <typename E>
void CheckFamily(const std::vector<const Kernels*>& all, const Scope& scope, Report& report) {
  TwoHelpers helpers;
  std::vector<Layout> layouts;
  if (scope.quick) {
    for (const std::int64_t n : {1, 3, 16, 33, 129}) layouts.push_back({19, n, 1});
    for (const std::int64_t n : {4, 33}) layouts.push_back({3, n, 5});
    layouts.push_back({2, 20, 16});
  } else {
    for (const std::int64_t n : {1, 2, 3, 7, 15, 16, 17, 33, 100, 128, 129, 300, 1025, 4097, 5000, 40000}) {
      layouts.push_back({n < 1000 ? 19 : 3, n, 1});
    }
    layouts.push_back({2, 40, 300});
    for (const std::int64_t inner : {2, 5, 16, 37}) {
      for (const std::int64_t n : {1, 4, 16, 33, 130, 5000}) layouts.push_back({3, n, inner});
    }
  }
  for (const Layout& layout : scope.PartOf(layouts)) {
    for (int given = 0; given < 16; ++given) {
      const FamilyCase of{layout, (given & 1) != 0, (given & 2) != 0, (given & 4) != 0, (given & 8) != 0};
      if (of.band && layout.inner != 1) continue;
      const Family<E> family(of);
      for (const Kernels* kernels : all) FamilyCheck<E>(*kernels, helpers, family, report).Check();
    }
  }
}

}  // namespace jax_softmax2p
