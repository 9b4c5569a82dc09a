// Tests that nothing outside of the arrays is read or written: every operation on arrays that begin after a
// page without access, and on arrays that end at one, gives the bits that it gives elsewhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "ffi/ops/algorithm.h"
#include "ffi/ops/logsumexp.h"
#include "ffi/ops/softmax.h"
#include "ffi/ops/softmax_jacobian.h"
#include "tests/selftest/current_case.h"
#include "tests/selftest/family.h"
#include "tests/selftest/guard_pages.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {

template <typename E>
class MemoryCheck {
  using T = ComputeOf<E>;

 public:
  explicit MemoryCheck(Report& report) : report_(report) {}

  void Check(const Kernels& kernels, const FamilyCase& of) {
    const FamilyInput<E> input(of);
    in_ = &input;
    kernels_ = &kernels;
    for (const Operation& operation : Operations()) {
      Run(operation, Place::kApart, kApart);
      expected_ = Results();
      for (const Place place : {Place::kAtBegin, Place::kAtEnd}) {
        for (const Where where : {kApart, kOverX, kOverT}) {
          if (where != kApart && where != operation.in_place) continue;
          Run(operation, place, where);
          ++report_.Of(kernels).checks;
          if (Results() != expected_) report_.Fail(std::string("to give the same bits: ") + current_case);
        }
      }
    }
  }

 private:
  // Where the result is written.
  enum Where { kApart, kOverX, kOverT };

  struct Operation {
    std::string name;
    Where in_place;  // where else it may be written
    std::function<void(MemoryCheck&)> run;
  };

  std::vector<Operation> Operations() const {
    std::vector<Operation> all;
    for (const NamedAlgorithm& named : kAlgorithms) {
      const Algorithm algorithm = named.algorithm;
      all.push_back({std::string("softmax ") + std::string(named.name), kOverX, [algorithm](MemoryCheck& c) {
                       Softmax(*c.kernels_, c.Threads(), algorithm, c.logits_, c.y_);
                     }});
    }
    all.push_back({"lse", kApart,
                   [](MemoryCheck& c) { LogSumExp(*c.kernels_, c.Threads(), c.logits_, {c.hi_, c.lo_}); }});
    all.push_back({"log_softmax", kOverX, [](MemoryCheck& c) {
                     LogSoftmax(*c.kernels_, c.Threads(), c.logits_, c.y_, {c.hi_, c.lo_});
                   }});
    all.push_back({"log_sum_jvp", kApart, [](MemoryCheck& c) {
                     LogSumExpJvp(*c.kernels_, c.Threads(), c.logits_, c.Sums(true), c.t_, c.out_);
                   }});
    all.push_back({"log_sum_vjp", kOverX, [](MemoryCheck& c) {
                     LogSumExpVjp(*c.kernels_, c.Threads(), c.logits_, c.Sums(true), c.factor_, c.y_);
                   }});
    all.push_back({"log_softmax_vjp", kOverT, [](MemoryCheck& c) {
                     LogSoftmaxVjp(*c.kernels_, c.Threads(), c.logits_, c.Sums(false), c.t_, c.y_);
                   }});
    if (in_->LogitsOf(nullptr).HasOperands()) return all;
    all.push_back({"Jacobian", kOverX, [](MemoryCheck& c) { c.RunJacobian(); }});
    all.push_back({"Jacobian", kOverT, [](MemoryCheck& c) { c.RunJacobian(); }});
    if (in_->layout.inner == 1 && in_->layout.n > 0) AddNonTemporal(all);
    return all;
  }

  // With non-temporal stores, which operations use for arrays larger than the caches.
  static void AddNonTemporal(std::vector<Operation>& all) {
    for (const bool maximum_first : {false, true}) {
      for (const bool reload : {false, true}) {
        const SoftmaxPlan plan{maximum_first, reload, true};
        all.push_back({"softmax, non-temporal", kOverX, [plan](MemoryCheck& c) {
                         SoftmaxRows(*c.kernels_, c.Threads(), plan, c.logits_, c.y_);
                       }});
      }
    }
    all.push_back({"kernels, non-temporal", kOverX, [](MemoryCheck& c) {
                     const ScopedFloatMode mode;
                     const KernelTable<E>& own = c.kernels_->Of<E>();
                     const std::int64_t n = c.in_->layout.n, rows = c.in_->layout.outer;
                     if (n <= kMaxSmall) {
                       own.small_matrices(c.logits_.x, c.y_, rows, static_cast<int>(n), 1, true);
                     } else {
                       own.row_write_log(c.logits_.x, c.y_, n * rows, {T{1}, T{2}, T{0}}, true);
                     }
                   }});
    all.push_back({"Jacobian, non-temporal", kOverT, [](MemoryCheck& c) {
                     const ScopedFloatMode mode;
                     c.kernels_->Of<E>().jacobian_write(c.logits_.x, c.t_, c.y_, c.Size(), {T{1}, T{2}},
                                                        true);
                   }});
  }

  void RunJacobian() { SoftmaxJacobian(kernels_->Of<E>(), Threads(), logits_.x, t_, y_, in_->layout); }

  std::int64_t Size() const { return static_cast<std::int64_t>(in_->x.size()); }
  Executor& Threads() { return Size() < kMinParallel ? static_cast<Executor&>(this_thread_) : helpers_; }
  LabelledLse<E> Sums(bool labelled) const { return {hi_, lo_, labelled ? labels_ : nullptr}; }

