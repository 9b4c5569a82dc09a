// Tests logsumexp and log_softmax of plain logits of every class of data, along any axis, against long
// double, and that their bits depend neither on the number of threads nor on where a row lies.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "ffi/ops/logsumexp.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {

template <typename E>
class LseClassesCheck {
  using T = ComputeOf<E>;

 public:
  LseClassesCheck(const std::vector<const Kernels*>& all, Report& report) : all_(all), report_(report) {}

  // Columns are of the classes, one after the other.
  void Check(const Layout& layout) {
    layout_ = layout;
    rows_ = layout.outer * layout.inner;
    x_.resize(static_cast<std::size_t>(rows_ * layout.n));
    const std::vector<DataClass> classes = ClassesOf(true);
    for (std::int64_t row = 0; row < rows_; ++row) {
      Random random(static_cast<std::uint64_t>(row * 1000003 + layout.n));
      class_ = &classes[static_cast<std::size_t>(row) % classes.size()];
      Fill(*class_, random, &x_[static_cast<std::size_t>(First(row))], layout.n, layout.inner);
    }
    for (const Kernels* kernels : all_) CheckKernels(*kernels, classes);
  }

 private:
  // What is computed.
  struct Results {
    std::vector<T> hi, lo;
    std::vector<E> y;
  };

  std::int64_t First(std::int64_t row) const {
    return row / layout_.inner * layout_.n * layout_.inner + row % layout_.inner;
  }

  void CheckKernels(const Kernels& kernels, const std::vector<DataClass>& classes) {
    kernels_ = &kernels;
    class_ = nullptr;
    InlineExecutor this_thread;
    const Results results = Run(this_thread, x_.data(), layout_);
    if (!SameBits(results, Run(helpers_, x_.data(), layout_), 0))
      Fail("other bits on three threads", 0, 0, 0);
    if (layout_.outer > 1) {
      Layout last = layout_;
      last.outer = 1;
      const std::int64_t first = First((layout_.outer - 1) * layout_.inner);
      if (!SameBits(results, Run(this_thread, x_.data() + first, last), first)) {
        Fail("other bits by itself", 0, 0, 0);
      }
    }
    for (std::int64_t row = 0; row < rows_; ++row) {
      class_ = &classes[static_cast<std::size_t>(row) % classes.size()];
      CheckRow(row, results);
    }
  }

  // Also holds logsumexp to the bits of log_softmax, and log_softmax in place to those that it has apart.
  Results Run(Executor& executor, const E* x, const Layout& layout) {
    const std::size_t rows = static_cast<std::size_t>(layout.outer * layout.inner);
    const std::size_t size = rows * static_cast<std::size_t>(layout.n);
    Results one{std::vector<T>(rows), std::vector<T>(rows), std::vector<E>(size)};
    Results other{std::vector<T>(rows), std::vector<T>(rows), std::vector<E>(x, x + size)};
    LogSoftmax(*kernels_, executor, PlainLogits(x, layout), one.y.data(), {one.hi.data(), one.lo.data()});
    LogSoftmax(*kernels_, executor, PlainLogits<E>(other.y.data(), layout), other.y.data(),
               {other.hi.data(), other.lo.data()});
    if (!SameBits(one, other, 0)) Fail("other bits in place", 0, 0, 0);
    LogSumExp(*kernels_, executor, PlainLogits(x, layout), {other.hi.data(), other.lo.data()});
    if (!SameBits(one, other, 0)) Fail("logsumexp has other bits than log_softmax", 0, 0, 0);
    return one;
  }

  // Whether `some` are the results of `all` from element `first` on.
  bool SameBits(const Results& all, const Results& some, std::int64_t first) const {
    const std::int64_t row = first / layout_.n;
    const std::int64_t rows = static_cast<std::int64_t>(some.hi.size());
    return Same(all.hi.data() + row, some.hi.data(), rows) &&
           Same(all.lo.data() + row, some.lo.data(), rows) &&
           Same(all.y.data() + first, some.y.data(), rows * layout_.n);
  }

