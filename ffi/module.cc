// The Python module jax_softmax2p._native: FFI capsules, introspection, and the kernels on NumPy arrays. What
// serves measurement alone is in its submodule `measurement`.
//
// Only jax_softmax2p.native calls it, which checks alignment, overlap and the like with words for users.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <vector>

#include "ffi/handlers/handlers.h"
#include "ffi/kernels/unguarded_build.h"
#include "ffi/ops/algorithm.h"
#include "ffi/ops/attention.h"
#include "ffi/ops/measurement/passes.h"
#include "ffi/ops/softmax.h"
#include "ffi/ops/softmax_jacobian.h"
#include "ffi/runtime/dispatch.h"
#include "ffi/runtime/memory.h"
#include "ffi/runtime/workers.h"

namespace nb = nanobind;

namespace jax_softmax2p {
namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict Registrations() {
  nb::dict targets;
  targets["jax_softmax2p_softmax_v1"] = Capsule(jax_softmax2p_softmax_v1);
  targets["jax_softmax2p_log_softmax_v1"] = Capsule(jax_softmax2p_log_softmax_v1);
  targets["jax_softmax2p_log_sum_v1"] = Capsule(jax_softmax2p_log_sum_v1);
  targets["jax_softmax2p_log_softmax_vjp_v1"] = Capsule(jax_softmax2p_log_softmax_vjp_v1);
  targets["jax_softmax2p_log_sum_jvp_v1"] = Capsule(jax_softmax2p_log_sum_jvp_v1);
  targets["jax_softmax2p_log_sum_vjp_v1"] = Capsule(jax_softmax2p_log_sum_vjp_v1);
  targets["jax_softmax2p_attention_v1"] = Capsule(jax_softmax2p_attention_v1);
  targets["jax_softmax2p_attention_vjp_v1"] = Capsule(jax_softmax2p_attention_vjp_v1);
  targets["jax_softmax2p_softmax_jacobian_v1"] = Capsule(jax_softmax2p_softmax_jacobian_v1);
  return targets;
}

template <typename Named, std::size_t count>
std::vector<std::string> NamesOf(const Named (&all)[count]) {
  std::vector<std::string> names;
  for (const Named& known : all) names.emplace_back(known.name);
  return names;
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

// C-contiguous arrays, whose sizes and types the caller has checked; 16-bit elements come as integers.
using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;

// Calls body(E{}) for the element type called `dtype`.
template <typename Body>
void DispatchType(const std::string& dtype, const Body& body) {
  if (dtype == "float32") return body(float{});
  if (dtype == "float64") return body(double{});
  if (dtype == "bfloat16") return body(BFloat16{});
  if (dtype == "float16") return body(Float16{});
  throw nb::value_error(("there are no kernels for dtype " + dtype).c_str());
}

Algorithm RequireAlgorithm(const std::string& name) {
  const std::optional<Algorithm> found = FindAlgorithm(name);
  if (!found) throw nb::value_error(UnknownAlgorithm(name).c_str());
  return *found;
}

// Runs softmax `copies` times, into as many outputs one after the other.
void SoftmaxInto(const Input& x, const Output& out, const std::string& dtype, std::int64_t copies,
                 std::int64_t outer, std::int64_t n, std::int64_t inner, const std::string& algorithm,
                 const std::string& isa, int threads) {
  const Algorithm chosen = RequireAlgorithm(algorithm);
  const Kernels& kernels = Require(FindKernels(isa, "isa"));
  DispatchType(dtype, [&](auto zero) {
    using E = decltype(zero);
    const E* const from = static_cast<const E*>(x.data());
    E* const to = static_cast<E*>(out.data());
    nb::gil_scoped_release release;
    Workers executor(threads);
    for (std::int64_t i = 0; i < copies; ++i) {
      Softmax(kernels, executor, chosen, PlainLogits(from, {outer, n, inner}), to + i * outer * n * inner);
    }
  });
}

// Runs a pass `copies` times. What it finds is told by the last.
std::optional<double> PassInto(const std::string& name, const Input& x, const Output& out,
                               std::int64_t copies, std::int64_t n, float maximum, const std::string& isa,
                               int threads) {
  const std::optional<Pass> pass = FindPass(name);
  if (!pass) throw nb::value_error(("there is no pass called " + name).c_str());
  const Kernels& kernels = Require(FindKernels(isa, "isa"));
  const float* const from = static_cast<const float*>(x.data());
  float* const to = static_cast<float*>(out.data());
  nb::gil_scoped_release release;
  Workers executor(threads);
  std::optional<double> found;
  for (std::int64_t i = 0; i < copies; ++i) {
    found = RunPass(kernels, executor, *pass, from, to + i * n, n, maximum);
  }
  return found;
}

nb::dict PlanOf(const std::string& dtype, std::int64_t outer, std::int64_t n, std::int64_t inner,
                const std::string& algorithm, const std::string& isa) {
  const Algorithm chosen = RequireAlgorithm(algorithm);
  const Kernels& kernels = Require(FindKernels(isa, "isa"));
  nb::dict properties;
  DispatchType(dtype, [&](auto zero) {
    using E = decltype(zero);
    const SoftmaxPlan plan = PlanSoftmax<E>(chosen, {outer, n, inner}, kernels.Of<E>().lanes);
    properties["maximum_first"] = plan.maximum_first;
    properties["reload"] = plan.reload;
    // The key is part of a documented result, so it keeps the name that non-temporal stores had at first.
    properties["stream"] = plan.non_temporal;
  });
  return properties;
}

void JacobianInto(const Input& y, const Input& t, const Output& out, const std::string& dtype,
                  std::int64_t outer, std::int64_t n, std::int64_t inner, const std::string& isa,
                  int threads) {
  const Kernels& kernels = Require(FindKernels(isa, "isa"));
  DispatchType(dtype, [&](auto zero) {
    using E = decltype(zero);
    const E *const from_y = static_cast<const E*>(y.data()), *const from_t = static_cast<const E*>(t.data());
    E* const to = static_cast<E*>(out.data());
    nb::gil_scoped_release release;
    Workers executor(threads);
    SoftmaxJacobian(kernels.Of<E>(), executor, from_y, from_t, to, {outer, n, inner});
  });
}

// The product of matrices by the micro-kernel of attention.
void ProductInto(const Input& a, const Input& b, const Output& out, const std::string& dtype,
                 std::int64_t rows, std::int64_t depth, std::int64_t columns, const std::string& isa) {
  const Kernels& kernels = Require(FindKernels(isa, "isa"));
  DispatchType(dtype, [&](auto zero) {
    using T = ComputeOf<decltype(zero)>;
    const KernelTable<T>& table = kernels.Of<T>();
    nb::gil_scoped_release release;
    const std::unique_ptr<T[]> scratch(new T[table.product_scratch(rows, depth)]);
    table.product(static_cast<const T*>(a.data()), static_cast<const T*>(b.data()), rows, depth, columns,
                  static_cast<T*>(out.data()), scratch.get());
  });
}

// Attention; and where there is a cotangent, the gradients as well.
void AttentionInto(const Input& query, const Input& key, const Input& value,
                   const std::optional<Input>& cotangent, const std::vector<Output>& results,
                   const std::string& dtype, const std::vector<std::int64_t>& sizes, double scale,
                   std::int64_t before, std::int64_t after, double soft_cap,
                   const std::optional<Input>& dropout_mask, const std::optional<Input>& sinks,
                   const std::string& isa, int threads) {
  const Kernels& kernels = Require(FindKernels(isa, "isa"));
  DispatchType(dtype, [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeOf<E>;
    const auto in = [](const Input& x) { return static_cast<const E*>(x.data()); };
    const auto out = [&](std::size_t i) { return static_cast<E*>(results[i].data()); };
    AttentionGradient<E> gradient{};
    gradient.attention = ContiguousAttention<E>(
        {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]}, in(query), in(key), in(value),
        out(0), static_cast<T*>(results[1].data()), static_cast<T>(scale), before, after);
    gradient.attention.first.soft_cap = static_cast<T>(soft_cap);
    if (dropout_mask) {
      const auto* const data = static_cast<const std::uint8_t*>(dropout_mask->data());
      gradient.attention.first.dropout_mask = {data, sizes[2], 0, 1};
    }
    if (sinks) {
      gradient.attention.first.sinks = static_cast<const T*>(sinks->data());
      gradient.attention.sinks = {0, sizes[3] / sizes[4]};
    }
    if (cotangent) {
      gradient.cotangent = in(*cotangent);
      gradient.query_gradient = out(2);
      gradient.key_gradient = out(3);
      gradient.value_gradient = out(4);
    }
    nb::gil_scoped_release release;
    Workers executor(threads);
    Attend(kernels.Of<E>(), executor, gradient.attention);
    if (gradient.cotangent != nullptr) AttendGradient(kernels.Of<E>(), executor, gradient);
  });
}

void DefineMeasurement(nb::module_ module) {
  module.attr("GUARDED") = kGuarded;
  module.def("cache_bytes", [] { return nb::make_tuple(SecondLevelCacheBytes(), LastLevelCacheBytes()); });
  module.def("passes", [] { return NamesOf(kPasses); });
  module.def("pass_into", PassInto, nb::arg("name"), nb::arg("x").noconvert(), nb::arg("out").noconvert(),
             nb::arg("copies"), nb::arg("n"), nb::arg("maximum"), nb::arg("isa"), nb::arg("threads"));
  module.def("product_into", ProductInto, nb::arg("a").noconvert(), nb::arg("b").noconvert(),
             nb::arg("out").noconvert(), nb::arg("dtype"), nb::arg("rows"), nb::arg("depth"),
             nb::arg("columns"), nb::arg("isa"));
  module.def("attention_into", AttentionInto, nb::arg("query").noconvert(), nb::arg("key").noconvert(),
             nb::arg("value").noconvert(), nb::arg("cotangent").noconvert().none(), nb::arg("results"),
             nb::arg("dtype"), nb::arg("sizes"), nb::arg("scale"), nb::arg("before"), nb::arg("after"),
             nb::arg("soft_cap"), nb::arg("dropout_mask").noconvert().none(),
             nb::arg("sinks").noconvert().none(), nb::arg("isa"), nb::arg("threads"));
  module.def("softmax_plan", PlanOf, nb::arg("dtype"), nb::arg("outer"), nb::arg("n"), nb::arg("inner"),
             nb::arg("algorithm"), nb::arg("isa"));
}

NB_MODULE(_native, module) {
  module.def("registrations", Registrations);
  module.def("algorithms", [] { return NamesOf(kAlgorithms); });
  module.def("supported_isas", [] { return Names(SupportedKernels()); });
  module.def("active_isa", [] { return std::string(Require(ActiveKernels()).name); });
  module.attr("FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.def("softmax_into", SoftmaxInto, nb::arg("x").noconvert(), nb::arg("out").noconvert(),
             nb::arg("dtype"), nb::arg("copies"), nb::arg("outer"), nb::arg("n"), nb::arg("inner"),
             nb::arg("algorithm"), nb::arg("isa"), nb::arg("threads"));
  module.def("softmax_jacobian_into", JacobianInto, nb::arg("y").noconvert(), nb::arg("t").noconvert(),
             nb::arg("out").noconvert(), nb::arg("dtype"), nb::arg("outer"), nb::arg("n"), nb::arg("inner"),
             nb::arg("isa"), nb::arg("threads"));
  DefineMeasurement(module.def_submodule("measurement"));
}

}  // namespace
}  // namespace jax_softmax2p
