// What the self-tests share: reports, element types, inputs, exact results, threads and guarded arrays.
#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "ffi/base/bit_cast.h"
#include "ffi/runtime/dispatch.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// ---------------------------------------------------------------------------------------------------------
// How much is checked.

struct Scope {
  bool quick = false;
  // Of every list of cases, this part out of so many: cases number part, part + parts, part + 2·parts, …
  std::int64_t part = 0, parts = 1;

  bool Takes(std::int64_t number) const { return number % parts == part; }

  template <typename Case>
  std::vector<Case> PartOf(const std::vector<Case>& all) const {
    std::vector<Case> taken;
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (Takes(static_cast<std::int64_t>(i))) taken.push_back(all[i]);
    }
    return taken;
  }
};

// ---------------------------------------------------------------------------------------------------------
// Reports: what was checked, and what failed.

struct Tally {
  std::int64_t checks = 0;
  std::map<std::string, double> worst;  // by element type
};

class Report {
 public:
  Tally& Of(const Kernels& kernels) { return tallies_[&kernels]; }

  void Fail(const std::string& what) {
    if (++failures_ <= kShown) std::printf("FAILED %s\n", what.c_str());
  }

  void PrintTally(const Kernels& kernels) {
    const Tally& tally = tallies_[&kernels];
    std::printf("%s: %lld checks; worst error in ULP:", kernels.name, static_cast<long long>(tally.checks));
    for (const auto& [element, ulp] : tally.worst) std::printf(" %s %.4f", element.c_str(), ulp);
    std::printf("\n");
  }

  // The process's exit status.
  int Finish() const {
    std::int64_t checks = 0;
    for (const auto& [kernels, tally] : tallies_) checks += tally.checks;
    if (failures_ != 0) {
      std::printf("selftest: %lld of %lld checks FAILED\n", static_cast<long long>(failures_),
                  static_cast<long long>(checks));
      return 1;
    }
    std::printf("selftest: %lld checks passed\n", static_cast<long long>(checks));
    return checks == 0;
  }

 private:
  static constexpr std::int64_t kShown = 20;

  std::map<const Kernels*, Tally> tallies_;
  std::int64_t failures_ = 0;
};

// ---------------------------------------------------------------------------------------------------------
// Element types: decoding, and correct rounding. Written apart from ffi/base/half.h, which they test.

template <typename E>
struct Element;

template <>
struct Element<float> {
  using Exact = double;
  static constexpr const char* kName = "float32";
  static constexpr int kFraction = 23, kLowest = -126;
  static constexpr double kUlp = 2;  // the contract's bound
};
template <>
struct Element<double> {
  using Exact = long double;
  static constexpr const char* kName = "float64";
  static constexpr int kFraction = 52, kLowest = -1022;
  static constexpr double kUlp = 4;
};
template <>
struct Element<BFloat16> {
  using Exact = double;
  static constexpr const char* kName = "bfloat16";
  static constexpr int kFraction = 7, kLowest = -126;
};
template <>
struct Element<Float16> {
  using Exact = double;
  static constexpr const char* kName = "float16";
  static constexpr int kFraction = 10, kLowest = -14;
};

template <typename E>
using ExactOf = typename Element<E>::Exact;

template <typename E>
inline constexpr bool kIsHalf = sizeof(E) == 2;

// The unit in the last place of x in a format with `fraction` bits and `lowest` as its lowest exponent.
template <typename T>
T UnitAt(T x, int fraction, int lowest) {
  int exponent = lowest + 1;
  if (x != 0) std::frexp(x, &exponent);
  return std::ldexp(T{1}, std::max(exponent - 1, lowest) - fraction);
}
// The same without the library's functions, which took a sixth of the tests' time.
inline double UnitAt(double x, int fraction, int lowest) {
  const int exponent = static_cast<int>(BitCast<std::uint64_t>(x) >> 52 & 0x7ff) - 1023;
  const int unit = std::max(exponent, lowest) - fraction;
  if (unit < -1022) return std::ldexp(1.0, unit);
  return BitCast<double>(static_cast<std::uint64_t>(unit + 1023) << 52);
}
template <typename E, typename T>
T UnitOf(T x) {
  return UnitAt(x, Element<E>::kFraction, Element<E>::kLowest);
}

