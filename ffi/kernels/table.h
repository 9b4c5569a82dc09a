// What an instruction set provides: the pieces of which runtime/ makes whole arrays, as pointers.
//
// A kernel is added here, in targets/make_kernels.h and in runtime/; every instruction set then has it.
#pragma once

#include <cstdint>

#include "ffi/base/error_free.h"
#include "ffi/base/half.h"
#include "ffi/kernels/extended_sum.h"

namespace jax_softmax2p {

// The longest matrices, in elements, for KernelTable::small_matrices. Rows of 96 take 0.30 ns an element in
// it and 0.55 by themselves, rows of 128 0.29 and 0.44 (Zen 5, float32, AVX-512; AVX2: 0.46 and 0.65, 0.62
// and 0.59).
inline constexpr int kMaxSmall = 128;
// The most columns that a Panel has.
inline constexpr int kPanelWidth = 256;

// What is known of a row's maximum before its sum.
template <typename T>
struct KnownMaximum {
  enum Use {
    kNothing,    // blocks find their own
    kReference,  // it gives the exponent
    kSubtract,   // it is subtracted from every element
  };
  Use use = kNothing;
  T value = 0;
};

// y = (hi + lo)·2^-exponent·e^x, with x less `maximum` and then `rest` first where `subtract`.
template <typename T>
struct RowScale {
  T hi;
  T lo;
  int exponent;
  bool subtract;
  T maximum;
  T rest;
};

// `width` columns of `rows` elements each, column c's at x[c + i * stride], and one element more in the first
// `tail` columns.
struct Panel {
  std::int64_t rows;
  std::int64_t stride;
  int width;
  int tail;
};

// A sum, or its inverse, for every column of a panel: (hi + lo)·2^exponent.
template <typename T>
struct PanelTotals {
  T* hi;
  T* lo;
  T* exponent;
};

// A stretch of a row, and what is applied to it: `where` and `bias` have an element for each of x's, or are
// null: nothing is masked, or `shift` is the bias.
template <typename E>
struct ScaleBiasMaskArgs {
  const E* x;
  const E* bias;
  const std::uint8_t* where;
  ComputeOf<E> scale;
  ComputeOf<E> shift;
  ComputeOf<E> fill;
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
};

// The logsumexp of a row, as maximum + log + rest. The log is NaN where the row has no softmax.
template <typename T>
struct LseTerms {
  T maximum;
  T log;
  T rest;
};

// Kernels for arrays of E, computed in T.
template <typename E>
struct KernelTable {
  using T = ComputeOf<E>;

  // Sums with an exponent beyond this, either way, are not to be trusted: see Reduction in exp.h.
  int max_exponent;
  // Elements of a vector.
  int lanes;

  // One e^x = (1 + s)·power·2^exponent, the same as in a row's sum.
  void (*exponential)(T x, int exponent, T* s, T* power);

  // Contiguous rows. The largest element, NaNs passed over:
  T (*row_max)(const E* x, std::int64_t n);
  // Where `kept` is not null, s of every e^x = (1 + s)·2^n is written there, for row_write; ignored where the
  // maximum is subtracted. It may be y.
  RowSum<T> (*row_sum)(const E* x, T* kept, std::int64_t n, const KnownMaximum<T>& maximum);
  // `non_temporal` writes past the caches.
  void (*row_write)(const E* x, const T* kept, E* y, std::int64_t n, const RowScale<T>& scale,
                    bool non_temporal);
  // y = (x - maximum) - log.
  void (*row_write_log)(const E* x, E* y, std::int64_t n, const LseTerms<T>& sum, bool non_temporal);

  // Rows that a scale, a bias or a mask were applied to, as T: kernels.Of<T>() has the rest. Returns the
  // largest.
  T (*apply_scale_bias_mask)(const ScaleBiasMaskArgs<E>& args, T* z, std::int64_t n);
  void (*logits_row_write)(const T* z, const T* kept, E* y, std::int64_t n, const RowScale<T>& scale,
                           bool non_temporal);
  void (*logits_row_write_log)(const T* z, E* y, std::int64_t n, const LseTerms<T>& sum, bool non_temporal);
  void (*logits_small_matrices)(const T* z, E* y, std::int64_t outer, int n, int inner, bool non_temporal);

  // Panels, of kMaxPanelRows at most. `maximum` and `subtract` are null, or have an element a column; both
  // mean what KnownMaximum says.
  void (*panel_max)(const E* x, const Panel& panel, T* maximum);
  void (*panel_sum)(const E* x, T* kept, const Panel& panel, const T* maximum, const T* subtract,
                    const PanelTotals<T>& totals);
  void (*panel_merge)(const PanelTotals<T>& into, const PanelTotals<T>& from, int width);
  void (*panel_invert)(const PanelTotals<T>& totals, int width);
  void (*panel_write)(const E* x, const T* kept, E* y, const Panel& panel, const PanelTotals<T>& scales,
                      const T* subtract);

  // FullVector matrices [outer, n, inner] of n·inner <= kMaxSmall.
  void (*small_matrices)(const E* x, E* y, std::int64_t outer, int n, int inner, bool non_temporal);

  // Rows of n <= kMaxSmall, of which E or T: their lses, maximum + log + rest, log NaN where the guard
  // must help; and factor·e^((x - hi) - lo), or, with null for factor, (x - hi) - lo.
  void (*small_lse)(const E* x, std::int64_t rows, int n, T* maximum, T* log, T* rest);
  void (*small_less)(const E* x, E* y, std::int64_t rows, int n, const T* hi, const T* lo, const T* factor);
  void (*logits_small_less)(const T* z, E* y, std::int64_t rows, int n, const T* hi, const T* lo,
                            const T* factor);

  // FullVector columns of n <= kMaxSmall elements, `width` of them side by side.
  void (*small_columns)(const E* x, E* y, std::int64_t stride, int n, int width);

  // Columns, `stride` apart from element to element, as contiguous rows and back.
  void (*pack_columns)(const E* x, std::int64_t stride, std::int64_t n, std::int64_t columns, E* rows);
  void (*unpack_columns)(const E* rows, E* x, std::int64_t stride, std::int64_t n, std::int64_t columns);

  // Derivatives, over contiguous rows. <y, t>, the same for y as T, and <1, t>:
  CompensatedSum (*dot)(const E* y, const E* t, std::int64_t n);
  CompensatedSum (*logits_dot)(const T* y, const E* t, std::int64_t n);
  CompensatedSum (*total)(const E* t, std::int64_t n);
  // out = t - p.
  void (*less)(const E* t, const T* p, E* out, std::int64_t n);
  // The Jacobian of softmax. `non_temporal` writes past the caches.
  void (*jacobian_write)(const E* y, const E* t, E* out, std::int64_t n, const DoubleDouble<T>& dot,
                         bool non_temporal);
};

// More rows would cost a sum its accuracy: see LaneSum.
inline constexpr std::int64_t kMaxPanelRows = 2048;

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
