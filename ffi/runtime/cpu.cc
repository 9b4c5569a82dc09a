#include "ffi/runtime/cpu.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace jax_softmax2p {
namespace {

#if defined(__x86_64__)

constexpr bool HasAll(std::uint64_t value, std::uint64_t bits) { return (value & bits) == bits; }

// The register states that the operating system saves. A CPU may have AVX where the system, or the settings
// of a virtual machine, do not allow it.
std::uint64_t EnabledStates() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

CpuFeatures Detect() {
  // Bit numbers: Intel 64 and IA-32 Architectures Software Developer's Manual, CPUID and XGETBV.
  constexpr std::uint64_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr std::uint64_t kAvx2 = 1u << 5;
  constexpr std::uint64_t kAvx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  constexpr std::uint64_t kYmmState = 0x6, kZmmState = 0xe6;

  CpuFeatures features;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return features;
  if (!HasAll(ecx, kFma | kOsxsave | kAvx | kF16c)) return features;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  const std::uint64_t states = EnabledStates();
  features.avx2 = HasAll(ebx, kAvx2) && HasAll(states, kYmmState);
  features.avx512 = features.avx2 && HasAll(ebx, kAvx512) && HasAll(states, kZmmState);
  return features;
}

#else

CpuFeatures Detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& Cpu() {
  static const CpuFeatures features = Detect();
  return features;
}

}  // namespace jax_softmax2p
