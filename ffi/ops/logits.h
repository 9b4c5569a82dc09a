// What operations take as logits: an array x with the operands that are applied to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "ffi/base/half.h"
#include "ffi/base/layout.h"

namespace jax_softmax2p {

// An operand that broadcasts against x. Element i of a row lies at data[(the row's offset) + i * step], and
// the row's offset is the sum of index[d] * strides[d] over Logits::dims.
template <typename T>
struct BroadcastOperand {
  const T* data = nullptr;
  std::vector<std::int64_t> strides;
  std::int64_t step = 0;
};

// Of row i of a matrix, the elements from i - before to i + after take part.
struct Band {
  static constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();
  std::int64_t before = kUnlimited;
  std::int64_t after = kUnlimited;
};

// scale·x + bias where the masks let it through. x is [rows/inner, n, inner], C-contiguous; operations work
// along n. Rows are counted over `dims`, which are x's sizes without n. Without operands `dims` is not needed
// and may be empty.
template <typename E>
struct Logits {
  const E* x = nullptr;
  std::vector<std::int64_t> dims;
  std::int64_t rows = 0;
  std::int64_t n = 0;
  std::int64_t inner = 1;
  BroadcastOperand<ComputeOf<E>> scale;
  BroadcastOperand<E> bias;
  BroadcastOperand<std::uint8_t> where;
  Band band;

  Layout layout() const { return {rows / inner, n, inner}; }
  bool HasBand() const { return band.before != Band::kUnlimited || band.after != Band::kUnlimited; }
  bool HasMask() const { return where.data != nullptr || HasBand(); }
  // Whether x must be changed before a kernel takes it. Only LogitsRow, LogitsPanel, SmallRows and the choice
  // of an algorithm depend on this; all else is one path.
  bool HasOperands() const { return scale.data != nullptr || bias.data != nullptr || HasMask(); }
};

// Logits without operands.
template <typename E>
Logits<E> PlainLogits(const E* x, const Layout& layout) {
  Logits<E> logits;
  logits.x = x;
  logits.rows = layout.outer * layout.inner;
  logits.n = layout.n;
  logits.inner = layout.inner;
  return logits;
}

// Merges dimensions of x that all operands step through alike: fewer divisions to find a row's operands.
template <typename E>
void MergeDims(Logits<E>& logits) {
  // A band counts rows by the last dimension.
  const std::size_t fixed = logits.HasBand() ? 1 : 0;
  const auto merges = [](const auto& operand, std::size_t d, std::int64_t size) {
    return operand.data == nullptr || operand.strides[d - 1] == operand.strides[d] * size;
  };
  for (std::size_t d = logits.dims.size() - fixed; d-- > 1;) {
    const std::int64_t size = logits.dims[d];
    if (!merges(logits.scale, d, size) || !merges(logits.bias, d, size) || !merges(logits.where, d, size)) {
      continue;
    }
    logits.dims[d - 1] *= size;
    logits.dims.erase(logits.dims.begin() + static_cast<std::ptrdiff_t>(d));
    const auto erase = [d](auto& operand) {
      if (operand.data == nullptr) return;
      operand.strides[d - 1] = operand.strides[d];
      operand.strides.erase(operand.strides.begin() + static_cast<std::ptrdiff_t>(d));
    };
    erase(logits.scale);
    erase(logits.bias);
    erase(logits.where);
  }
}

}  // namespace jax_softmax2p
