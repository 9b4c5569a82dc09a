// How the handlers take logits: x, and after it, each where it is given, the operands that are applied to x.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ffi/handlers/common.h"
#include "ffi/ops/logits.h"
#include "ffi/runtime/dispatch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_softmax2p {

// The attributes of all handlers that take logits: the axis, counted from the end; which operands there are,
// as a sum of flags; and a band, of which a negative limit is none.
struct LogitsAttributes {
  static constexpr std::int64_t kScale = 1, kBias = 2, kWhere = 4;
  std::int64_t axis;
  std::int64_t operands;
  std::int64_t before;
  std::int64_t after;
};

// Fails unless there are as many operands as the attributes say.
inline xla::ffi::Error CheckOperands(const char* handler, const xla::ffi::RemainingArgs& operands,
                                     const LogitsAttributes& attributes) {
  constexpr std::int64_t kAll = LogitsAttributes::kScale | LogitsAttributes::kBias | LogitsAttributes::kWhere;
  const auto expected = static_cast<std::size_t>(__builtin_popcountll(attributes.operands & kAll));
  if ((attributes.operands & ~kAll) == 0 && operands.size() == expected) return xla::ffi::Error::Success();
  return xla::ffi::Error::InvalidArgument(
      std::string(handler) +
      ": attribute operands must add up 1 (scale), 2 (bias) and 4 (where) for those "
      "that are given; it is " +
      std::to_string(attributes.operands) + ", and " + std::to_string(operands.size()) + " are given");
}

// Reads an operand that broadcasts against x: of x's rank, with every size 1 or x's, and of that type.
template <typename T>
xla::ffi::Error ReadOperand(const char* handler, const char* name, const xla::ffi::AnyBuffer& x,
                            const xla::ffi::AnyBuffer& operand, std::int64_t axis, xla::ffi::DataType type,
                            BroadcastOperand<T>& to) {
  const auto dims = x.dimensions(), operand_dims = operand.dimensions();
  const auto error = [&](const char* what) {
    return xla::ffi::Error::InvalidArgument(std::string(handler) + ": " + name + " must " + what);
  };
  if (operand.element_type() != type) return error("have the element type that goes with x's");
  if (operand_dims.size() != dims.size()) return error("have x's rank");
  std::int64_t stride = 1;
  std::vector<std::int64_t> strides(dims.size());
  for (std::size_t d = dims.size(); d-- > 0;) {
    if (operand_dims[d] != 1 && operand_dims[d] != dims[d]) return error("broadcast to x");
    strides[d] = operand_dims[d] == 1 ? 0 : stride;
    stride *= operand_dims[d];
  }
  to.data = static_cast<const T*>(operand.untyped_data());
  const auto at = strides.end() + axis;
  to.step = *at;
  strides.erase(at);
  to.strides = std::move(strides);
  return xla::ffi::Error::Success();
}

// x, of that layout along the axis, with its operands. Their number has been checked.
template <typename E>
xla::ffi::ErrorOr<Logits<E>> ReadLogits(const char* handler, const xla::ffi::AnyBuffer& x,
                                        const Layout& layout, xla::ffi::RemainingArgs operands,
                                        const LogitsAttributes& attributes) {
  Logits<E> logits = PlainLogits(static_cast<const E*>(x.untyped_data()), layout);
  if (attributes.before >= 0) logits.band.before = attributes.before;
  if (attributes.after >= 0) logits.band.after = attributes.after;
  // Most calls have no operands, and need no memory then.
  if (attributes.operands == 0 && !logits.HasBand()) return logits;
  const auto dims = x.dimensions();
  logits.dims.assign(dims.begin(), dims.end());
  logits.dims.erase(logits.dims.end() + attributes.axis);
  if (logits.HasBand() && (logits.dims.empty() || attributes.axis != -1)) {
    return xla::ffi::Unexpected(xla::ffi::Error::InvalidArgument(
        std::string(handler) + ": a band needs rank 2 at least, and axis -1"));
  }
  std::size_t next = 0;
  const auto read = [&](std::int64_t flag, const char* name, xla::ffi::DataType type,
                        auto& to) -> xla::ffi::Error {
    if ((attributes.operands & flag) == 0) return xla::ffi::Error::Success();
    const auto operand = operands.get<xla::ffi::AnyBuffer>(next++);
    if (operand.has_error()) return operand.error();
    return ReadOperand(handler, name, x, *operand, attributes.axis, type, to);
  };
  const xla::ffi::DataType compute =
      sizeof(ComputeOf<E>) == sizeof(double) ? xla::ffi::DataType::F64 : xla::ffi::DataType::F32;
  for (const xla::ffi::Error& error :
       {read(LogitsAttributes::kScale, "scale", compute, logits.scale),
        read(LogitsAttributes::kBias, "bias", x.element_type(), logits.bias),
        read(LogitsAttributes::kWhere, "where", xla::ffi::DataType::PRED, logits.where)}) {
    if (error.failure()) return xla::ffi::Unexpected(error);
  }
  if (logits.scale.data != nullptr && logits.scale.step != 0) {
    return xla::ffi::Unexpected(
        xla::ffi::Error::InvalidArgument(std::string(handler) + ": scale must have size 1 along the axis"));
  }
  return logits;
}

// Calls body(E{}, kernels, executor, logits) for the logits of a call.
template <typename Body>
xla::ffi::Error WithLogits(const char* handler, xla::ffi::ThreadPool pool, const xla::ffi::AnyBuffer& x,
                           const Layout& layout, xla::ffi::RemainingArgs operands,
                           const LogitsAttributes& attributes, const Body& body) {
  const xla::ffi::Error error = CheckOperands(handler, operands, attributes);
  if (error.failure()) return error;
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return xla::ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(handler, x.element_type(), [&](auto zero) {
    using E = decltype(zero);
    xla::ffi::ErrorOr<Logits<E>> logits = ReadLogits<E>(handler, x, layout, operands, attributes);
    if (logits.has_error()) return logits.error();
    body(zero, *choice.kernels, executor, *std::move(logits));
    return xla::ffi::Error::Success();
  });
}

}  // namespace jax_softmax2p

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_softmax2p::LogitsAttributes, StructMember<std::int64_t>("axis"),
                                      StructMember<std::int64_t>("operands"),
                                      StructMember<std::int64_t>("before"),
                                      StructMember<std::int64_t>("after"));
