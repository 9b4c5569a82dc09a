// Holds every instruction set that this machine can execute against wider arithmetic, without Python and XLA:
// for CPUs on which those do not run, emulated ones above all.
//
//   selftest [--quick] [--isa NAME]        arrays of every element type, algorithm and kind of shape
//            --emulated-x86                the same where QEMU 7.2 stands in for an x86-64 CPU: see below
//   selftest --exhaustive [--isa NAME]     e^x of all 2^32 floats
//            --part K/N                    of either, the K-th of N parts only, from 0
//   selftest --list                        the instruction sets, best first

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "ffi/base/inline.h"
#include "ffi/ops/algorithm.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"
#include "ffi/ops/softmax_jacobian.h"
#include "ffi/runtime/dispatch.h"
#include "ffi/runtime/float_mode.h"
#include "ffi/runtime/parallel.h"
#include "tests/selftest/column_bits.h"
#include "tests/selftest/current_case.h"
#include "tests/selftest/family.h"
#include "tests/selftest/halves.h"
#include "tests/selftest/lse_classes.h"
#include "tests/selftest/lse_margins.h"
#include "tests/selftest/memory.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {
namespace {

// How a call is made, beside its algorithm.
struct Setting {
  bool in_place;
  bool threads;
  int x_offset, y_offset;
};

std::string Describe(const Setting& setting) {
  return std::string(setting.in_place ? ", in place" : "") + (setting.threads ? ", 3 threads" : "") +
         ", x at " + std::to_string(setting.x_offset) + ", y at " + std::to_string(setting.y_offset);
}

std::string Describe(const Layout& layout) {
  return "[" + std::to_string(layout.outer) + ", " + std::to_string(layout.n) + ", " +
         std::to_string(layout.inner) + "]";
}

// Fewer elements than this are never shared out: the operations' own limits are higher.
constexpr std::int64_t kSharedElements = kSegment;

// ---------------------------------------------------------------------------------------------------------
// Softmax.

// A way to compute the result. All with the same `bits`, other than kOwn, must agree bit by bit.
enum Bits { kTwoPassBits, kThreePassBits, kOwn };

template <typename E>
struct Way {
  std::string name;
  Bits bits;
  std::function<void(const Kernels&, Executor&, const E*, E*, const Layout&)> softmax;
};

template <typename E>
Way<E> ByAlgorithm(const NamedAlgorithm& named) {
  const Algorithm algorithm = named.algorithm;
  const bool three = algorithm == Algorithm::kThreePassRecompute || algorithm == Algorithm::kThreePassReload;
  return {std::string(named.name), three ? kThreePassBits : kTwoPassBits,
          [algorithm](const Kernels& kernels, Executor& executor, const E* x, E* y, const Layout& layout) {
            Softmax(kernels, executor, algorithm, PlainLogits(x, layout), y);
          }};
}

// With non-temporal stores, which Softmax uses only for large arrays.
template <typename E>
Way<E> NonTemporal(bool maximum_first, bool reload, bool is_small) {
  const SoftmaxPlan plan{maximum_first, reload, true};
  return {std::string("non-temporal") + (maximum_first ? ", three passes" : "") + (reload ? ", reload" : ""),
          is_small        ? kOwn
          : maximum_first ? kThreePassBits
                          : kTwoPassBits,
          [plan](const Kernels& kernels, Executor& executor, const E* x, E* y, const Layout& layout) {
            SoftmaxRows(kernels, executor, plan, PlainLogits(x, layout), y);
          }};
}

template <typename E>
std::vector<Way<E>> WaysFor(const Layout& layout) {
  std::vector<Way<E>> ways;
  for (const NamedAlgorithm& named : kAlgorithms) ways.push_back(ByAlgorithm<E>(named));
  if (layout.inner != 1) return ways;
  const bool is_small = layout.n <= kMaxSmall;
  for (const bool maximum_first : {false, true}) {
    for (const bool reload : {false, true}) {
      ways.push_back(NonTemporal<E>(maximum_first, reload, is_small));
    }
  }
  return ways;
}

template <typename E>
class SoftmaxCheck {
 public:
  SoftmaxCheck(const std::vector<const Kernels*>& all, Report& report) : all_(all), report_(report) {}

