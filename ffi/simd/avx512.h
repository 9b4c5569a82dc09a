// The vector types for AVX-512 (F, BW, DQ, VL). See portable.h for the contract.
#pragma once

#include <immintrin.h>

#include "ffi/simd/inline.h"

namespace jax_softmax2p::avx512 {

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr bool kFused = true;

  __m512 v;

  static SOFTMAX2P_INLINE F32 Broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static SOFTMAX2P_INLINE F32 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static SOFTMAX2P_INLINE F32 LoadPartial(const float* p, int count, float fill) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), Leading(count), p)};
  }
  SOFTMAX2P_INLINE void Store(float* p) const { _mm512_storeu_ps(p, v); }
  SOFTMAX2P_INLINE void Stream(float* p) const { _mm512_stream_ps(p, v); }
  SOFTMAX2P_INLINE void StorePartial(float* p, int count) const {
    _mm512_mask_storeu_ps(p, Leading(count), v);
  }

  friend SOFTMAX2P_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 Fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 ProductError(F32 a, F32 b, F32 p) { return {_mm512_fmsub_ps(a.v, b.v, p.v)}; }
  friend SOFTMAX2P_INLINE F32 Max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 ExponentFromLowBits(F32 a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
  }

 private:
  static SOFTMAX2P_INLINE __mmask16 Leading(int count) { return static_cast<__mmask16>((1u << count) - 1); }
};

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 8;
  static constexpr bool kFused = true;

  __m512d v;

  static SOFTMAX2P_INLINE F64 Broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static SOFTMAX2P_INLINE F64 Load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static SOFTMAX2P_INLINE F64 LoadPartial(const double* p, int count, double fill) {
    return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), Leading(count), p)};
  }
  SOFTMAX2P_INLINE void Store(double* p) const { _mm512_storeu_pd(p, v); }
  SOFTMAX2P_INLINE void Stream(double* p) const { _mm512_stream_pd(p, v); }
  SOFTMAX2P_INLINE void StorePartial(double* p, int count) const {
    _mm512_mask_storeu_pd(p, Leading(count), v);
  }

  friend SOFTMAX2P_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 Fnma(F64 a, F64 b, F64 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 ProductError(F64 a, F64 b, F64 p) { return {_mm512_fmsub_pd(a.v, b.v, p.v)}; }
  friend SOFTMAX2P_INLINE F64 Max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 ExponentFromLowBits(F64 a) {
    return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a.v), 52))};
  }

 private:
  static SOFTMAX2P_INLINE __mmask8 Leading(int count) { return static_cast<__mmask8>((1u << count) - 1); }
};

}  // namespace jax_softmax2p::avx512