  void Run(const Operation& operation, Place place, Where where) {
    const FamilyCase& given = in_->given;
    SetCurrentCase("%s %s %s [%lld, %lld, %lld]%s%s%s%s%s, arrays %s", kernels_->name, Element<E>::kName,
                   operation.name.c_str(), static_cast<long long>(given.layout.outer),
                   static_cast<long long>(given.layout.n), static_cast<long long>(given.layout.inner),
                   given.scale ? ", scale" : "", given.bias ? ", bias" : "", given.where ? ", where" : "",
                   given.band ? ", band" : "", where == kApart ? "" : ", in place",
                   place == Place::kAtBegin ? "that begin after a page without access"
                   : place == Place::kAtEnd ? "that end at a page without access"
                                            : "apart from pages without access");
    Prepare(place, where);
    operation.run(*this);
  }

  void Prepare(Place place, Where where) {
    E* const x = arrays_.x.Prepare(in_->x, place);
    t_ = arrays_.t.Prepare(in_->t, place);
    y_ = where == kOverX ? x : where == kOverT ? t_ : arrays_.y.Prepare(Size(), place);
    if (where == kApart && Size() != 0) std::memset(y_, 0xa5, in_->x.size() * sizeof(E));
    const std::vector<T> zeros(in_->scale.size());
    factor_ = arrays_.factor.Prepare(in_->factor, place);
    hi_ = arrays_.hi.Prepare(in_->factor, place);
    lo_ = arrays_.lo.Prepare(zeros, place);
    out_ = arrays_.out.Prepare(zeros, place);
    labels_ = arrays_.labels.Prepare(in_->labels, place);
    logits_ = in_->LogitsOf(x);
    if (in_->given.scale) logits_.scale.data = arrays_.scale.Prepare(in_->scale, place);
    if (in_->given.bias) logits_.bias.data = arrays_.bias.Prepare(in_->bias, place);
    if (in_->given.where) logits_.where.data = arrays_.where.Prepare(in_->where, place);
  }

  // The bytes of everything that the operation may have written.
  std::string Results() const {
    std::string bytes(reinterpret_cast<const char*>(y_), in_->x.size() * sizeof(E));
    for (const T* const row : {hi_, lo_, out_}) {
      bytes.append(reinterpret_cast<const char*>(row), in_->scale.size() * sizeof(T));
    }
    return bytes;
  }

  Report& report_;
  InlineExecutor this_thread_;
  TwoHelpers helpers_;
  const FamilyInput<E>* in_ = nullptr;
  const Kernels* kernels_ = nullptr;
  struct {
    PagedArray<E> x, y, t, bias;
    PagedArray<T> scale, factor, hi, lo, out;
    PagedArray<std::int32_t> labels;
    PagedArray<std::uint8_t> where;
  } arrays_;
  Logits<E> logits_;
  E *y_ = nullptr, *t_ = nullptr;
  T *factor_ = nullptr, *hi_ = nullptr, *lo_ = nullptr, *out_ = nullptr;
  std::int32_t* labels_ = nullptr;
  std::string expected_;
};

inline std::vector<Layout> MemoryLayouts(bool quick) {
  std::vector<Layout> layouts;
  for (std::int64_t n = 0; n <= (quick ? 40 : 300); ++n) layouts.push_back({3, n, 1});
  if (quick) {
    for (const std::int64_t n : {127, 128, 129, 143, 300}) layouts.push_back({3, n, 1});
  } else {
    // The sizes by which kernels and operations divide rows, one less, one more, and with a tail.
    for (const std::int64_t block : {512, 1024, 2048, 4096, 8192, 16384, 32768, 65536}) {
      for (const std::int64_t n : {block - 1, block, block + 1, block + 23}) layouts.push_back({1, n, 1});
    }
    layouts.push_back({2, 131075, 1});
  }
  for (const std::int64_t inner : {2, 3, 5, 16, 19, 64, 259}) {
    for (std::int64_t n = 0; n <= (quick ? 9 : 36); ++n) layouts.push_back({2, n, inner});
    if (!quick) layouts.push_back({1, 300, inner});
  }
  if (quick) return layouts;
  for (const std::int64_t n : {2047, 2048, 2049, 4097}) {
    for (const std::int64_t inner : {2, 19}) layouts.push_back({1, n, inner});
  }
  return layouts;
}

// The operands that arrays of a layout have: none, all, and each by itself at lengths that are likelier to
// fail.
inline std::vector<FamilyCase> MemoryCases(const Layout& layout) {
  constexpr int kScale = 1, kBias = 2, kWhere = 4, kBand = 8, kArrays = kScale | kBias | kWhere;
  const bool rows = layout.inner == 1;
  std::vector<int> all{0, layout.n % 2 == 0 || !rows ? kArrays : kArrays | kBand};
  if (rows ? layout.n <= 36 || layout.n % 16 == 0 : layout.n <= 9) {
    all.insert(all.end(), {kScale, kBias, kWhere});
    if (rows) all.push_back(kBand);
  }
  std::vector<FamilyCase> cases;
  for (const int given : all) {
    cases.push_back(
        {layout, (given & kScale) != 0, (given & kBias) != 0, (given & kWhere) != 0, (given & kBand) != 0});
  }
  return cases;
}

template <typename E>
void CheckMemory(const std::vector<const Kernels*>& all, const Scope& scope, Report& report) {
  MemoryCheck<E> check(report);
  for (const Layout& layout : scope.PartOf(MemoryLayouts(scope.quick))) {
    for (const FamilyCase& of : MemoryCases(layout)) {
      for (const Kernels* kernels : all) check.Check(*kernels, of);
    }
  }
}

}  // namespace jax_softmax2p
