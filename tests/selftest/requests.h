// Valid calls of the FFI handlers, from which tests make invalid ones.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "ffi/handlers/handlers.h"
#include "tests/selftest/fake_xla.h"
#include "tests/selftest/support.h"

namespace jax_softmax2p {

using Dims = std::vector<std::int64_t>;

// ---------------------------------------------------------------------------------------------------------
// The arguments, results and attributes of the handlers.

enum class Kind {
  kX,       // x's type and shape
  kPerRow,  // one element for each row, of the type that x is computed in
  kLabels,  // one int32 for each row
  kNoLabels,
};

struct Signature {
  const char* name;
  XLA_FFI_Handler* handler;
  std::vector<Kind> arguments, results;
  bool takes_operands = true;
  bool takes_algorithm = false;
};

inline const std::vector<Signature>& Signatures() {
  constexpr Kind kX = Kind::kX, kPerRow = Kind::kPerRow, kLabels = Kind::kLabels, kNoLabels = Kind::kNoLabels;
  static const std::vector<Signature> all = {
      {"softmax", jax_softmax2p_softmax_v1, {kX}, {kX}, true, true},
      {"log_softmax", jax_softmax2p_log_softmax_v1, {kX}, {kX, kPerRow, kPerRow}},
      {"lse", jax_softmax2p_log_sum_v1, {kX}, {kPerRow, kPerRow}},
      {"log_sum_jvp", jax_softmax2p_log_sum_jvp_v1, {kX, kPerRow, kPerRow, kLabels, kX}, {kPerRow}},
      {"log_sum_vjp", jax_softmax2p_log_sum_vjp_v1, {kX, kPerRow, kPerRow, kLabels, kPerRow}, {kX}},
      {"log_softmax_vjp", jax_softmax2p_log_softmax_vjp_v1, {kX, kPerRow, kPerRow, kNoLabels, kX}, {kX}},
      {"softmax_jacobian", jax_softmax2p_softmax_jacobian_v1, {kX, kX}, {kX}, false},
  };
  return all;
}

struct ElementType {
  const char* name;
  XLA_FFI_DataType type;
  XLA_FFI_DataType compute;
};

constexpr ElementType kTypes[] = {{"float32", XLA_FFI_DataType_F32, XLA_FFI_DataType_F32},
                                  {"float64", XLA_FFI_DataType_F64, XLA_FFI_DataType_F64},
                                  {"bfloat16", XLA_FFI_DataType_BF16, XLA_FFI_DataType_F32},
                                  {"float16", XLA_FFI_DataType_F16, XLA_FFI_DataType_F32}};

constexpr std::int64_t kScale = 1, kBias = 2, kWhere = 4;

// A valid call.
struct Request {
  const Signature* signature;
  ElementType type;
  Dims dims;
  std::int64_t axis = -1;
  std::int64_t operands = 0;
  std::int64_t before = -1, after = -1;
  std::string algorithm = "auto";

