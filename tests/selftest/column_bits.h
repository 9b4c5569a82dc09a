// Tests that the bits of a column depend on the column alone: not on how many lie beside it, on where it lies
// among them, on the matrices around, or on the number of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ffi/ops/logsumexp.h"
#include "ffi/ops/softmax.h"
#include "ffi/ops/softmax_jacobian.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {

template <typename E>
class ColumnBitsCheck {
  using T = ComputeOf<E>;
  static constexpr std::int64_t kColumns = 53;

 public:
  // With arrays of so many elements at most.
  ColumnBitsCheck(const std::vector<const Kernels*>& all, std::int64_t most, Report& report)
      : all_(all), most_(most), report_(report) {}

  // Columns of n elements, with and without operands.
  void Check(std::int64_t n) {
    n_ = n;
    Random random(static_cast<std::uint64_t>(n));
    const std::size_t size = static_cast<std::size_t>(kColumns * n);
    for (auto* array : {&x_, &t_, &bias_}) {
      array->resize(size);
      for (E& element : *array) Encode(random.Normal(), element);
    }
    // Blocks of rows have other maxima, and sums of t that cancel.
    for (std::size_t at = 0; at < size; ++at) {
      const std::int64_t i = static_cast<std::int64_t>(at) % n;
      Encode(Decode(x_[at]) + 30.0 * static_cast<double>(i) / static_cast<double>(n), x_[at]);
      Encode(i % 2 == 0 ? Decode(t_[at]) + 100.0 : -100.0, t_[at]);
    }
    where_.resize(size);
    for (std::uint8_t& element : where_) element = random.Uniform() < 0.7;
    for (auto* array : {&scale_, &factor_}) {
      array->resize(kColumns);
      for (T& element : *array) element = static_cast<T>(random.Normal());
    }
    // Some columns need the guard's third pass, or have no softmax.
    for (std::int64_t i = 0; i < n; ++i) {
      Encode(Decode(x_[3 * n + i]) + 1e4, x_[3 * n + i]);
      Encode(i == n / 2 ? kNan : 1.0, x_[4 * n + i]);
      where_[5 * n + i] = 0;
    }
    for (const Kernels* kernels : all_) {
      for (const bool has_operands : {false, true}) CheckKernels(*kernels, has_operands);
    }
  }

 private:
  // Of every column all that operations make of it.
  using Results = std::vector<std::string>;

  void CheckKernels(const Kernels& kernels, bool has_operands) {
    InlineExecutor this_thread;
    const Results expected = Run(kernels, this_thread, {1, n_, kColumns}, has_operands);
    for (const std::int64_t inner : {2, 3, 4, 7, 8, 15, 16, 17, 40, 100, 257, 1024}) {
      for (const std::int64_t outer : {1, 2, 9, 33, 120}) {
        const Layout layout{outer, n_, inner};
        if (outer * n_ * inner > most_) continue;
        Executor& executor = outer % 2 == 0 ? static_cast<Executor&>(helpers_) : this_thread;
        const Results results = Run(kernels, executor, layout, has_operands);
        for (std::int64_t r = 0; r < outer * inner; ++r) {
          ++report_.Of(kernels).checks;
          if (results[static_cast<std::size_t>(r)] == expected[static_cast<std::size_t>(r % kColumns)])
            continue;
          report_.Fail(std::string(kernels.name) + " " + Element<E>::kName + " column " + std::to_string(r) +
                       " of [" + std::to_string(outer) + ", " + std::to_string(n_) + ", " +
                       std::to_string(inner) + "] has other bits" + (has_operands ? ", with operands" : ""));
          break;
        }
      }
    }
  }

