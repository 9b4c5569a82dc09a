// What an instruction set provides: the kernels of which ops/ makes whole arrays, as pointers.
//
// A kernel is added here, in targets/make_kernels.h, and where ops/ calls it; every instruction set then has
// it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "ffi/base/error_free.h"
#include "ffi/base/half.h"
#include "ffi/base/inline.h"
#include "ffi/kernels/attention_args.h"
#include "ffi/kernels/extended_sum.h"

namespace jax_softmax2p {

// Kernels multiply exponentials by factors up to the second number without an overflow on the way: there
// products may be larger by the first, for kFactor, kUnit, and what splits them in TwoProd.
template <typename T>
inline constexpr T kFactorHeadroom = std::uint64_t{1} << 40;
template <typename T>
inline constexpr T kLargestFactor = std::numeric_limits<T>::max() / kFactorHeadroom<T>;

// The largest matrices, in elements, for KernelTable::small_matrices. Rows of 96 take 0.30 ns an element in
// it and 0.55 by themselves, rows of 128 0.29 and 0.44 (Zen 5, float32, AVX-512; AVX2: 0.46 and 0.65, 0.62
// and 0.59).
inline constexpr int kMaxSmall = 128;
// The most columns that a Panel has.
inline constexpr int kPanelWidth = 256;
// Rows that kernels take at a time where the bits of a column are to depend on n alone. With the widest panel
// they have 16 KiB of float32, half of a first-level cache.
inline constexpr std::int64_t kPanelBlock = 16;
// The most rows that a Panel has. More would cost a sum its accuracy: see LaneAccumulator.
inline constexpr std::int64_t kMaxPanelRows = 2048;

// What is known of a row's maximum before its sum.
template <typename T>
struct KnownMaximum {
  enum Use {
    kUnknown,    // every block finds its own
    kReference,  // it gives the exponent
    kSubtract,   // it is subtracted from every element
  };
  Use use = kUnknown;
  T value = 0;
};

// Elements of a row that share an exponent: many against the cost of closing a block, some 20 ns, and few
// against the first-level cache. Rows are cut at multiples of it.
template <typename T>
inline constexpr std::int64_t kRowBlock = 8192 / sizeof(T);

// What pass 1 keeps of a row for pass 2: an element for each of x's, and a reference for each kRowBlock of
// them; what the elements are depends on the instruction set.
template <typename T>
struct KeptRow {
  T* values = nullptr;
  T* references = nullptr;

  // What is kept of the elements from `at` on, a multiple of kRowBlock.
  SOFTMAX2P_INLINE KeptRow operator+(std::int64_t at) const {
    if (values == nullptr) return {};
    return {values + at, references + at / kRowBlock<T>};
  }
};

// How pass 2 makes results of a row: y = (hi + lo)·2^-exponent·e^x. Where `subtract_shift`, x is read as
// (x - shift_hi) - shift_lo. The shift is the row's maximum, or its lse as hi and lo.
template <typename T>
struct RowScale {
  T hi;
  T lo;
  int exponent;
  bool subtract_shift;
  T shift_hi;
  T shift_lo;
  // One element carries the whole sum, other than what rounding takes off: its result is 1, whatever the
  // rounding of its value.
  bool dominated = false;
};

// The scale of a row whose sum of e^x, or of e^(x - shift) where that is subtracted, this is: 1/sum as a T,
// and what that T leaves out. Written in place: a copy would have to wait until all of it is stored.
template <typename T>
SOFTMAX2P_INLINE void ScaleFromSum(const ExtendedSum& sum, bool subtract_shift, T shift, RowScale<T>& scale) {
  const double inverse = 1 / sum.mantissa.hi;
  double error = 0;
  // A double's own digits do for floats.
  if constexpr (sizeof(T) == sizeof(double)) {
    error = (std::fma(-inverse, sum.mantissa.hi, 1.0) - inverse * sum.mantissa.lo) * inverse;
  }
  const DoubleDouble<T> rounded = ToDoubleDouble<T>(inverse, error);
  scale.hi = rounded.hi;
  scale.lo = rounded.lo;
  scale.exponent = sum.exponent;
  scale.subtract_shift = subtract_shift;
  scale.shift_hi = shift;
  scale.shift_lo = 0;
  scale.dominated = false;
}

// `width` columns of `rows` elements each, element i of column c at x[c + i * stride], and one element more
// in the first `tail` columns. Kernels take `block` rows at a time, which share an exponent.
struct Panel {
  std::int64_t rows;
  std::int64_t stride;
  int width;
  int tail;
  std::int64_t block;
};

// Which rows of a sum a panel has. Unless it has the last of them, the sum is a state for the kernel to
// continue from; the bits are those of one panel, if all stretches but the last have whole blocks.
struct PanelStretch {
  bool first;
  bool last;
};

// For every column of a panel a sum, or the inverse of one: (hi + lo)·2^exponent.
template <typename T>
struct PanelSums {
  T* hi;
  T* lo;
  T* exponent;
};

// For every column of a panel a dot product, hi + lo, in twice the working precision.
template <typename T>
struct PanelDots {
  T* hi;
  T* lo;
};

// A stretch of a row, and what is applied to it: scale·x + bias where the mask is not 0, otherwise `fill`.
// `bias` and `where` have an element for each of x's. Where `bias` is null, `shift` is the bias; where
// `where` is null, nothing is masked.
template <typename E>
struct ScaleBiasMaskArgs {
  const E* x;
  const E* bias;
  const std::uint8_t* where;
  ComputeOf<E> scale;
  ComputeOf<E> shift;
  ComputeOf<E> fill;
};

// An operand of a panel's logits: element (i, c) at data[i * stride + c * step], where step is 0 or 1.
template <typename Element>
struct PanelOperand {
  const Element* data;
  std::int64_t stride;
  int step;
};

// The columns of a panel, and what is applied to them: scale·x + bias where the mask is not 0, otherwise
// -inf. Every column has a scale; the bias and the mask may be null.
template <typename E>
struct PanelLogits {
  const E* x;
  std::int64_t stride;
  const ComputeOf<E>* scale;
  PanelOperand<E> bias;
  PanelOperand<std::uint8_t> where;
};

// The sum of e^x of a row, and its largest element, NaNs passed over. A monoid under Combine.
template <typename T>
struct RowSum {
  ExtendedSum sum;
  T maximum = static_cast<T>(-__builtin_huge_val());

