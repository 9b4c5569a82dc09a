// What an instruction set provides: the pieces of which runtime/rows.h makes whole rows, as pointers.
//
// A kernel is added here, in targets/make_kernels.h and in runtime/rows.h; every instruction set then has it.
#pragma once

#include <cstdint>

#include "ffi/kernels/extended_sum.h"

namespace jax_softmax2p {

template <typename T>
struct SplitScalar {
  T high;
  T low;
};

// y = (high + low)·2^-exponent·e^x, with x less `maximum` first where `less_maximum`.
template <typename T>
struct SoftmaxScale {
  T high;
  T low;
  int exponent;
  bool less_maximum;
  T maximum;
};

template <typename T>
struct KernelTable {
  // Sums with an exponent beyond this, either way, are not to be trusted: see Reduction in exp.h.
  int max_exponent;
  // The largest element, NaNs passed over.
  T (*max)(const T* x, std::int64_t n);
  // Where `kept` is not null, s of every e^x = (1 + s)·2^n is written there, for `write`.
  ExtendedSum (*sum)(const T* x, T* kept, std::int64_t n);
  ExtendedSum (*sum_less_maximum)(const T* x, std::int64_t n, T maximum);
  // `kept` is null, or what `sum` left there, and may be y; ignored with `less_maximum`. `stream` writes past
  // the caches.
  void (*write)(const T* x, const T* kept, T* y, std::int64_t n, const SoftmaxScale<T>& scale, bool stream);
  DoubleSum (*dot)(const T* y, const T* t, std::int64_t n);
  void (*jacobian_write)(const T* y, const T* t, T* out, std::int64_t n, const SplitScalar<T>& dot);
};

struct Kernels {
  const char* name;
  KernelTable<float> f32;
  KernelTable<double> f64;

  template <typename T>
  const KernelTable<T>& Of() const;
};

template <>
inline const KernelTable<float>& Kernels::Of<float>() const {
  return f32;
}
template <>
inline const KernelTable<double>& Kernels::Of<double>() const {
  return f64;
}

}  // namespace jax_softmax2p
