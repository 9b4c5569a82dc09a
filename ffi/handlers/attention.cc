#include "ffi/ops/attention.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/runtime/dispatch.h"

namespace jax_softmax2p {

struct AttentionAttributes {
  static constexpr std::int64_t kBias = 1, kMask = 2, kQueryLengths = 4, kKeyLengths = 8, kDropoutMask = 16,
                                kSinks = 32;
  std::int64_t operands;
  std::int64_t before;
  std::int64_t after;
  double soft_cap;
};

namespace {

namespace ffi = xla::ffi;

constexpr const char* kName = "jax_softmax2p_attention_v1";
constexpr const char* kVjpName = "jax_softmax2p_attention_vjp_v1";

constexpr std::int64_t kMaxHead = std::int64_t{1} << 20;

ffi::Error Invalid(const char* what) { return ffi::Error::InvalidArgument(what); }

// The error with the name of the target in front.
ffi::Error Named(const char* name, const ffi::Error& error) {
  return ffi::Error(*error.errc(), std::string(name) + ": " + error.message());
}

bool HasShape(const ffi::AnyBuffer& x, std::initializer_list<std::int64_t> shape) {
  const auto dims = x.dimensions();
  return std::equal(dims.begin(), dims.end(), shape.begin(), shape.end());
}

// Query (B, T, N, H), key (B, S, K, H), value (B, S, K, H'), whose B may be 1, and the results.
ffi::Error ReadSizes(const ffi::AnyBuffer& query, const ffi::AnyBuffer& key, const ffi::AnyBuffer& value,
                     const ffi::AnyBuffer& scale, const ffi::AnyBuffer& output, const ffi::AnyBuffer& lse,
                     AttentionSizes& sizes) {
  const auto q = query.dimensions(), k = key.dimensions(), v = value.dimensions(), o = output.dimensions();
  if (q.size() != 4 || k.size() != 4 || v.size() != 4 || o.size() != 4) return Invalid("arrays have rank 4");
  for (const ffi::AnyBuffer& x : {key, value, output}) {
    if (x.element_type() != query.element_type()) return Invalid("arrays must have one element type");
  }
  for (const ffi::AnyBuffer& x : {query, key, value, output}) {
    if (!ElementCount(x)) return Invalid("arrays must have no negative size, and no more than 2^56 elements");
  }
  sizes = {o[0], o[1], k[1], o[2], k[2], q[3], v[3]};
  if (lse.dimensions().size() == 4 && lse.dimensions()[3] == 2) sizes.lse_parts = 2;
  const auto batched = [&](std::int64_t size) { return size == 1 || size == sizes.batch; };
  if (!batched(q[0]) || !batched(k[0]) || !batched(v[0])) return Invalid("batches must be 1 or the output's");
  if (q[1] != sizes.queries || q[2] != sizes.heads || k[3] != sizes.size || v[1] != sizes.keys ||
      v[2] != sizes.key_heads || o[3] != sizes.value_size) {
    return Invalid("shapes must be (B, T, N, H), (B, S, K, H), (B, S, K, H') and (B, T, N, H')");
  }
  if (sizes.key_heads == 0 || sizes.heads % sizes.key_heads != 0) return Invalid("K must divide N");
  if (sizes.keys == 0 || sizes.size == 0 || sizes.value_size == 0)
    return Invalid("S, H and H' must not be 0");
  // So that no size computed from it overflows, and an int holds it.
  if (sizes.size > kMaxHead || sizes.value_size > kMaxHead) return Invalid("H and H' must be at most 2^20");
  const ffi::DataType compute =
      query.element_type() == ffi::DataType::F64 ? ffi::DataType::F64 : ffi::DataType::F32;
  if (scale.element_type() != compute || ElementCount(scale) != 1) {
    return Invalid("scale must be one element of the type that arrays are computed in");
  }
  if (lse.element_type() != compute ||
      !HasShape(lse, {sizes.batch, sizes.queries, sizes.heads, sizes.lse_parts})) {
    return Invalid(
        "lse must have shape (B, T, N, 1), or (B, T, N, 2) for hi and lo, of the type that arrays are "
        "computed in");
  }
  return ffi::Error::Success();
}

// An operand (B, N, T, S), of which any size may be 1.
template <typename Element>
ffi::Error ReadOperand(const ffi::AnyBuffer& operand, ffi::DataType type, const AttentionSizes& sizes,
                       LogitsOperand<Element>& to, UnitStrides& strides) {
  const auto dims = operand.dimensions();
  const std::int64_t full[] = {sizes.batch, sizes.heads, sizes.queries, sizes.keys};
  if (operand.element_type() != type || dims.size() != 4)
    return Invalid("bias and masks: wrong type or rank");
  std::int64_t at[4], stride = 1;
  for (int d = 3; d >= 0; --d) {
    if (dims[d] != 1 && dims[d] != full[d]) return Invalid("bias and masks must broadcast to (B, N, T, S)");
    at[d] = dims[d] == 1 ? 0 : stride;
    stride *= dims[d];
  }
  to = {static_cast<const Element*>(operand.untyped_data()), at[2], at[1], at[3]};
  strides = {at[0], at[1] * (sizes.heads / sizes.key_heads)};
  return ffi::Error::Success();
}

// The sinks (B, 1, N, 1), whose B may be 1.
template <typename T>
ffi::Error ReadSinks(const ffi::AnyBuffer& sinks, ffi::DataType type, const AttentionSizes& sizes,
                     const T*& to, UnitStrides& strides) {
  if (sinks.element_type() != type ||
      (!HasShape(sinks, {1, 1, sizes.heads, 1}) && !HasShape(sinks, {sizes.batch, 1, sizes.heads, 1}))) {
    return Invalid("sinks must have shape (B, 1, N, 1), of the type that arrays are computed in");
  }
  to = Data<const T>(sinks);
  strides = {sinks.dimensions()[0] == 1 ? 0 : sizes.heads, sizes.heads / sizes.key_heads};
  return ffi::Error::Success();
}

// The operands that the attributes say there are. The gradient takes no sinks: the lse has them already.
template <typename E>
ffi::Error ReadOperands(ffi::RemainingArgs operands, const AttentionAttributes& attributes,
                        const AttentionSizes& sizes, bool takes_sinks, Attention<E>& attention) {
  using A = AttentionAttributes;
  constexpr std::int64_t kAll =
      A::kBias | A::kMask | A::kQueryLengths | A::kKeyLengths | A::kDropoutMask | A::kSinks;
  const std::int64_t allowed = takes_sinks ? kAll : kAll & ~A::kSinks;
  const auto expected = static_cast<std::size_t>(__builtin_popcountll(attributes.operands & kAll));
  if ((attributes.operands & ~allowed) != 0 || operands.size() != expected) {
    return Invalid(
        "attribute operands must add up 1 (bias), 2 (mask), 4 (query lengths), 8 (key lengths), 16 (dropout "
        "mask) and, but for the gradient, 32 (sinks) for those that are given");
  }
  std::size_t next = 0;
  const auto read = [&](std::int64_t flag, const auto& body) -> ffi::Error {
    if ((attributes.operands & flag) == 0) return ffi::Error::Success();
    const auto operand = operands.get<ffi::AnyBuffer>(next++);
    return operand.has_error() ? operand.error() : body(*operand);
  };
  const auto lengths = [&](const std::int32_t*& to) {
    return [&](const ffi::AnyBuffer& x) {
      if (x.element_type() != ffi::DataType::S32 || !HasShape(x, {sizes.batch})) {
        return Invalid("lengths must be int32 of shape (B,)");
      }
      to = Data<const std::int32_t>(x);
      return ffi::Error::Success();
    };
  };
  const ffi::DataType compute =
      sizeof(ComputeOf<E>) == sizeof(double) ? ffi::DataType::F64 : ffi::DataType::F32;
  AttentionArgs<E>& first = attention.first;
  for (const ffi::Error& error :
       {read(A::kBias,
             [&](const ffi::AnyBuffer& x) {
               return ReadOperand(x, compute, sizes, first.bias, attention.bias);
             }),
        read(A::kMask,
             [&](const ffi::AnyBuffer& x) {
               return ReadOperand(x, ffi::DataType::PRED, sizes, first.mask, attention.mask);
             }),
        read(A::kQueryLengths, lengths(attention.query_lengths)),
        read(A::kKeyLengths, lengths(attention.key_lengths)),
        read(A::kDropoutMask,
             [&](const ffi::AnyBuffer& x) {
               return ReadOperand(x, ffi::DataType::PRED, sizes, first.dropout_mask, attention.dropout_mask);
             }),
        read(A::kSinks, [&](const ffi::AnyBuffer& x) {
          return ReadSinks(x, compute, sizes, first.sinks, attention.sinks);
        })}) {
    if (error.failure()) return error;
  }
  using Limits = std::numeric_limits<float>;
  if (attributes.soft_cap != 0 &&
      !(attributes.soft_cap >= Limits::min() && attributes.soft_cap <= Limits::max())) {
    return Invalid("attribute soft_cap must be a positive number that float32 can hold, or 0 for none");
  }
  first.soft_cap = static_cast<ComputeOf<E>>(attributes.soft_cap);
  first.masked = first.masked || first.mask.data != nullptr || attention.key_lengths != nullptr;
  return ffi::Error::Success();
}

// Where the gradient of the bias goes, if that is a result.
template <typename E>
ffi::Error ReadBiasGradient(ffi::RemainingArgs operands, const AttentionAttributes& attributes,
                            const AttentionSizes& sizes, ffi::RemainingRets results,
                            AttentionGradient<E>& gradient) {
  if (results.size() == 0) return ffi::Error::Success();
  if (results.size() > 1 || (attributes.operands & AttentionAttributes::kBias) == 0) {
    return Invalid("a fourth result is the gradient of the bias, and there is no fifth");
  }
  const auto bias = operands.get<ffi::AnyBuffer>(0);
  if (bias.has_error()) return bias.error();
  const auto found = results.get<ffi::AnyBuffer>(0);
  if (found.has_error()) return found.error();
  ffi::Result<ffi::AnyBuffer> result = *found;
  const auto dims = bias->dimensions();
  if (result->element_type() != bias->element_type() ||
      !HasShape(*result, {dims[0], dims[1], dims[2], dims[3]}) || dims[3] != sizes.keys) {
    return Invalid("the gradient of the bias must be like the bias, which must not broadcast over keys");
  }
  gradient.bias_gradient = Data<ComputeOf<E>>(*result);
  gradient.bias_elements = *ElementCount(*bias);
  return ffi::Error::Success();
}

template <typename E>
Attention<E> AttentionOf(const ffi::AnyBuffer& query, const ffi::AnyBuffer& key, const ffi::AnyBuffer& value,
                         const ffi::AnyBuffer& scale, const ffi::AnyBuffer& output, const ffi::AnyBuffer& lse,
                         const AttentionAttributes& attributes, const AttentionSizes& sizes) {
  using T = ComputeOf<E>;
  Attention<E> attention = ContiguousAttention<E>(sizes, Data<const E>(query), Data<const E>(key),
                                                  Data<const E>(value), Data<E>(output), Data<T>(lse),
                                                  *Data<const T>(scale), attributes.before, attributes.after);
  if (query.dimensions()[0] == 1) attention.query.batch = 0;
  if (key.dimensions()[0] == 1) attention.key.batch = 0;
  if (value.dimensions()[0] == 1) attention.value.batch = 0;
  return attention;
}

ffi::Error HandleAttention(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                           ffi::AnyBuffer value, ffi::AnyBuffer scale, ffi::RemainingArgs operands,
                           ffi::Result<ffi::AnyBuffer> output, ffi::Result<ffi::AnyBuffer> lse,
                           AttentionAttributes attributes) {
  AttentionSizes sizes;
  const ffi::Error error = ReadSizes(query, key, value, scale, *output, *lse, sizes);
  if (error.failure()) return Named(kName, error);
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, query.element_type(), [&](auto zero) {
    using E = decltype(zero);
    Attention<E> attention = AttentionOf<E>(query, key, value, scale, *output, *lse, attributes, sizes);
    const ffi::Error refused = ReadOperands<E>(operands, attributes, sizes, true, attention);
    if (refused.failure()) return Named(kName, refused);
    Attend(choice.kernels->Of<E>(), executor, attention);
    return ffi::Error::Success();
  });
}

// Arguments: those of attention before its operands, its results, the cotangent of the output, and then the
// operands. No batch may be 1 beside others. Results: the gradients in query, key and value; then that in the
// bias, if it is wanted, whose keys must not broadcast.
ffi::Error HandleAttentionVjp(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                              ffi::AnyBuffer value, ffi::AnyBuffer scale, ffi::AnyBuffer output,
                              ffi::AnyBuffer lse, ffi::AnyBuffer cotangent, ffi::RemainingArgs operands,
                              ffi::Result<ffi::AnyBuffer> query_gradient,
                              ffi::Result<ffi::AnyBuffer> key_gradient,
                              ffi::Result<ffi::AnyBuffer> value_gradient, ffi::RemainingRets bias_gradient,
                              AttentionAttributes attributes) {
  AttentionSizes sizes;
  const ffi::Error error = ReadSizes(query, key, value, scale, output, lse, sizes);
  if (error.failure()) return Named(kVjpName, error);
  for (const auto& [x, like] : {std::pair{cotangent, output}, std::pair{*query_gradient, query},
                                std::pair{*key_gradient, key}, std::pair{*value_gradient, value}}) {
    const auto dims = like.dimensions();
    if (!HasShape(x, {dims[0], dims[1], dims[2], dims[3]}) || x.element_type() != query.element_type() ||
        dims[0] != sizes.batch) {
      return Named(kVjpName, Invalid("cotangent and gradients must be like their arrays, with one batch"));
    }
  }
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kVjpName, query.element_type(), [&](auto zero) {
    using E = decltype(zero);
    AttentionGradient<E> gradient{AttentionOf<E>(query, key, value, scale, output, lse, attributes, sizes),
                                  Data<const E>(cotangent), Data<E>(*query_gradient), Data<E>(*key_gradient),
                                  Data<E>(*value_gradient)};
    const ffi::Error refused = ReadOperands<E>(operands, attributes, sizes, false, gradient.attention);
    if (refused.failure()) return Named(kVjpName, refused);
    const ffi::Error refused_bias = ReadBiasGradient(operands, attributes, sizes, bias_gradient, gradient);
    if (refused_bias.failure()) return Named(kVjpName, refused_bias);
    AttendGradient(choice.kernels->Of<E>(), executor, gradient);
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace jax_softmax2p

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_softmax2p::AttentionAttributes,
                                      StructMember<std::int64_t>("operands"),
                                      StructMember<std::int64_t>("before"),
                                      StructMember<std::int64_t>("after"), StructMember<double>("soft_cap"));

namespace jax_softmax2p {

SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_attention_v1, HandleAttention);
SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_attention_vjp_v1, HandleAttentionVjp);

}  // namespace jax_softmax2p
