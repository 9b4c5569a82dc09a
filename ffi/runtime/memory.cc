#include "ffi/runtime/memory.h"

#include <unistd.h>

#include <fstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jax_softmax2p {

namespace {

// The size that Linux tells; else that of the C library, whose answer on AMD is the whole package's and not
// what one core reaches; else a common size.
std::int64_t CacheBytes(int level, int name, std::int64_t otherwise) {
  std::ifstream size("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(level) + "/size");
  std::int64_t kibibytes = 0;
  char unit = 0;
  if (size >> kibibytes >> unit && unit == 'K' && kibibytes > 0) return kibibytes << 10;
  const long bytes = name == 0 ? 0 : sysconf(name);
  return bytes > 0 ? bytes : otherwise;
}

#if defined(_SC_LEVEL3_CACHE_SIZE)
constexpr int kLevel2 = _SC_LEVEL2_CACHE_SIZE, kLevel3 = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kLevel2 = 0, kLevel3 = 0;
#endif

}  // namespace

std::int64_t SecondLevelCacheBytes() {
  static const std::int64_t bytes = CacheBytes(2, kLevel2, std::int64_t{1} << 20);
  return bytes;
}

std::int64_t LastLevelCacheBytes() {
  static const std::int64_t bytes = CacheBytes(3, kLevel3, std::int64_t{32} << 20);
  return bytes;
}

void AdviseHugePages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  // Time to touch every page of a fresh buffer, in 4 KiB pages and in huge ones (Zen 5, median of 9): 4
  // MiB 1.17 and 0.06 ms, 32 MiB 9.8 and 1.1 ms, 256 MiB 77 and 11 ms. A smaller buffer may hold no huge
  // page.
  constexpr std::size_t kWorthwhile = 2 * kHugePage;
  if (bytes < kWorthwhile) return;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t last = (begin + bytes) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void FenceNonTemporalStores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace jax_softmax2p
