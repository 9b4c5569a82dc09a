// Tests every value of the 16-bit types: its conversions, rounding to it, and rows that have it as an
// element.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "ffi/ops/logsumexp.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"
#include "ffi/runtime/float_mode.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {

inline constexpr int kPatterns = 1 << 16;

// Results below this may be zero.
template <typename E>
double SmallestResult() {
  return flushes_halves && std::is_same_v<E, Float16> ? 0x1p-14 : 0x1p-126;
}

// Converts all 16-bit patterns and converts them back, as 1·((t - 0) - 0).
template <typename E>
void CheckConversions(const std::vector<const Kernels*>& all, Report& report) {
  std::vector<E> ones(kPatterns), t(kPatterns), out(kPatterns);
  for (int i = 0; i < kPatterns; ++i) {
    Encode(1.0, ones[i]);
    t[i].bits = static_cast<std::uint16_t>(i);
  }
  for (const Kernels* kernels : all) {
    const ScopedFloatMode mode;
    kernels->Of<E>().jacobian_write(ones.data(), t.data(), out.data(), kPatterns, DoubleDouble<float>{0, 0},
                                    false);
    report.Of(*kernels).checks += kPatterns;
    for (int i = 0; i < kPatterns; ++i) {
      const double expected = Decode(t[i]), actual = Decode(out[i]);
      const bool flushed = actual == 0 && std::fabs(expected) < SmallestResult<E>();
      if (expected == actual || flushed || (std::isnan(expected) && std::isnan(actual))) continue;
      report.Fail(std::string(kernels->name) + " " + Element<E>::kName + " conversion of pattern " +
                  std::to_string(i) + " gives pattern " + std::to_string(out[i].bits));
    }
  }
}

// Rounds the floats around every tie between neighbours to E, as (z - 0) - 0: to nearest, ties to even.
template <typename E>
void CheckRounding(const std::vector<const Kernels*>& all, Report& report) {
  std::vector<float> z;
  for (int i = 0; i < kPatterns; ++i) {
    const double value = Decode(E{static_cast<std::uint16_t>(i)});
    if (!std::isfinite(value) || std::fabs(value) < SmallestResult<E>()) continue;
    const float tie = static_cast<float>(value + std::copysign(UnitOf<E>(value) / 2, value));
    if (std::isinf(tie)) continue;
    z.insert(z.end(), {std::nextafter(tie, 0.0f), tie, std::nextafter(tie, 2 * tie)});
  }
  // NaNs, of whose bits rounding would make others.
  for (const std::uint32_t bits : {0x7fffffffu, 0xffffffffu, 0x7fc00001u, 0x7f80ffffu}) {
    z.push_back(BitCast<float>(bits));
  }
  std::vector<E> y(z.size());
  for (const Kernels* kernels : all) {
    {
      const ScopedFloatMode mode;
      kernels->Of<E>().logits_row_write_log(z.data(), y.data(), static_cast<std::int64_t>(z.size()),
                                            {0, 0, 0}, false);
    }
    report.Of(*kernels).checks += static_cast<std::int64_t>(z.size());
    for (std::size_t i = 0; i < z.size(); ++i) {
      E expected;
      Encode(z[i], expected);
      if (y[i].bits == expected.bits || (std::isnan(z[i]) && std::isnan(Decode(y[i])))) continue;
      char text[120];
      std::snprintf(text, sizeof text, "%s %s: %a is rounded to pattern %d, not %d", kernels->name,
                    Element<E>::kName, static_cast<double>(z[i]), y[i].bits, expected.bits);
      report.Fail(text);
    }
  }
}

// Rows of `n` elements: `per_row` neighbouring values of the type, and numbers between -2 and 2.
template <typename E>
class ValuesCheck {
 public:
  ValuesCheck(std::int64_t n, std::int64_t per_row, Report& report)
      : n_(n), per_row_(per_row), rows_(kPatterns / per_row), report_(report) {
    const std::size_t size = static_cast<std::size_t>(rows_ * n_);
    x_.resize(size);
    softmax_.resize(size);
    for (std::int64_t r = 0; r < rows_; ++r) {
      E* const row = &x_[static_cast<std::size_t>(r * n_)];
      for (std::int64_t i = 0; i < n_; ++i) Encode(static_cast<double>(i * 7 % 13 - 6) / 3, row[i]);
      // Their place differs from row to row.
      for (std::int64_t i = 0; i < per_row_; ++i) {
        row[(r + i) % n_].bits = static_cast<std::uint16_t>(r * per_row_ + i);
      }
      Solve(row, &softmax_[static_cast<std::size_t>(r * n_)]);
    }
  }

