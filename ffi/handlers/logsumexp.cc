#include "ffi/ops/logsumexp.h"

#include <initializer_list>

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/handlers/read_logits.h"
#include "ffi/runtime/dispatch.h"

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

template <typename T>
T* Data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// Calls body(E{}, kernels, executor, logits) for logits that have been checked.
template <typename Body>
ffi::Error WithLogits(const char* handler, ffi::ThreadPool pool, const ffi::AnyBuffer& x,
                      const Layout& layout, ffi::RemainingArgs operands, const LogitsAttributes& given,
                      const Body& body) {
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  const ffi::Error error = CheckOperands(handler, operands, given);
  if (error.failure()) return error;
  XlaExecutor executor(pool);
  return DispatchType(handler, x.element_type(), [&](auto zero) {
    using E = decltype(zero);
    ffi::ErrorOr<Logits<E>> logits = ReadLogits<E>(handler, x, layout, operands, given);
    if (logits.has_error()) return logits.error();
    body(zero, *choice.kernels, executor, *std::move(logits));
    return ffi::Error::Success();
  });
}

ffi::Error HandleLogSumExp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                           ffi::Result<ffi::AnyBuffer> hi, ffi::Result<ffi::AnyBuffer> lo, std::int64_t axis,
                           std::int64_t given, std::int64_t before, std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_log_sum_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x}, axis);
  if (layout.has_error()) return layout.error();
  const ffi::Error error = Check(kName, x, *layout, {{"hi", *hi}, {"lo", *lo}});
  if (error.failure()) return error;
  return WithLogits(kName, pool, x, *layout, operands, {axis, given, before, after},
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using T = ComputeOf<decltype(zero)>;
                      LogSumExp(kernels, executor, std::move(logits), Data<T>(*hi), Data<T>(*lo));
                    });
}

ffi::Error HandleLogSoftmax(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                            ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> hi,
                            ffi::Result<ffi::AnyBuffer> lo, std::int64_t axis, std::int64_t given,
                            std::int64_t before, std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_log_softmax_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, axis);
  if (layout.has_error()) return layout.error();
  const ffi::Error error = Check(kName, x, *layout, {{"hi", *hi}, {"lo", *lo}});
  if (error.failure()) return error;
  return WithLogits(kName, pool, x, *layout, operands, {axis, given, before, after},
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      using T = ComputeOf<E>;
                      LogSoftmax(kernels, executor, std::move(logits), Data<E>(*y), Data<T>(*hi),
                                 Data<T>(*lo));
                    });
}

// `labels` has no elements where there are none.
template <typename E>
LabelledLse<E> ReadLse(ffi::AnyBuffer hi, ffi::AnyBuffer lo, ffi::AnyBuffer labels) {
  using T = ComputeOf<E>;
  return {Data<T>(hi), Data<T>(lo), ElementCount(labels) == 0 ? nullptr : Data<std::int32_t>(labels)};
}

ffi::Error CheckLse(const char* handler, const ffi::AnyBuffer& x, const Layout& layout,
                    const ffi::AnyBuffer& hi, const ffi::AnyBuffer& lo, const ffi::AnyBuffer& labels) {
  const ffi::Error error = Check(handler, x, layout, {{"hi", hi}, {"lo", lo}});
  if (error.failure() || ElementCount(labels) == 0) return error;
  return Check(handler, x, layout, {{"labels", labels, ffi::DataType::S32}});
}

ffi::Error HandleLogSumExpJvp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer hi, ffi::AnyBuffer lo,
                              ffi::AnyBuffer labels, ffi::AnyBuffer t, ffi::RemainingArgs operands,
                              ffi::Result<ffi::AnyBuffer> out, std::int64_t axis, std::int64_t given,
                              std::int64_t before, std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_log_sum_jvp_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, t}, axis);
  if (layout.has_error()) return layout.error();
  for (const ffi::Error& error :
       {CheckLse(kName, x, *layout, hi, lo, labels), Check(kName, x, *layout, {{"the result", *out}})}) {
    if (error.failure()) return error;
  }
  return WithLogits(kName, pool, x, *layout, operands, {axis, given, before, after},
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      LogSumExpJvp(kernels, executor, std::move(logits), ReadLse<E>(hi, lo, labels),
                                   Data<const E>(t), Data<ComputeOf<E>>(*out));
                    });
}

ffi::Error HandleLogSumExpVjp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer hi, ffi::AnyBuffer lo,
                              ffi::AnyBuffer labels, ffi::AnyBuffer factor, ffi::RemainingArgs operands,
                              ffi::Result<ffi::AnyBuffer> y, std::int64_t axis, std::int64_t given,
                              std::int64_t before, std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_log_sum_vjp_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, axis);
  if (layout.has_error()) return layout.error();
  for (const ffi::Error& error :
       {CheckLse(kName, x, *layout, hi, lo, labels), Check(kName, x, *layout, {{"factor", factor}})}) {
    if (error.failure()) return error;
  }
  return WithLogits(kName, pool, x, *layout, operands, {axis, given, before, after},
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      LogSumExpVjp(kernels, executor, std::move(logits), ReadLse<E>(hi, lo, labels),
                                   Data<const ComputeOf<E>>(factor), Data<E>(*y));
                    });
}

ffi::Error HandleLogSoftmaxVjp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer hi, ffi::AnyBuffer lo,
                               ffi::AnyBuffer labels, ffi::AnyBuffer t, ffi::RemainingArgs operands,
                               ffi::Result<ffi::AnyBuffer> out, std::int64_t axis, std::int64_t given,
                               std::int64_t before, std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_log_softmax_vjp_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, t, *out}, axis);
  if (layout.has_error()) return layout.error();
  if (ElementCount(labels) != 0) {
    return ffi::Error::InvalidArgument(std::string(kName) + ": there must be no labels");
  }
  const ffi::Error error = CheckLse(kName, x, *layout, hi, lo, labels);
  if (error.failure()) return error;
  return WithLogits(kName, pool, x, *layout, operands, {axis, given, before, after},
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      LogSoftmaxVjp(kernels, executor, std::move(logits), ReadLse<E>(hi, lo, labels),
                                    Data<const E>(t), Data<E>(*out));
                    });
}

}  // namespace

#define SOFTMAX2P_ATTRIBUTES          \
  .Attr<std::int64_t>("axis")         \
      .Attr<std::int64_t>("operands") \
      .Attr<std::int64_t>("before")   \
      .Attr<std::int64_t>("after")

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_log_sum_v1, NoThrow<HandleLogSumExp>{},
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>() SOFTMAX2P_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_log_softmax_v1, NoThrow<HandleLogSoftmax>{},
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>() SOFTMAX2P_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_log_sum_jvp_v1, NoThrow<HandleLogSumExpJvp>{},
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>() SOFTMAX2P_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_log_sum_vjp_v1, NoThrow<HandleLogSumExpVjp>{},
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>() SOFTMAX2P_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_log_softmax_vjp_v1, NoThrow<HandleLogSoftmaxVjp>{},
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>() SOFTMAX2P_ATTRIBUTES);

}  // namespace jax_softmax2p
