#include "ffi/ops/softmax.h"

#include <optional>
#include <string_view>
#include <utility>

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/handlers/read_logits.h"
#include "ffi/ops/algorithm.h"

namespace jax_softmax2p {

struct SoftmaxAttributes {
  LogitsAttributes logits;
  std::string_view algorithm;

  // As the attributes are decoded.
  SoftmaxAttributes(std::int64_t axis, std::int64_t operands, std::int64_t before, std::int64_t after,
                    std::string_view algorithm)
      : logits{axis, operands, before, after}, algorithm(algorithm) {}
};

namespace {

namespace ffi = xla::ffi;

ffi::Error HandleSoftmax(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                         ffi::Result<ffi::AnyBuffer> y, SoftmaxAttributes attributes) {
  constexpr const char* kName = "jax_softmax2p_softmax_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, attributes.logits.axis);
  if (layout.has_error()) return layout.error();
  const std::optional<Algorithm> algorithm = FindAlgorithm(attributes.algorithm);
  if (!algorithm) {
    return ffi::Error::InvalidArgument(std::string(kName) + ": " + UnknownAlgorithm(attributes.algorithm));
  }
  return WithLogits(kName, pool, x, *layout, operands, attributes.logits,
                    [&](auto zero, const Kernels& kernels, Executor& executor, auto logits) {
                      using E = decltype(zero);
                      Softmax(kernels, executor, *algorithm, std::move(logits), Data<E>(*y));
                    });
}

}  // namespace
}  // namespace jax_softmax2p

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_softmax2p::SoftmaxAttributes, StructMember<std::int64_t>("axis"),
                                      StructMember<std::int64_t>("operands"),
                                      StructMember<std::int64_t>("before"),
                                      StructMember<std::int64_t>("after"),
                                      StructMember<std::string_view>("algorithm"));

namespace jax_softmax2p {

SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_softmax_v1, HandleSoftmax);

}  // namespace jax_softmax2p