  void CheckRow(std::int64_t row, const Results& results) {
    const E* const x = &x_[static_cast<std::size_t>(First(row))];
    const E* const y = &results.y[static_cast<std::size_t>(First(row))];
    long double maximum = -kInfinity, others = 0;
    std::int64_t largest = -1;
    bool has_nan = false;
    for (std::int64_t i = 0; i < layout_.n; ++i) {
      const long double value = Decode(x[i * layout_.inner]);
      has_nan = has_nan || std::isnan(value);
      if (value > maximum) largest = i;
      maximum = std::max(maximum, value);
    }
    for (std::int64_t i = 0; i < layout_.n && std::isfinite(maximum); ++i) {
      if (i != largest) others += ExpOfDifference<long double>(Decode(x[i * layout_.inner]), maximum);
    }
    const long double hi = results.hi[static_cast<std::size_t>(row)];
    const long double lo = results.lo[static_cast<std::size_t>(row)];
    if (has_nan || std::isinf(maximum)) {
      Compare("lse", row, hi, has_nan ? kNan : maximum, 0);
      for (std::int64_t i = 0; i < layout_.n; ++i) {
        Compare("log_softmax", i, Decode(y[i * layout_.inner]), kNan, 0);
      }
      return;
    }
    const long double log = std::log1p(others), least = sizeof(T) == sizeof(float) ? 0x1p-24L : 0x1p-50L;
    // A float has no more digits for lo than that.
    const long double unit = Unit(Unit(maximum + log));
    Compare("lse - maximum", row, (hi - maximum) + lo, log, 2 * least + unit);
    for (std::int64_t i = 0; i < layout_.n; ++i) {
      const long double exact = (Decode(x[i * layout_.inner]) - maximum) - log;
      const double half = kIsHalf<E> && std::isfinite(exact) ? UnitOf<E>(static_cast<double>(exact)) / 2 : 0;
      Compare("log_softmax", i, Decode(y[i * layout_.inner]), exact,
              half + (flushes_halves ? 0x1p-14 : 0) + std::max({2 * Unit(exact), Unit(maximum), least}));
    }
  }

  static long double Unit(long double of) {
    return std::isfinite(of) ? UnitOf<T>(static_cast<double>(of)) : 0;
  }

  void Compare(const char* what, std::int64_t at, long double actual, long double exact,
               long double tolerance) {
    ++report_.Of(*kernels_).checks;
    if (actual == exact || (std::isnan(actual) && std::isnan(exact))) return;
    if (std::fabs(actual - exact) <= tolerance) return;
    // A difference of the largest finite numbers overflows.
    if (std::isinf(actual) && std::fabs(exact) > LargestFinite<E>()) return;
    Fail(what, at, actual, exact);
  }

  void Fail(const char* what, std::int64_t at, long double actual, long double exact) {
    char text[300];
    std::snprintf(text, sizeof text, "%s %s [%lld, %lld, %lld] of \"%s\": %s %lld is %.17Lg, not %.17Lg",
                  kernels_->name, Element<E>::kName, static_cast<long long>(layout_.outer),
                  static_cast<long long>(layout_.n), static_cast<long long>(layout_.inner),
                  class_ == nullptr ? "all" : class_->name, what, static_cast<long long>(at), actual, exact);
    report_.Fail(text);
  }

  const std::vector<const Kernels*>& all_;
  Report& report_;
  TwoHelpers helpers_;
  const Kernels* kernels_ = nullptr;
  const DataClass* class_ = nullptr;
  Layout layout_{};
  std::int64_t rows_ = 0;
  std::vector<E> x_;
};

template <typename E>
void CheckLseClasses(const std::vector<const Kernels*>& all, const Scope& scope, Report& report) {
  LseClassesCheck<E> check(all, report);
  std::vector<Layout> layouts;
  for (const std::int64_t n : {3, 33, 129, 300}) layouts.push_back({kClasses, n, 1});
  for (const std::int64_t inner : {2, 5, 16, 37}) {
    for (const std::int64_t n : {2, 9, 33, 130}) layouts.push_back({kClasses / inner + 2, n, inner});
  }
  if (!scope.quick) {
    layouts.insert(layouts.end(), {{2, 5000, 5}, {1, 300, 600}, {2, 2049, 18}, {2, 2049, 300}});
  }
  for (const Layout& layout : scope.PartOf(layouts)) check.Check(layout);
}

}  // namespace jax_softmax2p
