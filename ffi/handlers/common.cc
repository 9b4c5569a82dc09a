#include "ffi/handlers/common.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace jax_softmax2p {
namespace {

std::string Describe(const xla::ffi::AnyBuffer& buffer) {
  std::string shape;
  for (const std::int64_t size : buffer.dimensions()) {
    if (!shape.empty()) shape += ", ";
    shape += std::to_string(size);
  }
  return "(" + shape + ") of XLA type " + std::to_string(static_cast<int>(buffer.element_type()));
}

// More than any memory holds, and so few that no size computed from it overflows: not even the bytes of three
// arrays of 64-bit elements.
constexpr std::int64_t kMaxElements = std::int64_t{1} << 56;

}  // namespace

std::optional<std::int64_t> ElementCount(const xla::ffi::AnyBuffer& buffer) {
  std::int64_t count = 1;
  bool empty = false;
  for (const std::int64_t size : buffer.dimensions()) {
    if (size < 0 || size > kMaxElements / count) return std::nullopt;
    empty = empty || size == 0;
    count *= std::max<std::int64_t>(1, size);
  }
  return empty ? 0 : count;
}

xla::ffi::ErrorOr<Layout> CommonLayout(const char* handler,
                                       std::initializer_list<xla::ffi::AnyBuffer> buffers,
                                       std::int64_t axis) {
  const xla::ffi::AnyBuffer& first = *buffers.begin();
  const auto dims = first.dimensions();
  if (dims.size() == 0) {
    return xla::ffi::Unexpected(
        xla::ffi::Error::InvalidArgument(std::string(handler) + ": operands must have rank 1 at least"));
  }
  for (const xla::ffi::AnyBuffer& other : buffers) {
    const auto other_dims = other.dimensions();
    if (other.element_type() != first.element_type() ||
        !std::equal(dims.begin(), dims.end(), other_dims.begin(), other_dims.end())) {
      return xla::ffi::Unexpected(
          xla::ffi::Error::InvalidArgument(std::string(handler) + ": operands and result must agree, not " +
                                           Describe(first) + " and " + Describe(other)));
    }
  }
  if (!ElementCount(first)) {
    return xla::ffi::Unexpected(xla::ffi::Error::InvalidArgument(
        std::string(handler) + ": operands must have no negative size, and no more than 2^56 elements, not " +
        Describe(first)));
  }
  const std::int64_t rank = static_cast<std::int64_t>(dims.size());
  if (axis >= 0 || axis < -rank) {
    return xla::ffi::Unexpected(
        xla::ffi::Error::InvalidArgument(std::string(handler) + ": axis must be from " +
                                         std::to_string(-rank) + " to -1, not " + std::to_string(axis)));
  }
  const auto at = dims.begin() + (rank + axis);
  const auto product = [](auto first, auto last) {
    return std::accumulate(first, last, std::int64_t{1}, std::multiplies<>());
  };
  return Layout{product(dims.begin(), at), *at, product(at + 1, dims.end())};
}

}  // namespace jax_softmax2p
