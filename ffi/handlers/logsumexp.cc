#include "ffi/ops/logsumexp.h"

#include <initializer_list>
#include <utility>

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/handlers/read_logits.h"

namespace jax_softmax2p {
namespace {

namespace ffi = xla::ffi;

// A buffer with an element for every row of x, of the type that x is computed in, or of `type`.
struct OnePerRow {
  const char* name;
  ffi::AnyBuffer buffer;
  ffi::DataType type = ffi::DataType::INVALID;
};

ffi::Error Check(const char* handler, const ffi::AnyBuffer& x, const Layout& layout,
                 std::initializer_list<OnePerRow> all) {
  const ffi::DataType compute =
      x.element_type() == ffi::DataType::F64 ? ffi::DataType::F64 : ffi::DataType::F32;
  for (const OnePerRow& one : all) {
    const ffi::DataType type = one.type == ffi::DataType::INVALID ? compute : one.type;
    if (ElementCount(one.buffer) != layout.outer * layout.inner || one.buffer.element_type() != type) {
      return ffi::Error::InvalidArgument(std::string(handler) + ": " + one.name +
                                         " must have one element a row, of the type that goes with x's");
    }
  }
  return ffi::Error::Success();
}

// `labels` has no elements where there are none.
ffi::Error CheckLse(const char* handler, const ffi::AnyBuffer& x, const Layout& layout,
                    const ffi::AnyBuffer& hi, const ffi::AnyBuffer& lo, const ffi::AnyBuffer& labels) {
  const ffi::Error error = Check(handler, x, layout, {{"hi", hi}, {"lo", lo}});
  if (error.failure() || ElementCount(labels) == 0) return error;
  return Check(handler, x, layout, {{"labels", labels, ffi::DataType::S32}});
}

template <typename E>
LabelledLse<E> ReadLse(ffi::AnyBuffer hi, ffi::AnyBuffer lo, ffi::AnyBuffer labels) {
  using T = ComputeOf<E>;
  return {Data<T>(hi), Data<T>(lo), ElementCount(labels) == 0 ? nullptr : Data<std::int32_t>(labels)};
}

ffi::Error HandleLogSumExp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                           ffi::Result<ffi::AnyBuffer> hi, ffi::Result<ffi::AnyBuffer> lo,
                           LogitsAttributes attributes) {
  constexpr const char* kName = "jax_softmax2p_log_sum_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x}, attributes.axis);
  if (layout.has_error()) return layout.error();
  const ffi::Error error = Check(kName, x, *layout, {{"hi", *hi}, {"lo", *lo}});
  if (error.failure()) return error;
  return WithLogits(kName, pool, x, *layout, operands, attributes,
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using T = ComputeOf<decltype(zero)>;
                      LogSumExp(kernels, executor, std::move(logits), Lse<T>{Data<T>(*hi), Data<T>(*lo)});
                    });
}

ffi::Error HandleLogSoftmax(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                            ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> hi,
                            ffi::Result<ffi::AnyBuffer> lo, LogitsAttributes attributes) {
  constexpr const char* kName = "jax_softmax2p_log_softmax_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, attributes.axis);
  if (layout.has_error()) return layout.error();
  const ffi::Error error = Check(kName, x, *layout, {{"hi", *hi}, {"lo", *lo}});
  if (error.failure()) return error;
  return WithLogits(kName, pool, x, *layout, operands, attributes,
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      using T = ComputeOf<E>;
                      LogSoftmax(kernels, executor, std::move(logits), Data<E>(*y),
                                 Lse<T>{Data<T>(*hi), Data<T>(*lo)});
                    });
}

ffi::Error HandleLogSumExpJvp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer hi, ffi::AnyBuffer lo,
                              ffi::AnyBuffer labels, ffi::AnyBuffer t, ffi::RemainingArgs operands,
                              ffi::Result<ffi::AnyBuffer> out, LogitsAttributes attributes) {
  constexpr const char* kName = "jax_softmax2p_log_sum_jvp_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, t}, attributes.axis);
  if (layout.has_error()) return layout.error();
  for (const ffi::Error& error :
       {CheckLse(kName, x, *layout, hi, lo, labels), Check(kName, x, *layout, {{"the result", *out}})}) {
    if (error.failure()) return error;
  }
  return WithLogits(kName, pool, x, *layout, operands, attributes,
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      LogSumExpJvp(kernels, executor, std::move(logits), ReadLse<E>(hi, lo, labels),
                                   Data<const E>(t), Data<ComputeOf<E>>(*out));
                    });
}

ffi::Error HandleLogSumExpVjp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer hi, ffi::AnyBuffer lo,
                              ffi::AnyBuffer labels, ffi::AnyBuffer factor, ffi::RemainingArgs operands,
                              ffi::Result<ffi::AnyBuffer> y, LogitsAttributes attributes) {
  constexpr const char* kName = "jax_softmax2p_log_sum_vjp_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, attributes.axis);
  if (layout.has_error()) return layout.error();
  for (const ffi::Error& error :
       {CheckLse(kName, x, *layout, hi, lo, labels), Check(kName, x, *layout, {{"factor", factor}})}) {
    if (error.failure()) return error;
  }
  return WithLogits(kName, pool, x, *layout, operands, attributes,
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      LogSumExpVjp(kernels, executor, std::move(logits), ReadLse<E>(hi, lo, labels),
                                   Data<const ComputeOf<E>>(factor), Data<E>(*y));
                    });
}

ffi::Error HandleLogSoftmaxVjp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer hi, ffi::AnyBuffer lo,
                               ffi::AnyBuffer labels, ffi::AnyBuffer t, ffi::RemainingArgs operands,
                               ffi::Result<ffi::AnyBuffer> out, LogitsAttributes attributes) {
  constexpr const char* kName = "jax_softmax2p_log_softmax_vjp_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, t, *out}, attributes.axis);
  if (layout.has_error()) return layout.error();
  if (ElementCount(labels) != 0) {
    return ffi::Error::InvalidArgument(std::string(kName) + ": there must be no labels");
  }
  const ffi::Error error = CheckLse(kName, x, *layout, hi, lo, labels);
  if (error.failure()) return error;
  return WithLogits(kName, pool, x, *layout, operands, attributes,
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      LogSoftmaxVjp(kernels, executor, std::move(logits), ReadLse<E>(hi, lo, labels),
                                    Data<const E>(t), Data<E>(*out));
                    });
}

}  // namespace

SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_log_sum_v1, HandleLogSumExp);
SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_log_softmax_v1, HandleLogSoftmax);
SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_log_sum_jvp_v1, HandleLogSumExpJvp);
SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_log_sum_vjp_v1, HandleLogSumExpVjp);
SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_log_softmax_vjp_v1, HandleLogSoftmaxVjp);

}  // namespace jax_softmax2p
