// The vector types for NEON of 64-bit ARM, which every such CPU has. See portable.h for the contract.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "ffi/base/half.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p::neon {

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 4;
  static constexpr int kTransposeRows = 4;
  static constexpr int kTableBits = 0;
  static constexpr bool kHasFma = true;
  static constexpr int kRegisters = 32;

  float32x4_t v;

  static SOFTMAX2P_INLINE F32 Broadcast(float x) { return {vdupq_n_f32(x)}; }
  static SOFTMAX2P_INLINE F32 Load(const float* p) { return {vld1q_f32(p)}; }
  static SOFTMAX2P_INLINE F32 LoadPartial(const float* p, int count, float fill) {
    float32x4_t r = vdupq_n_f32(fill);
    if (count > 0) r = vld1q_lane_f32(p, r, 0);
    if (count > 1) r = vld1q_lane_f32(p + 1, r, 1);
    if (count > 2) r = vld1q_lane_f32(p + 2, r, 2);
    return {r};
  }
  SOFTMAX2P_INLINE void Store(float* p) const { vst1q_f32(p, v); }
  SOFTMAX2P_INLINE void StorePartial(float* p, int count) const {
    if (count > 0) vst1q_lane_f32(p, v, 0);
    if (count > 1) vst1q_lane_f32(p + 1, v, 1);
    if (count > 2) vst1q_lane_f32(p + 2, v, 2);
  }

  template <typename Half>
  static SOFTMAX2P_INLINE F32 Load(const Half* p) {
    return Widen(vld1_u16(&p->bits), p);
  }
  template <typename Half>
  static SOFTMAX2P_INLINE F32 LoadPartial(const Half* p, int count, float fill) {
    uint16x4_t halves = vdup_n_u16(0);
    if (count > 0) halves = vld1_lane_u16(&p[0].bits, halves, 0);
    if (count > 1) halves = vld1_lane_u16(&p[1].bits, halves, 1);
    if (count > 2) halves = vld1_lane_u16(&p[2].bits, halves, 2);
    constexpr std::int32_t kLane[4] = {0, 1, 2, 3};
    const uint32x4_t loaded = vcltq_s32(vld1q_s32(kLane), vdupq_n_s32(count));
    return {vbslq_f32(loaded, Widen(halves, p).v, vdupq_n_f32(fill))};
  }
  template <typename Half>
  SOFTMAX2P_INLINE void Store(Half* p) const {
    vst1_u16(&p->bits, Narrow(p));
  }
  template <typename Half>
  SOFTMAX2P_INLINE void StorePartial(Half* p, int count) const {
    const uint16x4_t halves = Narrow(p);
    if (count > 0) vst1_lane_u16(&p[0].bits, halves, 0);
    if (count > 1) vst1_lane_u16(&p[1].bits, halves, 1);
    if (count > 2) vst1_lane_u16(&p[2].bits, halves, 2);
  }
  template <typename Element>
  SOFTMAX2P_INLINE void Stream(Element* p) const {
    Store(p);
  }

  static SOFTMAX2P_INLINE void LoadTransposed(const float* p, std::int64_t stride, F32 (&columns)[4]) {
    SOFTMAX2P_UNROLL for (int j = 0; j < 4; ++j) columns[j] = Load(p + j * stride);
    Transpose(columns);
  }
  static SOFTMAX2P_INLINE void StoreTransposed(const F32 (&columns)[4], float* p, std::int64_t stride) {
    F32 rows[4] = {columns[0], columns[1], columns[2], columns[3]};
    Transpose(rows);
    SOFTMAX2P_UNROLL for (int j = 0; j < 4; ++j) rows[j].Store(p + j * stride);
  }

  static SOFTMAX2P_INLINE F32 Where(const std::uint8_t* where, F32 a, F32 b) {
    const std::uint32_t lanes[4] = {where[0], where[1], where[2], where[3]};
    return {vbslq_f32(vceqq_u32(vld1q_u32(lanes), vdupq_n_u32(0)), b.v, a.v)};
  }

  friend SOFTMAX2P_INLINE F32 WhereEqual(F32 x, F32 y, F32 a, F32 b) {
    return {vbslq_f32(vceqq_f32(x.v, y.v), a.v, b.v)};
  }

  friend SOFTMAX2P_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Fnma(F32 a, F32 b, F32 c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Fms(F32 a, F32 b, F32 c) { return {vfmaq_f32(vnegq_f32(c.v), a.v, b.v)}; }
  // Without vmaxq_f32, which returns NaN where either is.
  friend SOFTMAX2P_INLINE F32 Max(F32 a, F32 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F32 Floor(F32 a) { return {vrndmq_f32(a.v)}; }
  friend SOFTMAX2P_INLINE bool AnyGreater(F32 a, F32 b) { return vmaxvq_u32(vcgtq_f32(a.v, b.v)) != 0; }
  SOFTMAX2P_INLINE float ReduceMax() const { return vmaxvq_f32(v); }
  friend SOFTMAX2P_INLINE double ReduceSum(F32 hi, F32 lo) {
    const auto halves = [](F32 a) {
      return vaddq_f64(vcvt_f64_f32(vget_low_f32(a.v)), vcvt_high_f64_f32(a.v));
    };
    return vaddvq_f64(vaddq_f64(halves(hi), halves(lo)));
  }
  friend SOFTMAX2P_INLINE F32 ExponentFromLowBits(F32 a) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a.v), 23))};
  }

 private:
  static SOFTMAX2P_INLINE F32 Widen(uint16x4_t halves, const BFloat16*) {
    return {vreinterpretq_f32_u32(vshll_n_u16(halves, 16))};
  }
  static SOFTMAX2P_INLINE F32 Widen(uint16x4_t halves, const Float16*) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(halves))};
  }
  SOFTMAX2P_INLINE uint16x4_t Narrow(const BFloat16*) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    // Rounding may carry out of a NaN, which therefore becomes the usual one.
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
  }
  SOFTMAX2P_INLINE uint16x4_t Narrow(const Float16*) const { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
  static SOFTMAX2P_INLINE void Transpose(F32 (&r)[4]) {
    const float64x2_t even01 = vreinterpretq_f64_f32(vtrn1q_f32(r[0].v, r[1].v));
    const float64x2_t odd01 = vreinterpretq_f64_f32(vtrn2q_f32(r[0].v, r[1].v));
    const float64x2_t even23 = vreinterpretq_f64_f32(vtrn1q_f32(r[2].v, r[3].v));
    const float64x2_t odd23 = vreinterpretq_f64_f32(vtrn2q_f32(r[2].v, r[3].v));
    r[0].v = vreinterpretq_f32_f64(vzip1q_f64(even01, even23));
    r[1].v = vreinterpretq_f32_f64(vzip1q_f64(odd01, odd23));
    r[2].v = vreinterpretq_f32_f64(vzip2q_f64(even01, even23));
    r[3].v = vreinterpretq_f32_f64(vzip2q_f64(odd01, odd23));
  }
};

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 2;
  static constexpr int kTransposeRows = 2;
  static constexpr int kTableBits = 0;
  static constexpr bool kHasFma = true;
  static constexpr int kRegisters = 32;

  float64x2_t v;

  static SOFTMAX2P_INLINE F64 Broadcast(double x) { return {vdupq_n_f64(x)}; }
  static SOFTMAX2P_INLINE F64 Load(const double* p) { return {vld1q_f64(p)}; }
  static SOFTMAX2P_INLINE F64 LoadPartial(const double* p, int count, double fill) {
    const float64x2_t r = vdupq_n_f64(fill);
    return {count > 0 ? vld1q_lane_f64(p, r, 0) : r};
  }
  SOFTMAX2P_INLINE void Store(double* p) const { vst1q_f64(p, v); }
  SOFTMAX2P_INLINE void StorePartial(double* p, int count) const {
    if (count > 0) vst1q_lane_f64(p, v, 0);
  }
  SOFTMAX2P_INLINE void Stream(double* p) const { Store(p); }

  static SOFTMAX2P_INLINE void LoadTransposed(const double* p, std::int64_t stride, F64 (&columns)[2]) {
    const F64 first = Load(p), second = Load(p + stride);
    columns[0].v = vzip1q_f64(first.v, second.v);
    columns[1].v = vzip2q_f64(first.v, second.v);
  }
  static SOFTMAX2P_INLINE void StoreTransposed(const F64 (&columns)[2], double* p, std::int64_t stride) {
    vst1q_f64(p, vzip1q_f64(columns[0].v, columns[1].v));
    vst1q_f64(p + stride, vzip2q_f64(columns[0].v, columns[1].v));
  }

  static SOFTMAX2P_INLINE F64 Where(const std::uint8_t* where, F64 a, F64 b) {
    const std::uint64_t lanes[2] = {where[0], where[1]};
    return {vbslq_f64(vceqq_u64(vld1q_u64(lanes), vdupq_n_u64(0)), b.v, a.v)};
  }

  friend SOFTMAX2P_INLINE F64 WhereEqual(F64 x, F64 y, F64 a, F64 b) {
    return {vbslq_f64(vceqq_f64(x.v, y.v), a.v, b.v)};
  }

  friend SOFTMAX2P_INLINE F64 operator+(F64 a, F64 b) { return {vaddq_f64(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator-(F64 a, F64 b) { return {vsubq_f64(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator*(F64 a, F64 b) { return {vmulq_f64(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 operator/(F64 a, F64 b) { return {vdivq_f64(a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Fma(F64 a, F64 b, F64 c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Fnma(F64 a, F64 b, F64 c) { return {vfmsq_f64(c.v, a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Fms(F64 a, F64 b, F64 c) { return {vfmaq_f64(vnegq_f64(c.v), a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Max(F64 a, F64 b) { return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)}; }
  friend SOFTMAX2P_INLINE F64 Floor(F64 a) { return {vrndmq_f64(a.v)}; }
  friend SOFTMAX2P_INLINE bool AnyGreater(F64 a, F64 b) {
    return vmaxvq_u32(vreinterpretq_u32_u64(vcgtq_f64(a.v, b.v))) != 0;
  }
  SOFTMAX2P_INLINE double ReduceMax() const { return vmaxvq_f64(v); }
  friend SOFTMAX2P_INLINE F64 ExponentFromLowBits(F64 a) {
    return {vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(a.v), 52))};
  }
};

}  // namespace jax_softmax2p::neon