  SOFTMAX2P_INLINE void Combine(const RowSum& other) {
    sum.Combine(other.sum);
    if (other.maximum > maximum) maximum = other.maximum;
  }
  SOFTMAX2P_INLINE int Exponent() const { return sum.exponent; }
  SOFTMAX2P_INLINE void SetNan() { sum.mantissa.hi = __builtin_nan(""); }
};

// The sum of e^x of a row in two parts: its largest element's, largest·2^exponent, and the others'. So the
// others keep their digits however few they are. NaNs are passed over for the maximum. A monoid under
// Combine.
template <typename T>
struct SplitSum {
  double largest = 0;
  int exponent = ExtendedSum::kLowestExponent;
  T maximum = static_cast<T>(-__builtin_huge_val());
  ExtendedSum others;

  SOFTMAX2P_INLINE void Combine(SplitSum other) {
    if (other.maximum > maximum) std::swap(*this, other);
    others.Combine(other.others);
    others.Combine({{other.largest, 0}, other.exponent});
  }
  SOFTMAX2P_INLINE int Exponent() const { return exponent; }
  SOFTMAX2P_INLINE void SetNan() { others.mantissa.hi = __builtin_nan(""); }
};

// The logsumexp of a row, as maximum + log + rest. The log is NaN where the row has no softmax.
template <typename T>
struct LseTerms {
  T maximum;
  T log;
  T rest;
};

// Kernels for arrays of E, computed in T.
//
// Arguments that many share: x are logits, y the results of the same shape, which may be x; n is the number
// of elements of a row; `non_temporal` stores past the caches, after which the caller fences. Kernels called
// logits_* take as z what apply_scale_bias_mask wrote, of type T; the others of that kind are in
// Kernels::Of<T>().
//
// Errors, tested by tests/selftest: a result of pass 2 is within 2 ULP of the exact one for float, 4 for
// double, and 16-bit results are that of float, rounded once.
template <typename E>
struct KernelTable {
  using T = ComputeOf<E>;

  // Sums of e^x, and the powers of `exponentials`, are this many times as large: see kFactor in exp.h.
  double factor;
  // Sums with an exponent beyond this, either way, are not to be trusted: see Reduction in exp.h.
  int max_exponent;
  // Elements of a vector.
  int lanes;

  // ---- Exponentials x[n], with the bits that they have in a row's sum: factor·e^x = (1 +
  // expm1)·pow2·2^exponent.
  void (*exponentials)(const T* x, std::int64_t n, int exponent, T* expm1, T* pow2);

  // ---- Contiguous rows, x[n].