  // Checks every way with every instruction set. Columns are of the classes, one after the other.
  void Check(const Layout& layout, const std::vector<DataClass>& classes) {
    layout_ = layout;
    classes_ = &classes;
    MakeInput();
    const std::int64_t size = static_cast<std::int64_t>(x_.size());
    const int threads = size >= kSharedElements ? 2 : 1;
    const std::vector<Way<E>> ways = WaysFor<E>(layout);
    for (const Kernels* kernels : all_) {
      results_[kTwoPassBits].clear();
      results_[kThreePassBits].clear();
      int offset = static_cast<int>(layout.n % 5);
      for (const Way<E>& way : ways) {
        for (const bool in_place : {false, true}) {
          for (int t = 0; t < threads; ++t, ++offset) {
            CheckOne(*kernels, way, {in_place, t == 1, offset % 7, in_place ? offset % 7 : offset * 3 % 11});
          }
        }
      }
    }
  }

 private:
  void MakeInput() {
    const std::int64_t matrix = layout_.n * layout_.inner;
    x_.resize(static_cast<std::size_t>(layout_.outer * matrix));
    exact_.resize(x_.size());
    for (std::int64_t column = 0; column < layout_.outer * layout_.inner; ++column) {
      const std::int64_t first = column / layout_.inner * matrix + column % layout_.inner;
      Random random(static_cast<std::uint64_t>(column * 1000003 + layout_.n));
      Fill(ClassOf(column), random, &x_[first], layout_.n, layout_.inner);
      ExactSoftmax(&x_[first], &exact_[first], layout_.n, layout_.inner);
    }
  }
  const DataClass& ClassOf(std::int64_t column) const {
    return (*classes_)[static_cast<std::size_t>(column) % classes_->size()];
  }

  void CheckOne(const Kernels& kernels, const Way<E>& way, const Setting& setting) {
    InlineExecutor this_thread;
    Executor& executor = setting.threads ? static_cast<Executor&>(helpers_) : this_thread;
    const std::int64_t size = static_cast<std::int64_t>(x_.size());
    using Array = GuardedArray<E>;
    const E* const x = x_array_.Prepare(x_, setting.x_offset, Array::kPoison);
    E* const y =
        setting.in_place ? const_cast<E*>(x) : y_array_.Prepare(size, setting.y_offset, Array::kUnwritten);
    way.softmax(kernels, executor, x, y, layout_);

    report_.Of(kernels).checks += size;
    const auto fail = [&](const std::string& what) {
      report_.Fail(std::string(kernels.name) + " " + Element<E>::kName + " " + way.name + " " +
                   Describe(layout_) + Describe(setting) + ": " + what);
    };
    if (!x_array_.GuardsIntact()) fail("wrote beyond x");
    if (!setting.in_place && !y_array_.GuardsIntact()) fail("wrote beyond y");
    if (!setting.in_place && std::memcmp(x, x_.data(), x_.size() * sizeof(E)) != 0) fail("changed x");
    CheckResult(kernels, way, y, fail);
  }

  template <typename FailWith>
  void CheckResult(const Kernels& kernels, const Way<E>& way, const E* y, const FailWith& fail) {
    const std::int64_t size = static_cast<std::int64_t>(x_.size());
    if (way.bits != kOwn && !results_[way.bits].empty()) {
      if (Same(y, results_[way.bits].data(), size)) return;
      fail("not the bits of " + std::string(way.bits == kTwoPassBits ? "auto" : "three_pass_recompute"));
    }
    double& worst = report_.Of(kernels).worst[Element<E>::kName];
    for (std::int64_t i = 0; i < size; ++i) {
      double ulp;
      if (!Allowed(y[i], exact_[i], ulp)) {
        fail(DescribeElement(i, y[i], ulp));
        break;
      }
      worst = std::max(worst, ulp);
    }
    if (way.bits != kOwn) results_[way.bits].assign(y, y + size);
  }

  std::string DescribeElement(std::int64_t i, E y, double ulp) const {
    const std::int64_t matrix = layout_.n * layout_.inner;
    const std::int64_t column = i / matrix * layout_.inner + i % layout_.inner;
    char text[200];
    std::snprintf(text, sizeof text, "element %lld (x %.9g, of \"%s\") is %.17g, not %.17g: %.3f ULP",
                  static_cast<long long>(i), static_cast<double>(Decode(x_[i])), ClassOf(column).name,
                  static_cast<double>(Decode(y)), static_cast<double>(exact_[i]), ulp);
    return text;
  }