  void Check(const Kernels& kernels) {
    InlineExecutor this_thread;
    std::vector<E> y(x_.size()), logs(x_.size());
    std::vector<float> hi(static_cast<std::size_t>(rows_)), lo(hi.size());
    const Logits<E> logits = PlainLogits(x_.data(), {rows_, n_, 1});
    Softmax(kernels, this_thread, Algorithm::kAuto, logits, y.data());
    LogSoftmax(kernels, this_thread, logits, logs.data(), {hi.data(), lo.data()});
    for (std::int64_t r = 0; r < rows_; ++r) CheckRow(kernels, r, y, logs, hi, lo);
    report_.Of(kernels).checks += 2 * rows_ * n_ + rows_;
  }

 private:
  void Solve(const E* row, double* softmax) {
    ExactSoftmax(row, softmax, n_, 1);
    double maximum = -kInfinity;
    bool nan = false;
    for (std::int64_t i = 0; i < n_; ++i) {
      nan = nan || std::isnan(Decode(row[i]));
      maximum = std::max(maximum, Decode(row[i]));
    }
    Sum<double> rest;
    bool passed = false;
    for (std::int64_t i = 0; i < n_; ++i) {
      if (passed || Decode(row[i]) != maximum) {
        rest.Add(std::exp(Decode(row[i]) - maximum));
      } else {
        passed = true;
      }
    }
    maximum_.push_back(maximum);
    lse_.push_back(nan ? kNan : std::isinf(maximum) ? maximum : maximum + std::log1p(rest.hi() + rest.lo()));
  }

  void CheckRow(const Kernels& kernels, std::int64_t r, const std::vector<E>& y, const std::vector<E>& logs,
                const std::vector<float>& hi, const std::vector<float>& lo) {
    const std::size_t row = static_cast<std::size_t>(r);
    const double exact = lse_[row];
    Compare(kernels, "lse", r, 0, double{hi[row]} + double{lo[row]}, exact, 0x1p-23);
    for (std::int64_t i = 0; i < n_; ++i) {
      const std::size_t at = static_cast<std::size_t>(r * n_ + i);
      double ulp;
      if (!Allowed(y[at], softmax_[at], ulp)) Fail(kernels, "softmax", r, i, Decode(y[at]), softmax_[at]);
      const bool undefined = std::isnan(exact) || std::isinf(exact);
      const double log = undefined ? kNan : Decode(x_[at]) - exact;
      const double tolerance =
          undefined ? 0
                    : UnitOf<E>(log) / 2 +
                          std::max({2 * UnitOf<float>(log), UnitOf<float>(maximum_[row]), 0x1p-24});
      Compare(kernels, "log_softmax", r, i, Decode(logs[at]), log, tolerance);
    }
  }

  void Compare(const Kernels& kernels, const char* what, std::int64_t r, std::int64_t i, double actual,
               double exact, double tolerance) {
    if (actual == exact || std::fabs(actual - exact) <= tolerance ||
        (std::isnan(actual) && std::isnan(exact)))
      return;
    // A result beyond the type's largest number rounds to infinity.
    E rounded;
    Encode(exact, rounded);
    if (std::isinf(actual) && Decode(rounded) == actual) return;
    Fail(kernels, what, r, i, actual, exact);
  }

  void Fail(const Kernels& kernels, const char* what, std::int64_t r, std::int64_t i, double actual,
            double exact) {
    char text[200];
    std::snprintf(text, sizeof text,
                  "%s %s %s of %lld, with patterns from %lld: element %lld is %.9g, not %.9g", kernels.name,
                  Element<E>::kName, what, static_cast<long long>(n_), static_cast<long long>(r * per_row_),
                  static_cast<long long>(i), actual, exact);
    report_.Fail(text);
  }

  std::int64_t n_, per_row_, rows_;
  Report& report_;
  std::vector<E> x_;
  std::vector<double> softmax_, maximum_, lse_;
};

template <typename E>
void CheckHalves(const std::vector<const Kernels*>& all, Report& report) {
  CheckConversions<E>(all, report);
  CheckRounding<E>(all, report);
  // Small rows have kernels of their own.
  ValuesCheck<E> small(5, 1, report), large(137, 16, report);
  for (const Kernels* kernels : all) {
    small.Check(*kernels);
    large.Check(*kernels);
  }
}

}  // namespace jax_softmax2p