double Decode(float x) { return x; }
long double Decode(double x) { return x; }
double Decode(BFloat16 x) { return BitCast<float>(std::uint32_t{x.bits} << 16); }
double Decode(Float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  double magnitude = std::ldexp(fraction + (exponent == 0 ? 0 : 1024), std::max(exponent, 1) - 25);
  if (exponent == 31) magnitude = fraction == 0 ? HUGE_VAL : std::nan("");
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

// x rounded to nearest, ties to even, as if E's range had no end.
template <typename E>
double RoundTo(double x) {
  const double unit = UnitOf<E>(x);
  return std::nearbyint(x / unit) * unit;
}

inline void Encode(double x, float& to) { to = static_cast<float>(x); }
inline void Encode(double x, double& to) { to = x; }
inline void Encode(double x, BFloat16& to) {
  const double rounded = std::isfinite(x) ? RoundTo<BFloat16>(x) : x;
  to.bits = static_cast<std::uint16_t>(BitCast<std::uint32_t>(static_cast<float>(rounded)) >> 16);
}
inline void Encode(double x, Float16& to) {
  const double magnitude = std::isinf(x) ? x : RoundTo<Float16>(std::fabs(x));
  const int sign = std::signbit(x) ? 0x8000 : 0;
  int exponent = 0;
  const double fraction = std::frexp(magnitude, &exponent);
  if (std::isinf(x) || exponent > 16) {
    to.bits = static_cast<std::uint16_t>(sign | 0x7c00);
  } else if (exponent < -13 || magnitude == 0) {
    to.bits = static_cast<std::uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)));
  } else {
    to.bits = static_cast<std::uint16_t>(
        sign | (static_cast<int>(std::ldexp(fraction, 11)) + (exponent + 13) * 1024));
  }
}

template <typename E>
double LargestFinite() {
  const int top = std::is_same_v<E, double> ? 1024 : std::is_same_v<E, Float16> ? 16 : 128;
  return std::ldexp(2 - std::ldexp(1.0, -Element<E>::kFraction), top - 1);
}

// NaNs of both signs, quiet and signalling, with all bits set and with few.
template <typename E>
E NanOf(int kind) {
  using Bits =
      std::conditional_t<kIsHalf<E>, std::uint16_t,
                         std::conditional_t<std::is_same_v<E, double>, std::uint64_t, std::uint32_t>>;
  constexpr int kFraction = Element<E>::kFraction;
  constexpr Bits kOnes = static_cast<Bits>(~Bits{0}), kPositive = kOnes >> 1;
  constexpr Bits kInfinity = static_cast<Bits>(kPositive >> kFraction << kFraction);
  constexpr Bits kQuiet = static_cast<Bits>(kInfinity | Bits{1} << (kFraction - 1));
  constexpr Bits kKinds[4] = {kOnes, kPositive, kInfinity + 1, kQuiet};
  return BitCast<E>(kKinds[kind & 3]);
}

// ---------------------------------------------------------------------------------------------------------
// Inputs.

// SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): the same numbers everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t Next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  // In [-1, 1).
  double Uniform() { return static_cast<double>(static_cast<std::int64_t>(Next())) * 0x1p-63; }
  // With a bell-shaped distribution of variance 1.
  double Normal() { return Uniform() + Uniform() + Uniform(); }

 private:
  std::uint64_t state_;
};

