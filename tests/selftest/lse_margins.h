// Tests logsumexp near certainty: of rows whose other elements are all the same, so that every addition has
// the same rounding, by a margin below the largest. As that is 0, the lse is log1p of the others' sum, and is
// to be exact relative to its own size.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "ffi/ops/logsumexp.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {

template <typename E>
class LseMarginsCheck {
  using T = ComputeOf<E>;
  static constexpr std::int64_t kMargins = 160;
  static constexpr long double kUlp = 4;

 public:
  LseMarginsCheck(const std::vector<const Kernels*>& all, Report& report) : all_(all), report_(report) {}

  // Rows of n elements, or columns: one for each margin.
  void Check(std::int64_t n, bool columns) {
    layout_ = columns ? Layout{1, n, kMargins} : Layout{kMargins, n, 1};
    std::vector<E> x(static_cast<std::size_t>(kMargins * n));
    Random random(static_cast<std::uint64_t>(n));
    others_.clear();
    for (std::int64_t row = 0; row < kMargins; ++row) {
      const double step = sizeof(T) == sizeof(float) ? 0.5 : 4.25;
      E other;
      Encode(-step * (static_cast<double>(row) + 2 + random.Uniform()), other);
      E* const first = &x[static_cast<std::size_t>(columns ? row : row * n)];
      for (std::int64_t i = 0; i < n; ++i) first[i * layout_.inner] = other;
      Encode(0, first[(row * 7 % n) * layout_.inner]);
      others_.push_back(static_cast<long double>(n - 1) * std::exp(static_cast<long double>(Decode(other))));
    }
    for (const Kernels* kernels : all_) CheckKernels(*kernels, x);
  }

 private:
  void CheckKernels(const Kernels& kernels, const std::vector<E>& x) {
    InlineExecutor this_thread;
    std::vector<T> hi(kMargins), lo(kMargins);
    LogSumExp(kernels, this_thread, PlainLogits(x.data(), layout_), {hi.data(), lo.data()});
    for (std::size_t row = 0; row < kMargins; ++row) {
      const long double exact = std::log1p(others_[row]);
      const long double error = std::fabs((static_cast<long double>(hi[row]) + lo[row]) - exact);
      ++report_.Of(kernels).checks;
      if (error <= kUlp * UnitOf<T>(static_cast<double>(exact))) continue;
      char text[200];
      std::snprintf(text, sizeof text, "%s %s [%lld, %lld, %lld]: lse %zu near certainty is %.9g, not %.9Lg",
                    kernels.name, Element<E>::kName, static_cast<long long>(layout_.outer),
                    static_cast<long long>(layout_.n), static_cast<long long>(layout_.inner), row,
                    static_cast<double>(hi[row]), exact);
      report_.Fail(text);
    }
  }

  const std::vector<const Kernels*>& all_;
  Report& report_;
  Layout layout_{};
  std::vector<long double> others_;
};

template <typename E>
void CheckLseMargins(const std::vector<const Kernels*>& all, const Scope& scope, Report& report) {
  LseMarginsCheck<E> check(all, report);
  std::vector<std::int64_t> lengths{2, 21, 64, 100, 129, 300, 1000, 2100};
  if (!scope.quick) lengths.insert(lengths.end(), {5000, 32768, 100000});
  for (const std::int64_t n : scope.PartOf(lengths)) {
    check.Check(n, false);
    check.Check(n, true);
  }
}

}  // namespace jax_softmax2p