  // The largest element. NaNs are passed over; no elements give -inf.
  T (*row_max)(const E* x, std::int64_t n);
  // Pass 1: the sum of e^x, for float to 2^-26 of itself (see LaneAccumulator), and the maximum. Where `kept`
  // has arrays, they are filled for row_write; its values may be y. It is ignored where the maximum is
  // subtracted.
  RowSum<T> (*row_sum)(const E* x, const KeptRow<T>& kept, std::int64_t n, const KnownMaximum<T>& maximum);
  // The same sum in parts, each to 2^-26 of itself.
  SplitSum<T> (*row_split_sum)(const E* x, std::int64_t n, const KnownMaximum<T>& maximum);
  // Pass 2: y[n] as RowScale says. Where `kept` has arrays, it takes e^x from there.
  void (*row_write)(const E* x, const KeptRow<T>& kept, E* y, std::int64_t n, const RowScale<T>& scale,
                    bool non_temporal);
  // y = (x - lse.maximum) - lse.log, with the rounding of both differences.
  void (*row_write_log)(const E* x, E* y, std::int64_t n, const LseTerms<T>& lse, bool non_temporal);

  // y = softmax(x) of `rows` rows of n <= kRowBlock elements, the bits of row_sum and row_write, with the
  // guard's third pass where a row needs it.
  void (*block_rows)(const E* x, E* y, std::int64_t rows, std::int64_t n, bool non_temporal);

  // ---- Rows with a scale, a bias or a mask.

  // z[n] = scale·x + bias, or `fill` where masked; rounded once where the vector type's Fma is. Returns the
  // largest, NaNs passed over.
  T (*apply_scale_bias_mask)(const ScaleBiasMaskArgs<E>& args, T* z, std::int64_t n);
  void (*logits_row_write)(const T* z, const KeptRow<T>& kept, E* y, std::int64_t n, const RowScale<T>& scale,
                           bool non_temporal);
  void (*logits_row_write_log)(const T* z, E* y, std::int64_t n, const LseTerms<T>& lse, bool non_temporal);

  // ---- Panels, of up to kPanelWidth columns and kMaxPanelRows rows. `maximum` and `subtract` are null, or
  // have an element for each column: the reference of its exponents, and what is subtracted from it.

  // z = scale·x + bias, masked, as apply_scale_bias_mask rounds it; element (i, c) at z[c + i * z_stride].
  void (*panel_apply)(const PanelLogits<E>& logits, std::int64_t rows, int width, T* z,
                      std::int64_t z_stride);
  // maximum[width]: the largest element of every column, NaNs passed over; with `resume`, or what is there.
  void (*panel_max)(const E* x, const Panel& panel, bool resume, T* maximum);
  // Pass 1: the sum of e^x of every column. Where `kept` is not null, mantissas are written to it for
  // panel_write, laid out as x; it may be y, and is ignored where the maximum is subtracted. Where `maximum`
  // is null, `largest` is null, too, or becomes what panel_max finds.
  void (*panel_sum)(const E* x, T* kept, const Panel& panel, PanelStretch stretch, const T* maximum,
                    const T* subtract, const PanelSums<T>& sums, T* largest);
  // Adds the sums `from` to the sums `into`, for `width` columns.
  void (*panel_merge)(const PanelSums<T>& into, const PanelSums<T>& from, int width);
  // Replaces the sums by the scales that panel_write takes, for `width` columns. The exponents stay.
  void (*panel_invert)(const PanelSums<T>& sums, int width);
  // The lse of `width` columns of n elements as hi + lo, hi its rounding, and `log`, as lse = maximum + log,
  // all [width]. `sums` are those of panel_sum with `subtract`, `maximum` those of x. The errors are those of
  // small_lse; hi, lo and log are NaN where the sum is no number, or the column nearly certain
  // (NearCertainty).
  void (*panel_lse)(const PanelSums<T>& sums, const T* maximum, const T* subtract, std::int64_t n, int width,
                    T* hi, T* lo, T* log);
  // The same from sums without the largest elements and without `subtract`, however near to certainty.
  void (*panel_lse_of_others)(const PanelSums<T>& sums, const T* maximum, int width, T* hi, T* lo, T* log);
  // Scales for panel_write, with which it writes factor·e^(x - hi - lo). Their hi is NaN where the lse is not
  // finite or beyond the exact range, or the factor beyond kLargestFactor: there is no scale.
  void (*panel_scales)(const T* hi, const T* lo, const T* factor, int width, const PanelSums<T>& scales);
  // Pass 2: y = (hi + lo)·2^-exponent·e^x, with the column's scale.
  void (*panel_write)(const E* x, const T* kept, E* y, const Panel& panel, const PanelSums<T>& scales,
                      const T* subtract);
  // The kernels below read columns of z, what panel_apply wrote, or x itself where that is a T; the panel is
  // z's. The arrays beside it have a stride of their own.
  void (*logits_panel_write)(const T* z, E* y, const Panel& panel, std::int64_t y_stride,
                             const PanelSums<T>& scales, const T* subtract);
  // As small_minus_lse, with one hi, lo and factor for each column.
  void (*panel_minus_lse)(const T* z, E* y, const Panel& panel, std::int64_t y_stride, const T* hi,
                          const T* lo, const T* factor);
  // <e^(z - hi - lo), t> of every column, the exponential as in panel_minus_lse. Infinite and NaN terms make
  // the hi of a sum infinite or NaN, and its lo 0. With `resume`, it is added to what is there.
  void (*panel_dot_minus_lse)(const T* z, const E* t, const Panel& panel, std::int64_t t_stride, bool resume,
                              const T* hi, const T* lo, const PanelDots<T>& dots);
  // out = t - e^(z - hi - lo)·sum, with one hi, lo and sum of all t for each column. Where the exponential is
  // near 1, nothing cancels. out may be t.
  void (*panel_subtract_minus_lse)(const T* z, const E* t, E* out, const Panel& panel, std::int64_t t_stride,
                                   const T* hi, const T* lo, const PanelDots<T>& sums);
  // <y, t> and <1, t> alike.
  void (*panel_dot)(const E* y, const E* t, const Panel& panel, bool resume, const PanelDots<T>& dots);
  void (*panel_sum_terms)(const E* t, const Panel& panel, bool resume, const PanelDots<T>& dots);
  // Adds the dot products `from` to those `into`, for `width` columns.
  void (*panel_add_dots)(const PanelDots<T>& into, const PanelDots<T>& from, int width);
  // As jacobian_write, with one dot product for each column. out may be y or t.
  void (*panel_jacobian_write)(const E* y, const E* t, E* out, const Panel& panel, const PanelDots<T>& dots);