  // Column r of the arrays is column r % kColumns of the data.
  Results Run(const Kernels& kernels, Executor& executor, const Layout& layout, bool has_operands) {
    layout_ = layout;
    const std::int64_t rows = layout.outer * layout.inner;
    const std::vector<E> x = Arrange(x_), t = Arrange(t_), bias = Arrange(bias_);
    const std::vector<std::uint8_t> where = Arrange(where_);
    std::vector<T> scale, factor, hi(static_cast<std::size_t>(rows)), lo = hi, jvp = hi;
    std::vector<std::int32_t> labels;
    for (std::int64_t r = 0; r < rows; ++r) {
      scale.push_back(scale_[static_cast<std::size_t>(r % kColumns)]);
      factor.push_back(factor_[static_cast<std::size_t>(r % kColumns)]);
      labels.push_back(static_cast<std::int32_t>(r % kColumns % (n_ + 1)));
    }
    Logits<E> logits = PlainLogits(x.data(), layout);
    if (has_operands) {
      const std::int64_t matrix = layout.n * layout.inner;
      logits.dims = {layout.outer, layout.inner};
      logits.scale = {scale.data(), {layout.inner, 1}, 0};
      logits.bias = {bias.data(), {matrix, 1}, layout.inner};
      logits.where = {where.data(), {matrix, 1}, layout.inner};
    }
    const LabelledLse<E> labelled{hi.data(), lo.data(), labels.data()}, lse{hi.data(), lo.data(), nullptr};
    std::vector<E> softmax(x.size()), log_softmax(x.size()), vjp(x.size()), log_vjp(x.size()), j(x.size());
    LogSoftmax(kernels, executor, logits, log_softmax.data(), {hi.data(), lo.data()});
    LogSumExp(kernels, executor, logits, {hi.data(), lo.data()});
    LogSumExpJvp(kernels, executor, logits, labelled, t.data(), jvp.data());
    LogSumExpVjp(kernels, executor, logits, labelled, factor.data(), vjp.data());
    LogSoftmaxVjp(kernels, executor, logits, lse, t.data(), log_vjp.data());
    SoftmaxJacobian(kernels.Of<E>(), executor, x.data(), t.data(), j.data(), layout);
    // Without operands, narrow matrices are folded, which gives their softmax other bits.
    if (has_operands) Softmax(kernels, executor, Algorithm::kAuto, logits, softmax.data());
    Results results(static_cast<std::size_t>(rows));
    for (std::int64_t r = 0; r < rows; ++r) {
      std::string& of_column = results[static_cast<std::size_t>(r)];
      for (const auto* array : {&hi, &lo, &jvp}) Append((*array)[static_cast<std::size_t>(r)], of_column);
      for (const auto* array : {&softmax, &log_softmax, &vjp, &log_vjp, &j}) {
        for (std::int64_t i = 0; i < n_; ++i) Append((*array)[At(r, i)], of_column);
      }
    }
    return results;
  }

  std::size_t At(std::int64_t row, std::int64_t i) const {
    return static_cast<std::size_t>((row / layout_.inner * layout_.n + i) * layout_.inner +
                                    row % layout_.inner);
  }

  template <typename Value>
  std::vector<Value> Arrange(const std::vector<Value>& columns) const {
    std::vector<Value> array(static_cast<std::size_t>(layout_.outer * layout_.n * layout_.inner));
    for (std::int64_t r = 0; r < layout_.outer * layout_.inner; ++r) {
      for (std::int64_t i = 0; i < n_; ++i) {
        array[At(r, i)] = columns[static_cast<std::size_t>(r % kColumns * n_ + i)];
      }
    }
    return array;
  }

  // One NaN is like another.
  template <typename Value>
  static void Append(Value value, std::string& bytes) {
    if (std::isnan(static_cast<double>(Decode(value)))) {
      bytes += "NaN";
    } else {
      bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
  }

  const std::vector<const Kernels*>& all_;
  const std::int64_t most_;
  Report& report_;
  TwoHelpers helpers_;
  std::int64_t n_ = 0;
  Layout layout_{};
  std::vector<E> x_, t_, bias_;
  std::vector<std::uint8_t> where_;
  std::vector<T> scale_, factor_;
};

template <typename E>
void CheckColumnBits(const std::vector<const Kernels*>& all, const Scope& scope, Report& report) {
  // An emulator takes minutes for the larger ones.
  ColumnBitsCheck<E> check(all, scope.quick ? 30000 : 300000, report);
  std::vector<std::int64_t> lengths{1, 5, 16, 17, 100};
  if (!scope.quick) lengths.insert(lengths.end(), {2048, 2049, 2065, 5000});
  for (const std::int64_t n : scope.PartOf(lengths)) check.Check(n);
}

}  // namespace jax_softmax2p