  const std::vector<const Kernels*>& all_;
  Report& report_;
  TwoHelpers helpers_;
  Layout layout_{};
  const std::vector<DataClass>* classes_ = nullptr;
  std::vector<E> x_;
  std::vector<ExactOf<E>> exact_;
  GuardedArray<E> x_array_, y_array_;
  std::vector<E> results_[2];
};

// Enough matrices for every class to appear, and where that is little, two more.
std::int64_t OuterFor(std::int64_t n, std::int64_t inner) {
  const std::int64_t all = CeilDiv(kClasses, inner);
  return n * inner * all < 20000 ? all + 2 : all;
}

std::vector<Layout> Rows(bool quick) {
  std::vector<Layout> rows;
  for (std::int64_t n = 1; n <= (quick ? 36 : 300); ++n) rows.push_back({OuterFor(n, 1), n, 1});
  if (quick) {
    for (const std::int64_t n : {63, 64, 127, 128, 129, 200, 257, 515}) rows.push_back({kClasses, n, 1});
    for (const std::int64_t n : {2048 * 4 + 3, 32771}) rows.push_back({1, n, 1});
    return rows;
  }
  for (const std::int64_t n : {511, 1023, 1024, 1025, 2047, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 16383,
                               16384, 16385, 32767, 32768, 32769, 70001}) {
    rows.push_back({kClasses, n, 1});
  }
  rows.push_back({1, 70001, 1});
  rows.push_back({3, 262147, 1});
  rows.push_back({1500, 100, 1});
  rows.push_back({700, 129, 1});
  return rows;
}

std::vector<Layout> Columns(bool quick) {
  std::vector<Layout> columns;
  for (const std::int64_t inner : {2, 3, 7, 16, 100, 1000}) {
    for (const std::int64_t n : {1, 2, 5, 17, 100, 1000, 5000}) {
      if (n * inner > (quick ? 2000 : 1000000)) continue;
      columns.push_back({quick ? CeilDiv(kClasses, 2 * inner) : OuterFor(n, inner), n, inner});
    }
  }
  if (quick) columns.push_back({1, 2100, 5});
  return columns;
}

template <typename E>
void CheckSoftmax(const std::vector<const Kernels*>& all, const Scope& scope, Report& report) {
  SoftmaxCheck<E> check(all, report);
  std::vector<Layout> layouts = Rows(scope.quick);
  const std::vector<Layout> columns = Columns(scope.quick);
  layouts.insert(layouts.end(), columns.begin(), columns.end());
  layouts = scope.PartOf(layouts);
  for (const bool extreme : {false, true}) {
    const std::vector<DataClass> classes = ClassesOf(extreme);
    for (const Layout& layout : layouts) {
      // Longer rows are computed one by one: extreme ones do not affect others, and need one run only.
      if (extreme || layout.inner != 1 || layout.n <= kMaxSmall) check.Check(layout, classes);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// The Jacobian.

template <typename E>
struct JacobianInput {
  std::vector<E> y, t;
  std::vector<long double> exact;
  std::vector<double> tolerance;
};

// The exact y·(t - <y, t>) and its tolerance: 4 ULP of the row's largest, half a unit of a 16-bit result, and
// the error of the dot product, in twice the working precision, where t - <y, t> cancels.
template <typename E>
void Solve(std::int64_t rows, std::int64_t n, JacobianInput<E>& input) {
  using T = ComputeOf<E>;
  for (std::int64_t first = 0; first < rows * n; first += n) {
    Sum<long double> dot;
    double largest_t = 0, largest = 0;
    for (std::int64_t i = first; i < first + n; ++i) {
      const double a = static_cast<double>(Decode(input.y[i])), b = static_cast<double>(Decode(input.t[i]));
      dot.Add(a * b);
      dot.Add(std::fma(a, b, -(a * b)));
      largest_t = std::max(largest_t, std::fabs(b));
    }
    for (std::int64_t i = first; i < first + n; ++i) {
      input.exact[i] = Decode(input.y[i]) * ((Decode(input.t[i]) - dot.hi()) - dot.lo());
      largest = std::max(largest, static_cast<double>(std::fabs(input.exact[i])));
    }
    const double epsilon = std::numeric_limits<T>::epsilon();
    const double tolerance = 4 * UnitOf<T>(largest) + 64 * epsilon * epsilon * largest_t;
    for (std::int64_t i = first; i < first + n; ++i) {
      const double rounding = kIsHalf<E> ? UnitOf<E>(static_cast<double>(input.exact[i])) / 2 : 0;
      input.tolerance[i] = tolerance + rounding;
    }
  }
}

// Rows with cotangents of three kinds, one after the other: of any size; nearly constant, so that t - <y, t>
// cancels; and large where y is large.
template <typename E>
JacobianInput<E> MakeJacobianInput(std::int64_t rows, std::int64_t n) {
  const std::size_t size = static_cast<std::size_t>(rows * n);
  JacobianInput<E> input{std::vector<E>(size), std::vector<E>(size), std::vector<long double>(size),
                         std::vector<double>(size)};
  std::vector<E> x(size);
  std::vector<ExactOf<E>> y(size);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t first = r * n;
    Random random(static_cast<std::uint64_t>(first + n));
    Fill(kOrdinary[r % std::size(kOrdinary)], random, &x[first], n, 1);
    ExactSoftmax(&x[first], &y[first], n, 1);
    for (std::int64_t i = first; i < first + n; ++i) {
      const double probability = static_cast<double>(y[i]);
      Encode(probability, input.y[i]);
      const double normal = random.Normal();
      Encode(r % 3 == 0 ? normal : r % 3 == 1 ? 1 + 1e-6 * normal : 1e4 * probability, input.t[i]);
    }
  }
  Solve(rows, n, input);
  return input;
}

template <typename E>
class JacobianCheck {
 public:
  JacobianCheck(const std::vector<const Kernels*>& all, Report& report) : all_(all), report_(report) {}

  // With `inner` above 1, the rows are laid out as columns, `inner` of them side by side.
  void Check(std::int64_t rows, std::int64_t n, std::int64_t inner = 1) {
    input_ = MakeJacobianInput<E>(rows, n);
    inner_ = inner;
    AsColumns(input_.y, n);
    AsColumns(input_.t, n);
    AsColumns(input_.exact, n);
    AsColumns(input_.tolerance, n);
    const bool shared = rows * n >= kSharedElements;
    for (const Kernels* kernels : all_) {
      for (const bool threads : {false, true}) {
        if (threads && !shared) continue;
        for (const Out out : {kApart, kOverY, kOverT}) CheckOne(*kernels, rows, n, threads, out);
      }
    }
  }

 private:
  enum Out { kApart, kOverY, kOverT };

  template <typename T>
  void AsColumns(std::vector<T>& rows, std::int64_t n) const {
    std::vector<T> columns(rows.size());
    for (std::size_t at = 0; at < rows.size(); ++at) {
      const std::int64_t row = static_cast<std::int64_t>(at) / n, i = static_cast<std::int64_t>(at) % n;
      columns[static_cast<std::size_t>(row / inner_ * n * inner_ + i * inner_ + row % inner_)] = rows[at];
    }
    rows = std::move(columns);
  }

  void CheckOne(const Kernels& kernels, std::int64_t rows, std::int64_t n, bool threads, Out where) {
    InlineExecutor this_thread;
    Executor& executor = threads ? static_cast<Executor&>(helpers_) : this_thread;
    const std::int64_t size = rows * n;
    using Array = GuardedArray<E>;
    E* const y = y_.Prepare(input_.y, static_cast<int>(n % 3), Array::kPoison);
    E* const t = t_.Prepare(input_.t, static_cast<int>(n % 5), Array::kPoison);
    E* const apart = out_.Prepare(size, static_cast<int>(n % 7), Array::kUnwritten);
    E* const out = where == kApart ? apart : where == kOverY ? y : t;
    SoftmaxJacobian(kernels.Of<E>(), executor, y, t, out, {rows / inner_, n, inner_});

    report_.Of(kernels).checks += size;
    const auto fail = [&](const std::string& what) {
      report_.Fail(std::string(kernels.name) + " " + Element<E>::kName + " Jacobian [" +
                   std::to_string(rows / inner_) + ", " + std::to_string(n) + ", " + std::to_string(inner_) +
                   "]" + (threads ? ", 3 threads" : "") +
                   (where == kApart   ? ""
                    : where == kOverY ? ", over y"
                                      : ", over t") +
                   ": " + what);
    };
    if (!y_.GuardsIntact() || !t_.GuardsIntact() || !out_.GuardsIntact()) fail("wrote beyond the arrays");
    for (std::int64_t i = 0; i < size; ++i) {
      const double error = std::fabs(static_cast<double>(Decode(out[i]) - input_.exact[i]));
      if (error <= input_.tolerance[i]) continue;
      char text[200];
      std::snprintf(text, sizeof text, "element %lld is %.17g, not %.17g, more than %.3g away",
                    static_cast<long long>(i), static_cast<double>(Decode(out[i])),
                    static_cast<double>(input_.exact[i]), input_.tolerance[i]);
      return fail(text);
    }
  }

  const std::vector<const Kernels*>& all_;
  Report& report_;
  TwoHelpers helpers_;
  std::int64_t inner_ = 1;
  JacobianInput<E> input_;
  GuardedArray<E> y_, t_, out_;
};

template <typename E>
void CheckJacobian(const std::vector<const Kernels*>& all, const Scope& scope, Report& report) {
  JacobianCheck<E> check(all, report);
  const std::int64_t rows = 21;  // of every class with every kind of cotangent
  for (std::int64_t n = 1; n <= (scope.quick ? 20 : 140); ++n) {
    if (scope.Takes(n)) check.Check(rows, n);
  }
  for (const std::int64_t inner : {3, 7, 21}) {
    for (const std::int64_t n : {1, 5, 16, 100}) check.Check(rows, n, inner);
  }
  if (scope.quick) return;
  check.Check(300, 150, 300);
  check.Check(rows, 5000, 21);
  check.Check(3, 40000, 3);
  for (const std::int64_t n : {1023, 1024, 1025, 2049, 5000}) check.Check(rows, n);
  check.Check(3, 70001);
}

// ---------------------------------------------------------------------------------------------------------
// e^x of every float.

// Patterns that go through a kernel at a time. They are so few that the e^x of a chunk, where exponents are
// exact, are within 2^32 of each other: an element below 2^-127 of its row's largest counts as zero.
constexpr int kChunk = 2048;
constexpr std::uint32_t kChunks = (std::uint64_t{1} << 32) / kChunk;

// The relative error of e^x = (1 + expm1)·pow2 that kernels/exp.h states, in units of 2^-23, with a table and
// without. Here s stands for expm1.
constexpr double kClaimedErrorWithTable = 0.13, kClaimedError = 0.44;
constexpr double kLn2 = 0x1.62e42fefa39efp-1, kLog2E = 0x1.71547652b82fep0;

// The relative error of `value`, which stands for e^x·2^-exponent, in units of 2^-23. There are no branches,
// so that compilers vectorise it.
inline double RelativeError(double x, double value, double exponent) {
  constexpr double kRounder = 0x1.8p52, kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  const double rounded = x * kLog2E + kRounder, n = rounded - kRounder;
  const double r = (x - n * kLn2Hi) - n * kLn2Lo;
  double e = 1.0 / 6227020800;  // becomes e^-r
  constexpr double kInverseFactorials[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  SOFTMAX2P_UNROLL for (int i = 0; i < 13; ++i) e = kInverseFactorials[i] - e * r;
  // 2^(exponent - n), by way of the low bits of a sum.
  const std::uint64_t field = BitCast<std::uint64_t>((exponent - n) + (kRounder + 1023));
  const double error = std::fabs(value * BitCast<double>(field << 52) * e - 1) * 0x1p23;
  return error >= 0 ? error : HUGE_VAL;  // NaN fails
}

// Compiled for the widest vectors that the CPU has, since this takes nearly all of the time. Not with
// sanitizers, which would not be ready when the clone is chosen.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void RelativeErrors(const float* x, const float* s, const float* pow2, std::int64_t size, double exponent,
                    double factor, double* errors) {
  for (std::int64_t i = 0; i < size; ++i) {
    errors[i] = RelativeError(x[i], (1 + double{s[i]}) * double{pow2[i]} / factor, exponent);
  }
}

struct LargestError {
  double error = 0;
  float x = 0;
};

class EveryFloat {
 public:
  EveryFloat(const Kernels& kernels, const Scope& scope, Report& report)
      : kernels_(kernels),
        table_(kernels.f32),
        scope_(scope),
        report_(report),
        limit_(table_.max_exponent * kLn2) {}

  void Check() {
    std::vector<std::thread> threads(std::max(1u, std::thread::hardware_concurrency()));
    for (std::thread& thread : threads) thread = std::thread([this] { CheckChunks(); });
    for (std::thread& thread : threads) thread.join();
    report_.Of(kernels_).checks += (std::int64_t{1} << 32) / scope_.parts;
    std::printf("%s: relative error of (1 + s)·pow2 at most %.5f·2^-23, of e^%a\n", kernels_.name,
                largest_.error, static_cast<double>(largest_.x));
    const double claimed = table_.factor == 1 ? kClaimedError : kClaimedErrorWithTable;
    if (largest_.error > claimed) Fail("error of e^x above what exp.h says", largest_.x);
  }

 private:
  void CheckChunks() {
    const ScopedFloatMode mode;
    LargestError largest;
    for (std::uint32_t chunk; (chunk = next_++) < kChunks;) {
      if (scope_.Takes(chunk)) CheckChunk(chunk * kChunk, largest);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (largest.error > largest_.error) largest_ = largest;
  }

  void CheckChunk(std::uint32_t first, LargestError& largest) {
    float x[kChunk], s[kChunk], pow2[kChunk], y[kChunk];
    for (int i = 0; i < kChunk; ++i) x[i] = BitCast<float>(first + static_cast<std::uint32_t>(i));
    const ExtendedSum sum = table_.row_sum(x, {}, kChunk, KnownMaximum<float>{}).sum;
    table_.exponentials(x, kChunk, sum.exponent, s, pow2);
    CheckExponentials(x, s, pow2, sum.exponent, largest);
    CheckFlag(x, sum);
    for (int i = 0; i < kChunk; ++i) {
      if (std::isnan(x[i]) && !std::isnan(s[i])) Fail("s is not NaN", x[i]);
    }
    // The kernel is not meant for positive x with this exponent.
    if (first >> 31 == 0 && !std::isnan(x[kChunk - 1])) return;
    table_.row_write(x, {}, y, kChunk, RowScale<float>{1, 0, 0, false, 0, 0}, false);
    for (int i = 0; i < kChunk; ++i) {
      if (std::isnan(x[i]) && !std::isnan(y[i])) Fail("the result is not NaN", x[i]);
      if (x[i] <= -127.5 * kLn2 && y[i] != 0) Fail("the result is not zero", x[i]);
    }
  }

  void CheckExponentials(const float* x, const float* s, const float* pow2, int exponent,
                         LargestError& largest) {
    // |x| grows with the pattern.
    const float* const end =
        std::partition_point(x, x + kChunk, [&](float v) { return std::fabs(v) <= limit_; });
    double errors[kChunk];
    const std::int64_t size = end - x;
    RelativeErrors(x, s, pow2, size, exponent, table_.factor, errors);
    const double* const worst = std::max_element(errors, errors + size);
    if (size != 0 && *worst > largest.error) largest = {*worst, x[worst - errors]};
  }

  // The exponent of a sum must mark it where it is beyond the exact range, and only there.
  void CheckFlag(const float* x, const ExtendedSum& sum) {
    constexpr double kMargin = 4;
    const double nearest = std::min(std::fabs(x[0]), std::fabs(x[kChunk - 1]));
    const double furthest = std::max(std::fabs(x[0]), std::fabs(x[kChunk - 1]));
    const bool trusted = std::abs(sum.exponent) < table_.max_exponent && !std::isnan(sum.mantissa.hi);
    if (trusted && !(nearest <= limit_ + kMargin)) Fail("a sum beyond the exact range is not marked", x[0]);
    if (!trusted && furthest <= limit_ - kMargin) Fail("a sum is marked as beyond the exact range", x[0]);
  }

  void Fail(const std::string& what, float x) {
    char text[40];
    std::snprintf(text, sizeof text, ": x = %a (0x%08x)", static_cast<double>(x), BitCast<std::uint32_t>(x));
    const std::lock_guard<std::mutex> lock(mutex_);
    report_.Fail(std::string(kernels_.name) + " " + what + text);
  }

  const Kernels& kernels_;
  const KernelTable<float>& table_;
  const Scope& scope_;
  Report& report_;
  const double limit_;
  std::atomic<std::uint32_t> next_{0};
  std::mutex mutex_;
  LargestError largest_;
};

// ---------------------------------------------------------------------------------------------------------

struct Options {
  Scope scope;
  bool exhaustive = false, list = false;
  // QEMU 7.2 makes subnormal halves zero where MXCSR flushes, and its masked loads touch what they leave out.
  // Real CPUs do neither; all other checks still apply.
  bool emulated_x86 = false;
  std::vector<const Kernels*> kernels = SupportedKernels();
  std::string error;
};

Options Parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string_view argument = arguments[i];
    if (argument == "--quick") {
      options.scope.quick = true;
    } else if (argument == "--exhaustive") {
      options.exhaustive = true;
    } else if (argument == "--emulated-x86") {
      options.emulated_x86 = flushes_halves = true;
    } else if (argument == "--part" && i + 1 < count) {
      Scope& scope = options.scope;
      long long part = -1, parts = -1;
      if (std::sscanf(arguments[++i], "%lld/%lld", &part, &parts) != 2 || part < 0 || part >= parts) {
        options.error += std::string("--part takes K/N with 0 <= K < N, not ") + arguments[i];
      }
      scope.part = part;
      scope.parts = parts;
    } else if (argument == "--list") {
      options.list = true;
    } else if (argument == "--isa" && i + 1 < count) {
      const KernelChoice choice = FindKernels(arguments[++i], "--isa");
      options.kernels = {choice.kernels};
      options.error += choice.error;
    } else {
      options.error +=
          "selftest [--quick | --exhaustive | --list] [--emulated-x86] [--part K/N] [--isa NAME]";
    }
  }
  return options;
}

template <typename E>
void CheckElement(const Options& options, Report& report) {
  CheckSoftmax<E>(options.kernels, options.scope, report);
  // Most of the Jacobian's small results are subnormal halves, which the emulator flushes.
  if (!options.emulated_x86 || !std::is_same_v<E, Float16>)
    CheckJacobian<E>(options.kernels, options.scope, report);
  CheckLseClasses<E>(options.kernels, options.scope, report);
  CheckLseMargins<E>(options.kernels, options.scope, report);
  CheckFamily<E>(options.kernels, options.scope, report);
  CheckColumnBits<E>(options.kernels, options.scope, report);
}

int Main(const Options& options) {
  if (!options.error.empty()) {
    std::fprintf(stderr, "%s\n", options.error.c_str());
    return 2;
  }
  if (options.list) {
    for (const Kernels* kernels : options.kernels) std::printf("%s\n", kernels->name);
    return 0;
  }
  WatchCases(0);
  Report report;
  if (options.exhaustive) {
    for (const Kernels* kernels : options.kernels) EveryFloat(*kernels, options.scope, report).Check();
    return report.Finish();
  }
  // This comes first: what writes beyond its arrays might end the program before other tests report it.
  if (!options.emulated_x86) {
    CheckMemory<float>(options.kernels, options.scope, report);
    CheckMemory<double>(options.kernels, options.scope, report);
    CheckMemory<BFloat16>(options.kernels, options.scope, report);
    CheckMemory<Float16>(options.kernels, options.scope, report);
    SetCurrentCase("the checks of values");
    CheckHalves<BFloat16>(options.kernels, report);
    CheckHalves<Float16>(options.kernels, report);
  }
  CheckElement<float>(options, report);
  CheckElement<double>(options, report);
  CheckElement<BFloat16>(options, report);
  CheckElement<Float16>(options, report);
  for (const Kernels* kernels : options.kernels) report.PrintTally(*kernels);
  return report.Finish();
}

}  // namespace
}  // namespace jax_softmax2p

int main(int count, char** arguments) { return jax_softmax2p::Main(jax_softmax2p::Parse(count, arguments)); }