  // ---- Small arrays, with the guard's third pass where a row needs it.

  // y = softmax(x) along n of x[outer, n, inner], n·inner <= kMaxSmall.
  void (*small_matrices)(const E* x, E* y, std::int64_t outer, int n, int inner, bool non_temporal);
  void (*logits_small_matrices)(const T* z, E* y, std::int64_t outer, int n, int inner, bool non_temporal);
  // y = softmax(x) of `width` columns of n <= kMaxSmall elements; element i of column c is x[c + i * stride].
  void (*small_columns)(const E* x, E* y, std::int64_t stride, int n, int width);
  // Of such columns what small_lse gives, and what small_minus_lse gives with a factor and labels.
  void (*small_columns_lse)(const E* x, std::int64_t stride, int n, int width, T* maximum, T* log, T* rest);
  void (*small_columns_minus_lse)(const E* x, E* y, std::int64_t stride, int n, int width, const T* hi,
                                  const T* lo, const T* factor, const std::int32_t* labels);
  // Of x[rows, n], n <= kMaxSmall, the lse of every row as LseTerms. The log is also NaN where the row needs
  // the guard's third pass, which is then the caller's to do. The tests hold the lse to 2^-23 for T float and
  // to 2^-49 for double, absolutely, and the log near 0 to 4 ULP of itself.
  void (*small_lse)(const E* x, std::int64_t rows, int n, T* maximum, T* log, T* rest);
  // y = factor·(e^((x - hi) - lo) - [the label's place]) of x[rows, n], n <= kMaxSmall, without the rounding
  // of the differences, with one hi, lo, factor and label for each row. The label's element, too, is within 2
  // ULP of its own size. A label is the number of an element, or below 0 for none; `labels` may be null.
  // Where `factor` is null, y = (x - hi) - lo, with their rounding.
  void (*small_minus_lse)(const E* x, E* y, std::int64_t rows, int n, const T* hi, const T* lo,
                          const T* factor, const std::int32_t* labels);
  void (*logits_small_minus_lse)(const T* z, E* y, std::int64_t rows, int n, const T* hi, const T* lo,
                                 const T* factor, const std::int32_t* labels);
  // Of `count` labels alone, from their logits: y = factor·(e^((z - hi) - lo) - 1), as small_minus_lse.
  void (*labels_minus_lse)(const T* z, E* y, int count, const T* hi, const T* lo, const T* factor);
  // out = t - e^((x - hi) - lo)·<1, t> of rows likewise. Where the exponential is near 1, nothing cancels.
  // out may be t.
  void (*small_subtract_minus_lse)(const E* x, const E* t, E* out, std::int64_t rows, int n, const T* hi,
                                   const T* lo);
  void (*logits_small_subtract_minus_lse)(const T* z, const E* t, E* out, std::int64_t rows, int n,
                                          const T* hi, const T* lo);

