// The floating-point mode in which kernels run.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace jax_softmax2p {

// For its lifetime the thread rounds to nearest, masks exceptions, and reads and writes subnormals as zero.
// XLA's threads flush subnormals and others do not; a row must have the same bits on either. The destructor
// restores the mode that was found.
class ScopedFloatMode {
 public:
#if defined(__x86_64__)
  ScopedFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(kFlushing); }
  ~ScopedFloatMode() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushing = 0x1f80 | 0x8000 | 0x0040;  // masks, flush-to-zero, denormals-are-zero
  unsigned saved_;
#elif defined(__aarch64__)
  ScopedFloatMode() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(kFlushing));
  }
  ~ScopedFloatMode() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  static constexpr unsigned long kFlushing = 1ul << 24;
  unsigned long saved_;
#else
  ScopedFloatMode() {}
#endif

 public:
  ScopedFloatMode(const ScopedFloatMode&) = delete;
  ScopedFloatMode& operator=(const ScopedFloatMode&) = delete;
};

}  // namespace jax_softmax2p
