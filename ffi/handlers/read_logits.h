// How the handlers take logits: x, and after it, each where it is given, what is applied to x.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ffi/handlers/common.h"
#include "ffi/ops/logits.h"
#include "xla/ffi/api/ffi.h"

namespace jax_softmax2p {

// The attributes that say along which axis, counted from the end, and what is given. A limit of the band that
// is negative is none.
struct LogitsAttributes {
  static constexpr std::int64_t kScale = 1, kBias = 2, kWhere = 4;
  std::int64_t axis;
  std::int64_t operands;
  std::int64_t before;
  std::int64_t after;

  bool None() const { return operands == 0 && before < 0 && after < 0; }
};

// Whether the operands are those that the attributes tell of.
inline xla::ffi::Error CheckOperands(const char* handler, const xla::ffi::RemainingArgs& operands,
                                     const LogitsAttributes& given) {
  constexpr std::int64_t kAll = LogitsAttributes::kScale | LogitsAttributes::kBias | LogitsAttributes::kWhere;
  const auto told = static_cast<std::size_t>(__builtin_popcountll(given.operands & kAll));
  if ((given.operands & ~kAll) == 0 && operands.size() == told) return xla::ffi::Error::Success();
  return xla::ffi::Error::InvalidArgument(
      std::string(handler) +
      ": attribute operands must add up 1 (scale), 2 (bias) and 4 (where) for those "
      "that are given; it is " +
      std::to_string(given.operands) + ", and " + std::to_string(operands.size()) + " are given");
}

// Of an operand that broadcasts against x: x's rank, and every size 1 or x's.
template <typename T>
xla::ffi::Error ReadOperand(const char* handler, const char* name, const xla::ffi::AnyBuffer& x,
                            const xla::ffi::AnyBuffer& operand, std::int64_t axis, xla::ffi::DataType type,
                            Broadcast<T>& to) {
  const auto dims = x.dimensions(), own = operand.dimensions();
  const auto error = [&](const char* what) {
    return xla::ffi::Error::InvalidArgument(std::string(handler) + ": " + name + " must " + what);
  };
  if (operand.element_type() != type) return error("have the element type that goes with x's");
  if (own.size() != dims.size()) return error("have x's rank");
  std::int64_t stride = 1;
  std::vector<std::int64_t> strides(dims.size());
  for (std::size_t d = dims.size(); d-- > 0;) {
    if (own[d] != 1 && own[d] != dims[d]) return error("broadcast to x");
    strides[d] = own[d] == 1 ? 0 : stride;
    stride *= own[d];
  }
  to.data = static_cast<const T*>(operand.untyped_data());
  const auto at = strides.end() + axis;
  to.step = *at;
  strides.erase(at);
  to.strides = std::move(strides);
  return xla::ffi::Error::Success();
}

// x, whose layout along the axis is `layout`, with its operands.
template <typename E>
xla::ffi::ErrorOr<Logits<E>> ReadLogits(const char* handler, const xla::ffi::AnyBuffer& x,
                                        const Layout& layout, xla::ffi::RemainingArgs operands,
                                        const LogitsAttributes& given) {
  const auto dims = x.dimensions();
  Logits<E> logits;
  logits.x = static_cast<const E*>(x.untyped_data());
  logits.dims.assign(dims.begin(), dims.end());
  logits.dims.erase(logits.dims.end() + given.axis);
  logits.n = layout.n;
  logits.inner = layout.inner;
  logits.rows = layout.outer * layout.inner;
  if (given.before >= 0) logits.band.before = given.before;
  if (given.after >= 0) logits.band.after = given.after;
  if (logits.Banded() && (logits.dims.empty() || given.axis != -1)) {
    return xla::ffi::Unexpected(xla::ffi::Error::InvalidArgument(
        std::string(handler) + ": a band needs rank 2 at least, and axis -1"));
  }
  std::size_t next = 0;
  const auto read = [&](std::int64_t flag, const char* name, xla::ffi::DataType type,
                        auto& to) -> xla::ffi::Error {
    if ((given.operands & flag) == 0) return xla::ffi::Error::Success();
    const auto operand = operands.get<xla::ffi::AnyBuffer>(next++);
    if (operand.has_error()) return operand.error();
    return ReadOperand(handler, name, x, *operand, given.axis, type, to);
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

}  // namespace jax_softmax2p
