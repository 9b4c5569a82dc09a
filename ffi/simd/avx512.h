// The vector types for AVX-512 (F, BW, DQ, VL). See portable.h for the contract.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "ffi/base/half.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p::avx512 {

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kTransposeRows = 4;
  static constexpr int kTableBits = 2;
  static constexpr bool kHasFma = true;
  static constexpr int kRegisters = 32;

  __m512 v;

  static SOFTMAX2P_INLINE F32 Broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static SOFTMAX2P_INLINE F32 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static SOFTMAX2P_INLINE F32 LoadPartial(const float* p, int count, float fill) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), FirstLanes(count), p)};
  }
  SOFTMAX2P_INLINE void Store(float* p) const { _mm512_storeu_ps(p, v); }
  SOFTMAX2P_INLINE void Stream(float* p) const { _mm512_stream_ps(p, v); }
  SOFTMAX2P_INLINE void StorePartial(float* p, int count) const {
    _mm512_mask_storeu_ps(p, FirstLanes(count), v);
  }

  template <typename Half>
  static SOFTMAX2P_INLINE F32 Load(const Half* p) {
    return Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
  }
  template <typename Half>
  static SOFTMAX2P_INLINE F32 LoadPartial(const Half* p, int count, float fill) {
    const F32 loaded = Widen(_mm256_maskz_loadu_epi16(FirstLanes(count), p), p);
    return {_mm512_mask_blend_ps(FirstLanes(count), _mm512_set1_ps(fill), loaded.v)};
  }
  template <typename Half>
  SOFTMAX2P_INLINE void Store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Narrow(p));
  }
  template <typename Half>
  SOFTMAX2P_INLINE void Stream(Half* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), Narrow(p));
  }
  template <typename Half>
  SOFTMAX2P_INLINE void StorePartial(Half* p, int count) const {
    _mm256_mask_storeu_epi16(p, FirstLanes(count), Narrow(p));
  }

  static SOFTMAX2P_INLINE void LoadTransposed(const float* p, std::int64_t stride, F32 (&columns)[4]) {
    __m512 rows[4];
    SOFTMAX2P_UNROLL for (int j = 0; j < 4; ++j) {
      rows[j] = _mm512_castps128_ps512(_mm_loadu_ps(p + j * stride));
      rows[j] = _mm512_insertf32x4(rows[j], _mm_loadu_ps(p + (4 + j) * stride), 1);
      rows[j] = _mm512_insertf32x4(rows[j], _mm_loadu_ps(p + (8 + j) * stride), 2);
      rows[j] = _mm512_insertf32x4(rows[j], _mm_loadu_ps(p + (12 + j) * stride), 3);
    }
    Transpose(rows);
    SOFTMAX2P_UNROLL for (int j = 0; j < 4; ++j) columns[j].v = rows[j];
  }
  static SOFTMAX2P_INLINE void StoreTransposed(const F32 (&columns)[4], float* p, std::int64_t stride) {
    __m512 rows[4] = {columns[0].v, columns[1].v, columns[2].v, columns[3].v};
    Transpose(rows);
    SOFTMAX2P_UNROLL for (int j = 0; j < 4; ++j) {
      _mm_storeu_ps(p + j * stride, _mm512_castps512_ps128(rows[j]));
      _mm_storeu_ps(p + (4 + j) * stride, _mm512_extractf32x4_ps(rows[j], 1));
      _mm_storeu_ps(p + (8 + j) * stride, _mm512_extractf32x4_ps(rows[j], 2));
      _mm_storeu_ps(p + (12 + j) * stride, _mm512_extractf32x4_ps(rows[j], 3));
    }
  }

  static SOFTMAX2P_INLINE F32 Where(const std::uint8_t* where, F32 a, F32 b) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(where));
    return {_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), b.v, a.v)};
  }

  friend SOFTMAX2P_INLINE F32 WhereEqual(F32 x, F32 y, F32 a, F32 b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_EQ_OQ), b.v, a.v)};
  }

  friend SOFTMAX2P_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 Fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 Fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 Max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Floor(F32 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  }
  friend SOFTMAX2P_INLINE bool AnyGreater(F32 a, F32 b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0;
  }
  SOFTMAX2P_INLINE float ReduceMax() const { return _mm512_reduce_max_ps(v); }
  friend SOFTMAX2P_INLINE double ReduceSum(F32 hi, F32 lo) {
    const auto halves = [](F32 a) {
      return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
                           _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
    };
    return _mm512_reduce_add_pd(_mm512_add_pd(halves(hi), halves(lo)));
  }
  friend SOFTMAX2P_INLINE F32 ExponentFromLowBits(F32 a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
  }
  SOFTMAX2P_INLINE F32 PowerFromTable(const std::uint32_t* table) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512 entries = _mm512_broadcast_f32x4(_mm_load_ps(reinterpret_cast<const float*>(table)));
    const __m512i chosen = _mm512_castps_si512(_mm512_permutevar_ps(entries, bits));
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bits, 23 - kTableBits), chosen))};
  }

 private:
  static SOFTMAX2P_INLINE F32 Widen(__m256i halves, const BFloat16*) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  }
  static SOFTMAX2P_INLINE F32 Widen(__m256i halves, const Float16*) { return {_mm512_cvtph_ps(halves)}; }
  SOFTMAX2P_INLINE __m256i Narrow(const BFloat16*) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    // Rounding may carry out of a NaN, which therefore becomes the usual one.
    const __mmask16 carried = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_blend_epi32(carried, rounded, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  SOFTMAX2P_INLINE __m256i Narrow(const Float16*) const {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Does four 4x4 transpositions, one in each 128 bits.
  static SOFTMAX2P_INLINE void Transpose(__m512 (&r)[4]) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
  static SOFTMAX2P_INLINE __mmask16 FirstLanes(int count) {
    return static_cast<__mmask16>((1u << count) - 1);
  }
};

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 8;
  static constexpr int kTransposeRows = 2;
  static constexpr int kTableBits = 0;
  static constexpr bool kHasFma = true;
  static constexpr int kRegisters = 32;

  __m512d v;

  static SOFTMAX2P_INLINE F64 Broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static SOFTMAX2P_INLINE F64 Load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static SOFTMAX2P_INLINE F64 LoadPartial(const double* p, int count, double fill) {
    return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), FirstLanes(count), p)};
  }
  SOFTMAX2P_INLINE void Store(double* p) const { _mm512_storeu_pd(p, v); }
  SOFTMAX2P_INLINE void Stream(double* p) const { _mm512_stream_pd(p, v); }
  SOFTMAX2P_INLINE void StorePartial(double* p, int count) const {
    _mm512_mask_storeu_pd(p, FirstLanes(count), v);
  }

  static SOFTMAX2P_INLINE void LoadTransposed(const double* p, std::int64_t stride, F64 (&columns)[2]) {
    __m512d rows[2];
    SOFTMAX2P_UNROLL for (int j = 0; j < 2; ++j) {
      rows[j] = _mm512_castpd128_pd512(_mm_loadu_pd(p + j * stride));
      rows[j] = _mm512_insertf64x2(rows[j], _mm_loadu_pd(p + (2 + j) * stride), 1);
      rows[j] = _mm512_insertf64x2(rows[j], _mm_loadu_pd(p + (4 + j) * stride), 2);
      rows[j] = _mm512_insertf64x2(rows[j], _mm_loadu_pd(p + (6 + j) * stride), 3);
    }
    columns[0].v = _mm512_unpacklo_pd(rows[0], rows[1]);
    columns[1].v = _mm512_unpackhi_pd(rows[0], rows[1]);
  }
  static SOFTMAX2P_INLINE void StoreTransposed(const F64 (&columns)[2], double* p, std::int64_t stride) {
    const __m512d rows[2] = {_mm512_unpacklo_pd(columns[0].v, columns[1].v),
                             _mm512_unpackhi_pd(columns[0].v, columns[1].v)};
    SOFTMAX2P_UNROLL for (int j = 0; j < 2; ++j) {
      _mm_storeu_pd(p + j * stride, _mm512_castpd512_pd128(rows[j]));
      _mm_storeu_pd(p + (2 + j) * stride, _mm512_extractf64x2_pd(rows[j], 1));
      _mm_storeu_pd(p + (4 + j) * stride, _mm512_extractf64x2_pd(rows[j], 2));
      _mm_storeu_pd(p + (6 + j) * stride, _mm512_extractf64x2_pd(rows[j], 3));
    }
  }

  static SOFTMAX2P_INLINE F64 Where(const std::uint8_t* where, F64 a, F64 b) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(where));
    return {_mm512_mask_blend_pd(static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes)), b.v, a.v)};
  }

  friend SOFTMAX2P_INLINE F64 WhereEqual(F64 x, F64 y, F64 a, F64 b) {
    return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(x.v, y.v, _CMP_EQ_OQ), b.v, a.v)};
  }

  friend SOFTMAX2P_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 Fnma(F64 a, F64 b, F64 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 Fms(F64 a, F64 b, F64 c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 Max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Floor(F64 a) {
    return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  }
  friend SOFTMAX2P_INLINE bool AnyGreater(F64 a, F64 b) {
    return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ) != 0;
  }
  SOFTMAX2P_INLINE double ReduceMax() const { return _mm512_reduce_max_pd(v); }
  friend SOFTMAX2P_INLINE F64 ExponentFromLowBits(F64 a) {
    return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a.v), 52))};
  }

 private:
  static SOFTMAX2P_INLINE __mmask8 FirstLanes(int count) { return static_cast<__mmask8>((1u << count) - 1); }
};

}  // namespace jax_softmax2p::avx512
