#include "ffi/handlers/common.h"

#include <algorithm>

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

}  // namespace

xla::ffi::ErrorOr<RowShape> CommonRowShape(const char* handler,
                                           std::initializer_list<xla::ffi::AnyBuffer> buffers) {
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
  RowShape shape;
  shape.n = dims.back();
  shape.rows = 1;
  for (std::size_t i = 0; i + 1 < dims.size(); ++i) shape.rows *= dims[i];
  return shape;
}

}  // namespace jax_softmax2p