  std::size_t AxisIndex() const { return dims.size() - static_cast<std::size_t>(-axis); }
  Dims WithSizeAlongAxis(std::int64_t size) const {
    Dims changed = dims;
    changed[AxisIndex()] = size;
    return changed;
  }
  Dims PerRow() const {
    Dims rows = dims;
    rows.erase(rows.begin() + static_cast<std::ptrdiff_t>(AxisIndex()));
    return rows;
  }
};

inline std::string Describe(const Dims& dims) {
  std::string text = "(";
  for (const std::int64_t size : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

inline std::string Describe(const Request& request) {
  return std::string(request.signature->name) + " " + request.type.name + " " + Describe(request.dims) +
         " axis " + std::to_string(request.axis) + " operands " + std::to_string(request.operands) +
         " band " + std::to_string(request.before) + ", " + std::to_string(request.after);
}

inline std::size_t SizeOf(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_PRED:
      return 1;
    case XLA_FFI_DataType_BF16:
    case XLA_FFI_DataType_F16:
      return 2;
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_S64:
      return 8;
    default:
      return 4;
  }
}

// The number of elements; 0 where no memory could hold so many.
inline std::size_t Count(const Dims& dims) {
  std::size_t count = 1;
  for (const std::int64_t size : dims) {
    if (size < 0 || size > (1 << 28)) return 0;
    count *= static_cast<std::size_t>(size);
    if (count > (1 << 28)) return 0;
  }
  return count;
}

template <typename E>
std::vector<unsigned char> BytesOf(double (*value)(Random&)) {
  constexpr std::size_t kElements = 1021;  // not a multiple of any vector's
  std::vector<E> elements(kElements);
  Random random(sizeof(E));
  for (E& element : elements) {
    if constexpr (std::is_integral_v<E>) {
      element = static_cast<E>(value(random));
    } else {
      Encode(value(random), element);
    }
  }
  const auto* const bytes = reinterpret_cast<const unsigned char*>(elements.data());
  return {bytes, bytes + kElements * sizeof(E)};
}

// The bytes that are repeated to fill arrays of a type.
inline const std::vector<unsigned char>& ContentsOf(XLA_FFI_DataType type) {
  const auto normal = [](Random& r) { return r.Normal(); };
  static const std::vector<unsigned char> f32 = BytesOf<float>(normal), f64 = BytesOf<double>(normal),
                                          bf16 = BytesOf<BFloat16>(normal), f16 = BytesOf<Float16>(normal);
  static const auto labels = BytesOf<std::int32_t>([](Random& r) { return 9 * r.Uniform(); });
  static const auto mask = BytesOf<std::uint8_t>([](Random& r) { return r.Uniform() < 0.5 ? 1.0 : 0.0; });
  switch (type) {
    case XLA_FFI_DataType_F64:
      return f64;
    case XLA_FFI_DataType_BF16:
      return bf16;
    case XLA_FFI_DataType_F16:
      return f16;
    case XLA_FFI_DataType_S32:
      return labels;
    case XLA_FFI_DataType_PRED:
      return mask;
    default:
      return f32;
  }
}

inline FakeBuffer Input(XLA_FFI_DataType type, const Dims& dims) {
  FakeBuffer buffer(type, dims, Count(dims) * SizeOf(type));
  const std::vector<unsigned char>& contents = ContentsOf(type);
  for (std::size_t at = 0; at < buffer.size; at += contents.size()) {
    std::memcpy(buffer.data + at, contents.data(), std::min(contents.size(), buffer.size - at));
  }
  return buffer;
}

inline FakeBuffer Output(XLA_FFI_DataType type, const Dims& dims) {
  FakeBuffer buffer(type, dims, Count(dims) * SizeOf(type));
  std::memset(buffer.data, 0xa5, buffer.size);
  return buffer;
}

inline FakeCall Make(const Request& request) {
  FakeCall call;
  call.handler = request.signature->handler;
  const auto type_of = [&](Kind kind) {
    return kind == Kind::kX        ? request.type.type
           : kind == Kind::kPerRow ? request.type.compute
                                   : XLA_FFI_DataType_S32;
  };
  const auto dims_of = [&](Kind kind) {
    return kind == Kind::kX ? request.dims : kind == Kind::kNoLabels ? Dims{0} : request.PerRow();
  };
  for (const Kind kind : request.signature->arguments) {
    call.arguments.push_back(Input(type_of(kind), dims_of(kind)));
  }
  for (const Kind kind : request.signature->results) {
    call.results.push_back(Output(type_of(kind), dims_of(kind)));
  }
  call.attributes["axis"] = request.axis;
  if (request.signature->takes_algorithm) call.attributes["algorithm"] = request.algorithm;
  if (!request.signature->takes_operands) return call;
  call.attributes["operands"] = request.operands;
  call.attributes["before"] = request.before;
  call.attributes["after"] = request.after;
  if (request.operands & kScale)
    call.arguments.push_back(Input(request.type.compute, request.WithSizeAlongAxis(1)));
  if (request.operands & kBias) call.arguments.push_back(Input(request.type.type, request.dims));
  if (request.operands & kWhere) {
    Dims broadcast(request.dims.size(), 1);
    broadcast[request.AxisIndex()] = request.dims[request.AxisIndex()];
    call.arguments.push_back(Input(XLA_FFI_DataType_PRED, broadcast));
  }
  return call;
}

// A call of attention, or of its gradient, of two examples with four heads of queries and two of keys,
// causal, with a bias, masks of logits and of dropout, a soft cap, and sinks where they are taken. An lse has
// one part or two.
inline FakeCall MakeAttention(bool gradient, const ElementType& type, std::int64_t queries,
                              std::int64_t keys) {
  constexpr std::int64_t kBatch = 2, kHeads = 4, kKeyHeads = 2, kSize = 24;
  const Dims query = {kBatch, queries, kHeads, kSize}, key = {kBatch, keys, kKeyHeads, kSize};
  const std::int64_t lse_parts = 1 + queries % 2;
  const Dims lse = {kBatch, queries, kHeads, lse_parts}, bias = {1, kHeads, 1, keys};
  FakeCall call;
  call.handler = gradient ? jax_softmax2p_attention_vjp_v1 : jax_softmax2p_attention_v1;
  for (const Dims& dims : {query, key, key}) call.arguments.push_back(Input(type.type, dims));
  call.arguments.push_back(Input(type.compute, {1}));
  if (gradient) {
    call.arguments.push_back(Input(type.type, query));
    call.arguments.push_back(Input(type.compute, lse));
    call.arguments.push_back(Input(type.type, query));
    for (const Dims& dims : {query, key, key}) call.results.push_back(Output(type.type, dims));
    call.results.push_back(Output(type.compute, bias));
  } else {
    call.results.push_back(Output(type.type, query));
    call.results.push_back(Output(type.compute, lse));
  }
  call.arguments.push_back(Input(type.compute, bias));
  call.arguments.push_back(Input(XLA_FFI_DataType_PRED, {kBatch, 1, queries, keys}));
  call.arguments.push_back(Input(XLA_FFI_DataType_PRED, {1, 1, queries, keys}));
  call.attributes["operands"] = std::int64_t{gradient ? 1 | 2 | 16 : 1 | 2 | 16 | 32};
  if (!gradient) call.arguments.push_back(Input(type.compute, {1, 1, kHeads, 1}));
  call.attributes["before"] = std::int64_t{-1};
  call.attributes["after"] = std::int64_t{0};
  call.attributes["soft_cap"] = 5.0;
  return call;
}

}  // namespace jax_softmax2p
