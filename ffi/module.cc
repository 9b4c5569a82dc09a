// The Python module jax_softmax2p._native: FFI capsules, introspection, and the kernels on NumPy arrays.
//
// For jax_softmax2p/native.py, which checks alignment, overlap and the like with words for users.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "ffi/handlers/handlers.h"
#include "ffi/kernels/guard.h"
#include "ffi/runtime/algorithm.h"
#include "ffi/runtime/dispatch.h"
#include "ffi/runtime/rows.h"

namespace nb = nanobind;

namespace jax_softmax2p {
namespace {

// Threads for the length of one call.
class StdThreads : public Executor {
 public:
  explicit StdThreads(int threads) : threads_(threads) { started_.reserve(threads); }
  ~StdThreads() override {
    for (std::thread& thread : started_) thread.join();
  }
  int Helpers() const override { return threads_ - 1; }
  void Schedule(std::function<void()> task) override {
    try {
      started_.emplace_back(std::move(task));
    } catch (const std::system_error&) {
      // No thread to be had. Helpers are optional: the caller does the work.
    }
  }

 private:
  int threads_;
  std::vector<std::thread> started_;
};

nb::capsule Capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict Registrations() {
  nb::dict targets;
  targets["jax_softmax2p_softmax_v1"] = Capsule(jax_softmax2p_softmax_v1);
  targets["jax_softmax2p_softmax_jacobian_v1"] = Capsule(jax_softmax2p_softmax_jacobian_v1);
  return targets;
}

std::vector<std::string> Names(const std::vector<const Kernels*>& all) {
  std::vector<std::string> names;
  for (const Kernels* kernels : all) names.emplace_back(kernels->name);
  return names;
}

const Kernels& Require(const KernelChoice& choice) {
  if (choice.kernels == nullptr) throw nb::value_error(choice.error.c_str());
  return *choice.kernels;
}

// Rows of the last axis of C-contiguous arrays that all have the shape of the first.
template <typename T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

template <typename First, typename... Rest>
std::pair<std::int64_t, std::int64_t> RowsOf(const First& first, const Rest&... rest) {
  if (first.ndim() == 0) throw nb::value_error("arrays must have one dimension at least");
  const auto same_shape = [&](const auto& other) {
    if (other.ndim() != first.ndim()) return false;
    for (std::size_t i = 0; i < first.ndim(); ++i) {
      if (other.shape(i) != first.shape(i)) return false;
    }
    return true;
  };
  if (!(same_shape(rest) && ...)) throw nb::value_error("arrays must have the same shape");
  const std::int64_t n = static_cast<std::int64_t>(first.shape(first.ndim() - 1));
  return {n == 0 ? 0 : static_cast<std::int64_t>(first.size()) / n, n};
}

template <typename T>
void SoftmaxInto(const Array<const T>& x, const Array<T>& out, const std::string& algorithm,
                 const std::string& isa, int threads) {
  const std::optional<Algorithm> chosen = FindAlgorithm(algorithm);
  if (!chosen) throw nb::value_error(UnknownAlgorithm(algorithm).c_str());
  const KernelTable<T>& kernels = Require(FindKernels(isa, "isa")).template Of<T>();
  const auto [rows, n] = RowsOf(x, out);
  const T* from = x.data();
  T* to = out.data();
  nb::gil_scoped_release release;
  StdThreads executor(threads);
  SoftmaxRows(kernels, executor, *chosen, from, to, rows, n);
}

template <typename T>
void JacobianInto(const Array<const T>& y, const Array<const T>& t, const Array<T>& out,
                  const std::string& isa, int threads) {
  const KernelTable<T>& kernels = Require(FindKernels(isa, "isa")).template Of<T>();
  const auto [rows, n] = RowsOf(y, t, out);
  const T *from_y = y.data(), *from_t = t.data();
  T* to = out.data();
  nb::gil_scoped_release release;
  StdThreads executor(threads);
  JacobianRows(kernels, executor, from_y, from_t, to, rows, n);
}

template <typename T>
void BindKernels(nb::module_& module) {
  module.def("softmax_into", SoftmaxInto<T>, nb::arg("x").noconvert(), nb::arg("out").noconvert(),
             nb::arg("algorithm"), nb::arg("isa"), nb::arg("threads"));
  module.def("softmax_jacobian_into", JacobianInto<T>, nb::arg("y").noconvert(), nb::arg("t").noconvert(),
             nb::arg("out").noconvert(), nb::arg("isa"), nb::arg("threads"));
}

NB_MODULE(_native, module) {
  module.def("registrations", Registrations);
  module.def("algorithms", [] {
    std::vector<std::string> names;
    for (const NamedAlgorithm& known : kAlgorithms) names.emplace_back(known.name);
    return names;
  });
  module.def("supported_isas", [] { return Names(SupportedKernels()); });
  module.def("active_isa", [] { return std::string(Require(ActiveKernels()).name); });
  module.attr("FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.attr("GUARDED") = kGuarded;
  BindKernels<float>(module);
  BindKernels<double>(module);
}

}  // namespace
}  // namespace jax_softmax2p