  // The Jacobian of softmax, out = y·(t - <y, t>), of rows [rows, n], n <= kMaxSmall. out may be y or t. From
  // long_row elements on, a row has the bits of `dot` and `jacobian_write`.
  int long_row;
  void (*small_jacobian_write)(const E* y, const E* t, E* out, std::int64_t rows, int n);

  // ---- Derivatives, over contiguous rows. Sums and dot products have twice the working precision.

  // <y, t>, and <1, t>.
  CompensatedSum (*dot)(const E* y, const E* t, std::int64_t n);
  CompensatedSum (*logits_dot)(const T* y, const E* t, std::int64_t n);
  CompensatedSum (*sum)(const E* t, std::int64_t n);
  // out = t - factor·p, rounded as the vector type's Fnma. out may be t.
  void (*subtract)(const E* t, const T* p, T factor, E* out, std::int64_t n);
  // The Jacobian of softmax: out = y·((t - dot.hi) - dot.lo). out may be y or t.
  void (*jacobian_write)(const E* y, const E* t, E* out, std::int64_t n, const DoubleDouble<T>& dot,
                         bool non_temporal);

  // ---- Attention of one head of keys, as AttentionArgs says.

  // Rows that are computed side by side.
  int attention_columns;
  // The elements of scratch memory that `rows` rows take.
  std::int64_t (*attention_scratch)(const AttentionArgs<E>& args, std::int64_t rows);
  // Output and lse of the rows from `begin` to `end`.
  void (*attention)(const AttentionArgs<E>& args, std::int64_t begin, std::int64_t end, T* scratch);
  // The same for few rows, up to attention_few_rows, in chunks of the keys, and for adjacent heads of keys of
  // one example, whose keys and values lie side by side. attention_few leaves the result of head k and of the
  // keys from `begin`, a multiple of 64, to `end` at partials[k * stride], attention_few_size elements a row;
  // it takes attention_few_scratch elements a head. attention_few_combine takes the results of `count` chunks
  // of a head, one after the other, and writes output and lse.
  std::int64_t attention_few_rows;
  std::int64_t (*attention_few_size)(const AttentionArgs<E>& args);
  std::int64_t (*attention_few_scratch)(const AttentionArgs<E>& args);
  void (*attention_few)(const AttentionArgs<E>* heads, std::int64_t count, std::int64_t begin,
                        std::int64_t end, T* partials, std::int64_t stride, T* scratch);
  void (*attention_few_combine)(const AttentionArgs<E>& args, T* partials, std::int64_t count);
  // The gradient for the keys from `begin` to `end`, `begin` a multiple of 64, as AttentionGradientArgs says.
  // That of the queries, a sum over all keys, is written to `partial`, [rows][size], where that is not null.
  std::int64_t (*attention_gradient_scratch)(const AttentionGradientArgs<E>& args, std::int64_t keys);
  void (*attention_gradient)(const AttentionGradientArgs<E>& args, std::int64_t begin, std::int64_t end,
                             T* partial, T* scratch);
  // out[rows][columns] = a[rows][depth]·b[depth][columns] by the micro-kernel of attention.
  std::int64_t (*product_scratch)(std::int64_t rows, std::int64_t depth);
  void (*product)(const T* a, const T* b, std::int64_t rows, std::int64_t depth, std::int64_t columns, T* out,
                  T* scratch);
};

// The kernels of one instruction set, for every element type.
struct Kernels {
  const char* name;
  KernelTable<float> f32;
  KernelTable<double> f64;
  KernelTable<BFloat16> bf16;
  KernelTable<Float16> f16;

  template <typename E>
  const KernelTable<E>& Of() const;
};

template <>
inline const KernelTable<float>& Kernels::Of<float>() const {
  return f32;
}
template <>
inline const KernelTable<double>& Kernels::Of<double>() const {
  return f64;
}
template <>
inline const KernelTable<BFloat16>& Kernels::Of<BFloat16>() const {
  return bf16;
}
template <>
inline const KernelTable<Float16>& Kernels::Of<Float16>() const {
  return f16;
}

}  // namespace jax_softmax2p
