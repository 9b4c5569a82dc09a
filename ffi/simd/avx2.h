// The vector types for AVX2 with FMA. See portable.h for the contract.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "ffi/simd/inline.h"

namespace jax_softmax2p::avx2 {

// A window into this table, sliding by `count` elements, is a mask of `count` leading lanes.
alignas(32) inline constexpr std::int32_t kMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
alignas(32) inline constexpr std::int64_t kMask64[8] = {-1, -1, -1, -1};

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 8;
  static constexpr bool kFused = true;

  __m256 v;

  static SOFTMAX2P_INLINE F32 Broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static SOFTMAX2P_INLINE F32 Load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static SOFTMAX2P_INLINE F32 LoadPartial(const float* p, int count, float fill) {
    const __m256i mask = Leading(count);
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))};
  }
  SOFTMAX2P_INLINE void Store(float* p) const { _mm256_storeu_ps(p, v); }
  SOFTMAX2P_INLINE void Stream(float* p) const { _mm256_stream_ps(p, v); }
  // Not vmaskmovps, which AMD's cores run from microcode when it stores.
  SOFTMAX2P_INLINE void StorePartial(float* p, int count) const {
    __m128 rest = _mm256_castps256_ps128(v);
    if (count & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (count & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (count & 1) _mm_store_ss(p, rest);
  }

  friend SOFTMAX2P_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 Fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 ProductError(F32 a, F32 b, F32 p) { return {_mm256_fmsub_ps(a.v, b.v, p.v)}; }
  friend SOFTMAX2P_INLINE F32 Max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 ExponentFromLowBits(F32 a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
  }

 private:
  static SOFTMAX2P_INLINE __m256i Leading(int count) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask32 + 8 - count));
  }
};

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 4;
  static constexpr bool kFused = true;

  __m256d v;

  static SOFTMAX2P_INLINE F64 Broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static SOFTMAX2P_INLINE F64 Load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static SOFTMAX2P_INLINE F64 LoadPartial(const double* p, int count, double fill) {
    const __m256i mask = Leading(count);
    return {_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask))};
  }
  SOFTMAX2P_INLINE void Store(double* p) const { _mm256_storeu_pd(p, v); }
  SOFTMAX2P_INLINE void Stream(double* p) const { _mm256_stream_pd(p, v); }
  SOFTMAX2P_INLINE void StorePartial(double* p, int count) const {
    __m128d rest = _mm256_castpd256_pd128(v);
    if (count & 2) {
      _mm_storeu_pd(p, rest);
      rest = _mm256_extractf128_pd(v, 1);
      p += 2;
    }
    if (count & 1) _mm_store_sd(p, rest);
  }

  friend SOFTMAX2P_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 Fnma(F64 a, F64 b, F64 c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 ProductError(F64 a, F64 b, F64 p) { return {_mm256_fmsub_pd(a.v, b.v, p.v)}; }
  friend SOFTMAX2P_INLINE F64 Max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 ExponentFromLowBits(F64 a) {
    return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a.v), 52))};
  }

 private:
  static SOFTMAX2P_INLINE __m256i Leading(int count) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask64 + 4 - count));
  }
};

}  // namespace jax_softmax2p::avx2