// Makes the elements of a row. Values are clamped to the element type's range.
struct DataClass {
  const char* name;
  double (*value)(Random& random, std::int64_t i, std::int64_t n);
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Stands for the type's lowest finite number.
constexpr double kFarBelow = -1e300;

double Mask(Random& random) {
  constexpr double kMasks[] = {-kInfinity, kFarBelow, 0.7 * kFarBelow, -1e30, -1e9};
  return kMasks[random.Next() % 5];
}

constexpr DataClass kOrdinary[] = {
    {"normal", [](Random& r, std::int64_t, std::int64_t) { return r.Normal(); }},
    {"spike", [](Random& r, std::int64_t i, std::int64_t n) { return i == n * 5 / 8 ? 17.5 : r.Normal(); }},
    {"tall spike", [](Random& r, std::int64_t i, std::int64_t n) { return i == n / 3 ? 60 : r.Normal(); }},
    {"ramp",
     [](Random& r, std::int64_t i, std::int64_t n) {
       return 180 * static_cast<double>(i) / static_cast<double>(n) - 90 + 0.001 * r.Uniform();
     }},
    {"equal", [](Random&, std::int64_t, std::int64_t) { return 0.7; }},
    {"masks", [](Random& r, std::int64_t i,
                 std::int64_t n) { return i != n / 2 && r.Next() % 5 < 2 ? Mask(r) : r.Normal(); }},
    {"masked ends",
     [](Random& r, std::int64_t i, std::int64_t n) {
       if (i < n / 3) return -kInfinity;
       return i >= n - n / 3 ? kFarBelow : r.Normal();
     }},
};
// Classes whose rounding errors repeat themselves or add up, and so come nearest to the contract's bound.
constexpr double kPeriod[] = {0.84, 0.11, 0.47, 0.93, 0.29, 0.66, 0.05, 0.71, 0.38, 0.52, 0.17, 0.99,
                              0.25, 0.60, 0.78, 0.02, 0.91, 0.34, 0.57, 0.13, 0.82, 0.45, 0.69, 0.21};
constexpr DataClass kRepeating[] = {
    {"dominated", [](Random& r, std::int64_t i,
                     std::int64_t) { return i == 0 ? 35 + 5 * r.Uniform() : 5 + 5 * r.Uniform(); }},
    {"one far above", [](Random& r, std::int64_t i,
                         std::int64_t n) { return i == n / 7 ? 22 + 10 * r.Uniform() : r.Normal(); }},
    {"two values",
     [](Random&, std::int64_t i, std::int64_t n) {
       const double of_row = static_cast<double>(n % 97) / 31;
       return i / 8 % 2 == 0 ? of_row : 3.7 - of_row * of_row / 3;
     }},
    {"periodic", [](Random&, std::int64_t i,
                    std::int64_t n) { return kPeriod[(i + n) % 16] + kPeriod[i % (8 << n % 2)]; }},
};
// Some of these trigger the third pass, also for rows in the same vector.
constexpr DataClass kExtreme[] = {
    {"±1000", [](Random& r, std::int64_t, std::int64_t) { return 1000 * r.Uniform(); }},
    {"drift",
     [](Random& r, std::int64_t i, std::int64_t) { return 0.25 * static_cast<double>(i) + r.Normal(); }},
    {"1e6", [](Random& r, std::int64_t, std::int64_t) { return 1e6 + 20 * r.Normal(); }},
    {"-1e6", [](Random& r, std::int64_t, std::int64_t) { return -1e6 + 20 * r.Normal(); }},
    {"1e9", [](Random& r, std::int64_t, std::int64_t) { return 1e9 + 80 * r.Normal(); }},
    {"-1e9", [](Random& r, std::int64_t, std::int64_t) { return -1e9 + 80 * r.Normal(); }},
    {"all lowest", [](Random&, std::int64_t, std::int64_t) { return kFarBelow; }},
    {"a NaN", [](Random& r, std::int64_t i, std::int64_t n) { return i == n * 3 / 8 ? kNan : r.Normal(); }},
    {"a NaN at 1e9",
     [](Random& r, std::int64_t i, std::int64_t n) { return i == n * 3 / 4 ? kNan : 1e9 + 80 * r.Normal(); }},
    {"a +inf",
     [](Random& r, std::int64_t i, std::int64_t n) { return i == n * 5 / 7 ? kInfinity : r.Normal(); }},
    {"all -inf", [](Random&, std::int64_t, std::int64_t) { return -kInfinity; }},
};

// The classes that are given to the columns of an array, one after the other.
inline std::vector<DataClass> ClassesOf(bool extreme) {
  std::vector<DataClass> classes(std::begin(kOrdinary), std::end(kOrdinary));
  classes.insert(classes.end(), std::begin(kRepeating), std::end(kRepeating));
  if (extreme) classes.insert(classes.end(), std::begin(kExtreme), std::end(kExtreme));
  return classes;
}
constexpr std::int64_t kClasses =
    static_cast<std::int64_t>((sizeof kOrdinary + sizeof kRepeating + sizeof kExtreme) / sizeof(DataClass));

template <typename E>
void Fill(const DataClass& data, Random& random, E* x, std::int64_t n, std::int64_t stride) {
  const double largest = LargestFinite<E>();
  for (std::int64_t i = 0; i < n; ++i) {
    const double value = data.value(random, i, n);
    E& to = x[i * stride];
    if (std::isnan(value)) {
      to = NanOf<E>(static_cast<int>(random.Next() >> 60));
    } else {
      Encode(std::isinf(value) ? value : std::clamp(value, -largest, largest), to);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Exact results.

// Neumaier's sum: as precise as T, whatever the number of terms.
template <typename T>
class Sum {
 public:
  void Add(T x) {
    const T sum = sum_ + x;
    rest_ += std::fabs(sum_) >= std::fabs(x) ? (sum_ - sum) + x : (x - sum) + sum_;
    sum_ = sum;
  }
  T hi() const { return sum_; }
  T lo() const { return rest_; }

 private:
  T sum_ = 0, rest_ = 0;
};

// e^(x - maximum), corrected for the rounding of the difference.
template <typename T>
T ExpOfDifference(T x, T maximum) {
  const T difference = x - maximum;
  if (!(difference > -20000)) return 0;
  const T part = difference - x;
  const T lost = (x - (difference - part)) - (maximum + part);
  return std::exp(difference) * (1 + lost);
}

template <typename E>
void ExactSoftmax(const E* x, ExactOf<E>* y, std::int64_t n, std::int64_t stride) {
  using T = ExactOf<E>;
  T maximum = -std::numeric_limits<T>::infinity();
  bool undefined = false;
  for (std::int64_t i = 0; i < n; ++i) {
    const T value = Decode(x[i * stride]);
    undefined = undefined || std::isnan(value);
    maximum = std::max(maximum, value);
  }
  undefined = undefined || std::isinf(maximum);
  Sum<T> sum;
  for (std::int64_t i = 0; i < n && !undefined; ++i) {
    sum.Add(y[i * stride] = ExpOfDifference<T>(Decode(x[i * stride]), maximum));
  }
  const T total = sum.hi() + sum.lo();
  for (std::int64_t i = 0; i < n; ++i) {
    y[i * stride] = undefined ? std::numeric_limits<T>::quiet_NaN() : y[i * stride] / total;
  }
}

// Set by --emulated-x86: QEMU 7.2's vcvtps2ph makes subnormal halves zero where MXCSR flushes, which a CPU's
// does not.
inline bool flushes_halves = false;

// Whether the contract allows y for `exact`, and y's error.
template <typename E>
bool Allowed(E y, ExactOf<E> exact, double& ulp) {
  const ExactOf<E> value = Decode(y);
  ulp = 0;
  if (std::isnan(exact) || std::isnan(value)) return std::isnan(exact) && std::isnan(value);
  if (std::signbit(value)) return false;
  if (flushes_halves && std::is_same_v<E, Float16> && value == 0 && exact < 0x1p-14) return true;
  if (value == 0 && !std::is_same_v<E, Float16>) {
    // A result may be flushed to zero below the normal range of the compute type, or where rounding takes it
    // there.
    constexpr int kLowest = Element<E>::kLowest;
    if (exact < std::ldexp(ExactOf<E>{1}, kLowest) + 4 * UnitOf<ComputeOf<E>>(ExactOf<E>{0})) return true;
  }
  ulp = static_cast<double>(std::fabs(value - exact) / UnitOf<E>(exact));
  if constexpr (kIsHalf<E>) {
    const double margin = 2 * UnitOf<float>(exact);
    return RoundTo<E>(std::max(0.0, exact - margin)) <= value && value <= RoundTo<E>(exact + margin);
  } else {
    return ulp <= Element<E>::kUlp;
  }
}

// Whether the bits are the same, other than those of NaNs.
template <typename E>
bool Same(const E* a, const E* b, std::int64_t n) {
  if (std::memcmp(a, b, static_cast<std::size_t>(n) * sizeof(E)) == 0) return true;
  return std::equal(a, a + n, b, [](const E& one, const E& other) {
    return std::memcmp(&one, &other, sizeof(E)) == 0 ||
           (std::isnan(Decode(one)) && std::isnan(Decode(other)));
  });
}

// ---------------------------------------------------------------------------------------------------------
// Threads and arrays for a call.

// An executor with two threads beside the caller's.
class TwoHelpers : public Executor {
 public:
  TwoHelpers() {
    for (std::thread& thread : threads_) thread = std::thread([this] { Work(); });
  }
  ~TwoHelpers() override {
    for (std::size_t i = 0; i < std::size(threads_); ++i) Schedule(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }
  int Helpers() const override { return static_cast<int>(std::size(threads_)); }
  void Schedule(std::function<void()> task) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  // Until it is handed an empty task.
  void Work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      ready_.wait(lock, [this] { return !tasks_.empty(); });
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (!task) return;
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  std::thread threads_[2];
};

// An array that begins `offset` elements after a 64-byte boundary, between guards.
template <typename E>
class GuardedArray {
 public:
  // NaN in every type: an input that is read too far poisons the results.
  static constexpr unsigned char kPoison = 0xff;
  // A number in every type: an element that was not written is noticed even where NaN is right.
  static constexpr unsigned char kUnwritten = 0xa5;

  E* Prepare(std::int64_t n, int offset, unsigned char fill) {
    const std::size_t before = kGuard + static_cast<std::size_t>(offset) * sizeof(E);
    fill_ = fill;
    size_ = static_cast<std::size_t>(n) * sizeof(E);
    bytes_.resize(std::max(bytes_.size(), kAlignment + before + size_ + kGuard));
    const auto misaligned = reinterpret_cast<std::uintptr_t>(bytes_.data()) % kAlignment;
    begin_ = bytes_.data() + (kAlignment - misaligned) + before;
    std::memset(begin_ - kGuard, fill, size_ + 2 * kGuard);
    return reinterpret_cast<E*>(begin_);
  }
  E* Prepare(const std::vector<E>& contents, int offset, unsigned char fill) {
    E* const begin = Prepare(static_cast<std::int64_t>(contents.size()), offset, fill);
    std::memcpy(begin, contents.data(), size_);
    return begin;
  }
  bool GuardsIntact() const {
    const auto intact = [this](unsigned char byte) { return byte == fill_; };
    return std::all_of(begin_ - kGuard, begin_, intact) &&
           std::all_of(begin_ + size_, begin_ + size_ + kGuard, intact);
  }

 private:
  static constexpr std::size_t kAlignment = 64, kGuard = 256;

  std::vector<unsigned char> bytes_;
  unsigned char* begin_ = nullptr;
  unsigned char fill_ = 0;
  std::size_t size_ = 0;
};

}  // namespace jax_softmax2p
