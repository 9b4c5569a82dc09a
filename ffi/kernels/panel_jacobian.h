// Derivatives along an axis that is not the last, on panels of columns: the Jacobian of softmax applied to a
// tangent or cotangent, and what the derivatives of its logarithm are made of.
#pragma once

#include <cstdint>

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/kernels/compensated_lanes.h"
#include "ffi/kernels/exp_source.h"
#include "ffi/kernels/panel_blocks.h"
#include "ffi/kernels/passes.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class PanelJacobianKernels {
  using T = typename V::Scalar;

 public:
  static void Dot(const E* y, const E* t, const Panel& panel, bool resume, const PanelDots<T>& dots) {
    SumPanel(Products{y, t}, panel, resume, dots);
  }

  static void Sum(const E* t, const Panel& panel, bool resume, const PanelDots<T>& dots) {
    SumPanel(Elements{t}, panel, resume, dots);
  }

  static void DotMinusLse(const T* z, const E* t, const Panel& panel, std::int64_t t_stride, bool resume,
                          const T* hi, const T* lo, const PanelDots<T>& dots) {
    SumPanel(ProductsMinusLse{z, t, t_stride, hi, lo}, panel, resume, dots);
  }

  static void Add(const PanelDots<T>& into, const PanelDots<T>& from, int width) {
    ForVectors<V>(width, [&](int, int at, const auto& access) {
      CompensatedLanes<V> total{access.Load(into.hi + at), access.Load(into.lo + at)};
      total.Add({access.Load(from.hi + at), access.Load(from.lo + at)});
      Store(access, total, into, at);
    });
    ForgetNonFinite(into.lo, width);
  }

  static void Write(const E* y, const E* t, E* out, const Panel& panel, const PanelDots<T>& dots) {
    ForPanelWrites<V>(panel, [&](int, int at, const auto& access, std::int64_t row, std::int64_t rows) {
      const V hi = access.Load(dots.hi + at, 0), lo = access.Load(dots.lo + at, 0);
      const std::int64_t first = row * panel.stride + at, end = first + rows * panel.stride;
      for (std::int64_t i = first; i < end; i += panel.stride) {
        Prefetch<1>(y + i, panel.stride, panel.block);
        Prefetch<1>(t + i, panel.stride, panel.block);
        access.Store(access.Load(y + i, 0) * ((access.Load(t + i, 0) - hi) - lo), out + i);
      }
    });
  }

  static void SubtractMinusLse(const T* z, const E* t, E* out, const Panel& panel, std::int64_t t_stride,
                               const T* hi, const T* lo, const PanelDots<T>& sums) {
    ForPanelWrites<V>(panel, [&](int, int at, const auto& access, std::int64_t first, std::int64_t rows) {
      const V lse_hi = access.Load(hi + at, 0);
      const RecomputeMinusLse<V> source(lse_hi, access.Load(lo + at, 0));
      const MinusProbability<V> minus(access.Load(sums.hi + at, 0), access.Load(sums.lo + at, 0), lse_hi);
      ForRows(rows, [&](auto count, std::int64_t i) {
        constexpr int K = decltype(count)::value;
        const T* const from = z + (first + i) * panel.stride + at;
        const std::int64_t to = (first + i) * t_stride + at;
        Prefetch<K>(from, panel.stride, panel.block);
        Prefetch<K>(t + to, t_stride, panel.block);
        Prefetch<K>(out + to, t_stride, panel.block);
        const ExtExp<V, K> e = source.template At<K>(access, from, Discard{}, panel.stride);
        SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
          const V t_k = access.Load(t + to + k * t_stride, 0);
          access.Store(minus(t_k, e.expm1[k], e.pow2[k]), out + to + k * t_stride);
        }
      });
    });
  }

 private:
  // What is summed: Add adds the terms of K rows of the vector at column `at`, from row `row` on.
  struct Products {
    const E* y;
    const E* t;
    template <typename Access>
    SOFTMAX2P_INLINE Products Of(const Access&, int) const {
      return *this;
    }
    template <int K, typename Access>
    SOFTMAX2P_INLINE void Add(const Access& access, const Panel& panel, int at, std::int64_t row,
                              CompensatedLanes<V>& sum) const {
      const std::int64_t i = row * panel.stride + at;
      Prefetch<K>(y + i, panel.stride, panel.block);
      Prefetch<K>(t + i, panel.stride, panel.block);
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
        V error;
        const V product = TwoProd(access.Load(y + i + k * panel.stride, 0),
                                  access.Load(t + i + k * panel.stride, 0), error);
        sum.Add(product, error);
      }
    }
  };
  struct Elements {
    const E* t;
    template <typename Access>
    SOFTMAX2P_INLINE Elements Of(const Access&, int) const {
      return *this;
    }
    template <int K, typename Access>
    SOFTMAX2P_INLINE void Add(const Access& access, const Panel& panel, int at, std::int64_t row,
                              CompensatedLanes<V>& sum) const {
      const std::int64_t i = row * panel.stride + at;
      Prefetch<K>(t + i, panel.stride, panel.block);
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
        sum.Add(access.Load(t + i + k * panel.stride, 0), V::Broadcast(0));
      }
    }
  };
  // e^(z - hi - lo) takes y's place.
  struct ProductsMinusLse {
    const T* z;
    const E* t;
    std::int64_t t_stride;
    const T* hi;
    const T* lo;
    struct OfColumns {
      RecomputeMinusLse<V> source;
      const T* z;
      const E* t;
      std::int64_t t_stride;
      template <int K, typename Access>
      SOFTMAX2P_INLINE void Add(const Access& access, const Panel& panel, int at, std::int64_t row,
                                CompensatedLanes<V>& sum) const {
        const T* const from = z + row * panel.stride + at;
        const E* const terms = t + row * t_stride + at;
        Prefetch<K>(from, panel.stride, panel.block);
        Prefetch<K>(terms, t_stride, panel.block);
        V p[K];
        constexpr double kInverse = 1.0 / kFactor<V>;
        const Scaler<V> scaler{V::Broadcast(static_cast<T>(kInverse)),
                               V::Broadcast(static_cast<T>(kInverse - static_cast<T>(kInverse)))};
        scaler(source.template At<K>(access, from, Discard{}, panel.stride), p);
        SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
          V error;
          const V product = TwoProd(p[k], access.Load(terms + k * t_stride, 0), error);
          sum.Add(product, error);
        }
      }
    };
    template <typename Access>
    SOFTMAX2P_INLINE OfColumns Of(const Access& access, int at) const {
      return {RecomputeMinusLse<V>(access.Load(hi + at, 0), access.Load(lo + at, 0)), z, t, t_stride};
    }
  };

  // Calls body(their number as a type, first row) for kUnroll rows at a time, and then for one.
  template <typename Body>
  static SOFTMAX2P_INLINE void ForRows(std::int64_t rows, const Body& body) {
    std::int64_t row = 0;
    for (; row + kUnroll <= rows; row += kUnroll) body(std::integral_constant<int, kUnroll>{}, row);
    for (; row < rows; ++row) body(std::integral_constant<int, 1>{}, row);
  }

  // The sum of a block is compensated by itself, which keeps the uncompensated sums of errors short.
  template <typename Terms>
  static SOFTMAX2P_INLINE void SumPanel(const Terms& terms, const Panel& panel, bool resume,
                                        const PanelDots<T>& dots) {
    CompensatedLanes<V> totals[kPanelVectors<V>];
    ForVectors<V>(panel.width, [&](int v, int at, const auto& access) {
      if (resume) totals[v] = {access.Load(dots.hi + at, 0), access.Load(dots.lo + at, 0)};
    });
    ForPanelBlocks<V>(panel, [&](int v, int at, const auto& access, std::int64_t first, std::int64_t rows) {
      const auto of_columns = terms.Of(access, at);
      CompensatedLanes<V> sum;
      ForRows(rows, [&](auto count, std::int64_t i) {
        of_columns.template Add<decltype(count)::value>(access, panel, at, first + i, sum);
      });
      totals[v].Add(sum);
    });
    ForVectors<V>(panel.width,
                  [&](int v, int at, const auto& access) { Store(access, totals[v], dots, at); });
    ForgetNonFinite(dots.lo, panel.width);
  }

  template <typename Access>
  static SOFTMAX2P_INLINE void Store(const Access& access, const CompensatedLanes<V>& total,
                                     const PanelDots<T>& dots, int at) {
    access.Store(total.sum, dots.hi + at);
    access.Store(total.rest, dots.lo + at);
  }

  // An infinite or NaN term leaves nothing sensible in lo, which must not spoil hi.
  static SOFTMAX2P_INLINE void ForgetNonFinite(T* lo, int width) {
    for (int c = 0; c < width; ++c) lo[c] = lo[c] - lo[c] == 0 ? lo[c] : 0;
  }
};

}  // namespace jax_softmax2p
