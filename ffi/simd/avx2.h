// The vector types for AVX2 with FMA. See portable.h for the contract.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "ffi/base/half.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p::avx2 {

// A mask of the first `count` lanes is a window into this table, `count` elements before the zeros.
alignas(32) inline constexpr std::int32_t kMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
alignas(32) inline constexpr std::int64_t kMask64[8] = {-1, -1, -1, -1};

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 8;
  static constexpr int kTransposeRows = 4;
  static constexpr int kTableBits = 2;
  static constexpr bool kHasFma = true;
  static constexpr int kRegisters = 16;

  __m256 v;

  static SOFTMAX2P_INLINE F32 Broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static SOFTMAX2P_INLINE F32 Load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static SOFTMAX2P_INLINE F32 LoadPartial(const float* p, int count, float fill) {
    const __m256i mask = FirstLanes(count);
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))};
  }
  SOFTMAX2P_INLINE void Store(float* p) const { _mm256_storeu_ps(p, v); }
  SOFTMAX2P_INLINE void Stream(float* p) const { _mm256_stream_ps(p, v); }
  // Without vmaskmovps, which AMD's cores run from microcode when it stores.
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

  template <typename Half>
  static SOFTMAX2P_INLINE F32 Load(const Half* p) {
    return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
  }
  template <typename Half>
  static SOFTMAX2P_INLINE F32 LoadPartial(const Half* p, int count, float fill) {
    Half halves[kLanes] = {};
    Half* to = halves;
    CopyPart<4>(count, p, to);
    CopyPart<2>(count, p, to);
    CopyPart<1>(count, p, to);
    const __m256 loaded = Load(halves).v;
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), loaded, _mm256_castsi256_ps(FirstLanes(count)))};
  }
  template <typename Half>
  SOFTMAX2P_INLINE void Store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), Narrow(p));
  }
  template <typename Half>
  SOFTMAX2P_INLINE void Stream(Half* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), Narrow(p));
  }
  template <typename Half>
  SOFTMAX2P_INLINE void StorePartial(Half* p, int count) const {
    Half halves[kLanes];
    Store(halves);
    const Half* from = halves;
    CopyPart<4>(count, from, p);
    CopyPart<2>(count, from, p);
    CopyPart<1>(count, from, p);
  }

  static SOFTMAX2P_INLINE void LoadTransposed(const float* p, std::int64_t stride, F32 (&columns)[4]) {
    __m256 rows[4];
    SOFTMAX2P_UNROLL for (int j = 0; j < 4; ++j) {
      rows[j] = _mm256_castps128_ps256(_mm_loadu_ps(p + j * stride));
      rows[j] = _mm256_insertf128_ps(rows[j], _mm_loadu_ps(p + (4 + j) * stride), 1);
    }
    Transpose(rows);
    SOFTMAX2P_UNROLL for (int j = 0; j < 4; ++j) columns[j].v = rows[j];
  }
  static SOFTMAX2P_INLINE void StoreTransposed(const F32 (&columns)[4], float* p, std::int64_t stride) {
    __m256 rows[4] = {columns[0].v, columns[1].v, columns[2].v, columns[3].v};
    Transpose(rows);
    SOFTMAX2P_UNROLL for (int j = 0; j < 4; ++j) {
      _mm_storeu_ps(p + j * stride, _mm256_castps256_ps128(rows[j]));
      _mm_storeu_ps(p + (4 + j) * stride, _mm256_extractf128_ps(rows[j], 1));
    }
  }

  static SOFTMAX2P_INLINE F32 Where(const std::uint8_t* where, F32 a, F32 b) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(where));
    const __m256i masked = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
    return {_mm256_blendv_ps(a.v, b.v, _mm256_castsi256_ps(masked))};
  }

  friend SOFTMAX2P_INLINE F32 WhereEqual(F32 x, F32 y, F32 a, F32 b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_EQ_OQ))};
  }

  friend SOFTMAX2P_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 Fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 Fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F32 Max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Floor(F32 a) { return {_mm256_floor_ps(a.v)}; }
  friend SOFTMAX2P_INLINE bool AnyGreater(F32 a, F32 b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
  }
  SOFTMAX2P_INLINE float ReduceMax() const {
    const __m128 of4 = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 of2 = _mm_max_ps(of4, _mm_movehl_ps(of4, of4));
    return _mm_cvtss_f32(_mm_max_ss(of2, _mm_movehdup_ps(of2)));
  }
  friend SOFTMAX2P_INLINE double ReduceSum(F32 hi, F32 lo) {
    const auto halves = [](F32 a) {
      return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)),
                           _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
    };
    const __m256d of4 = _mm256_add_pd(halves(hi), halves(lo));
    const __m128d of2 = _mm_add_pd(_mm256_castpd256_pd128(of4), _mm256_extractf128_pd(of4, 1));
    return _mm_cvtsd_f64(_mm_add_sd(of2, _mm_unpackhi_pd(of2, of2)));
  }
  friend SOFTMAX2P_INLINE F32 ExponentFromLowBits(F32 a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
  }
  SOFTMAX2P_INLINE F32 PowerFromTable(const std::uint32_t* table) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256 entries = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(table));
    const __m256i chosen = _mm256_castps_si256(_mm256_permutevar_ps(entries, bits));
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits, 23 - kTableBits), chosen))};
  }

 private:
  template <int kCount, typename Half>
  static SOFTMAX2P_INLINE void CopyPart(int count, const Half*& from, Half*& to) {
    if (!(count & kCount)) return;
    std::memcpy(to, from, kCount * sizeof(Half));
    from += kCount;
    to += kCount;
  }
  static SOFTMAX2P_INLINE F32 Widen(__m128i halves, const BFloat16*) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
  }
  static SOFTMAX2P_INLINE F32 Widen(__m128i halves, const Float16*) { return {_mm256_cvtph_ps(halves)}; }
  SOFTMAX2P_INLINE __m128i Narrow(const BFloat16*) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    // Rounding may carry out of a NaN, which therefore becomes the usual one.
    const __m256 carried = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 kept =
        _mm256_blendv_ps(_mm256_castsi256_ps(sum), _mm256_set1_ps(__builtin_nanf("")), carried);
    const __m256i rounded = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  SOFTMAX2P_INLINE __m128i Narrow(const Float16*) const {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Does two 4x4 transpositions, one in each 128 bits.
  static SOFTMAX2P_INLINE void Transpose(__m256 (&r)[4]) {
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    r[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    r[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    r[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    r[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
  }
  static SOFTMAX2P_INLINE __m256i FirstLanes(int count) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask32 + 8 - count));
  }
};

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 4;
  static constexpr int kTransposeRows = 2;
  static constexpr int kTableBits = 0;
  static constexpr bool kHasFma = true;
  static constexpr int kRegisters = 16;

  __m256d v;

  static SOFTMAX2P_INLINE F64 Broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static SOFTMAX2P_INLINE F64 Load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static SOFTMAX2P_INLINE F64 LoadPartial(const double* p, int count, double fill) {
    const __m256i mask = FirstLanes(count);
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

  static SOFTMAX2P_INLINE void LoadTransposed(const double* p, std::int64_t stride, F64 (&columns)[2]) {
    __m256d rows[2];
    SOFTMAX2P_UNROLL for (int j = 0; j < 2; ++j) {
      rows[j] = _mm256_castpd128_pd256(_mm_loadu_pd(p + j * stride));
      rows[j] = _mm256_insertf128_pd(rows[j], _mm_loadu_pd(p + (2 + j) * stride), 1);
    }
    columns[0].v = _mm256_unpacklo_pd(rows[0], rows[1]);
    columns[1].v = _mm256_unpackhi_pd(rows[0], rows[1]);
  }
  static SOFTMAX2P_INLINE void StoreTransposed(const F64 (&columns)[2], double* p, std::int64_t stride) {
    const __m256d rows[2] = {_mm256_unpacklo_pd(columns[0].v, columns[1].v),
                             _mm256_unpackhi_pd(columns[0].v, columns[1].v)};
    SOFTMAX2P_UNROLL for (int j = 0; j < 2; ++j) {
      _mm_storeu_pd(p + j * stride, _mm256_castpd256_pd128(rows[j]));
      _mm_storeu_pd(p + (2 + j) * stride, _mm256_extractf128_pd(rows[j], 1));
    }
  }

  static SOFTMAX2P_INLINE F64 Where(const std::uint8_t* where, F64 a, F64 b) {
    std::int32_t bytes;
    std::memcpy(&bytes, where, sizeof bytes);
    const __m256i masked =
        _mm256_cmpeq_epi64(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)), _mm256_setzero_si256());
    return {_mm256_blendv_pd(a.v, b.v, _mm256_castsi256_pd(masked))};
  }

  friend SOFTMAX2P_INLINE F64 WhereEqual(F64 x, F64 y, F64 a, F64 b) {
    return {_mm256_blendv_pd(b.v, a.v, _mm256_cmp_pd(x.v, y.v, _CMP_EQ_OQ))};
  }

  friend SOFTMAX2P_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 Fnma(F64 a, F64 b, F64 c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 Fms(F64 a, F64 b, F64 c) { return {_mm256_fmsub_pd(a.v, b.v, c.v)}; }
  friend SOFTMAX2P_INLINE F64 Max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Floor(F64 a) { return {_mm256_floor_pd(a.v)}; }
  friend SOFTMAX2P_INLINE bool AnyGreater(F64 a, F64 b) {
    return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)) != 0;
  }
  SOFTMAX2P_INLINE double ReduceMax() const {
    const __m128d of2 = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(of2, _mm_unpackhi_pd(of2, of2)));
  }
  friend SOFTMAX2P_INLINE F64 ExponentFromLowBits(F64 a) {
    return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a.v), 52))};
  }

 private:
  static SOFTMAX2P_INLINE __m256i FirstLanes(int count) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask64 + 4 - count));
  }
};

}  // namespace jax_softmax2p::avx2
