#include "tests/selftest/faults.h"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <new>

namespace jax_softmax2p {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

std::atomic<std::int64_t> first_to_fail{kNever}, count{0};
std::atomic<bool> all_from{false};
thread_local int exemptions = 0;

bool Fails() {
  const std::int64_t first = first_to_fail.load();
  if (first == kNever || exemptions != 0) return false;
  const std::int64_t k = count.fetch_add(1);
  return k == first || (k > first && all_from.load());
}

void* Allocate(std::size_t size, std::size_t alignment) noexcept {
  if (Fails()) return nullptr;
  if (alignment <= alignof(std::max_align_t)) return std::malloc(size == 0 ? 1 : size);
  return std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
}

void* AllocateOrThrow(std::size_t size, std::size_t alignment) {
  void* const memory = Allocate(size, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

AllocationFault::AllocationFault(Failing failing, std::int64_t k) {
  count = 0;
  all_from = failing == Failing::kAllFrom;
  first_to_fail = k;
}
AllocationFault::~AllocationFault() { first_to_fail = kNever; }
bool AllocationFault::Injected() const { return count > first_to_fail; }

ExemptFromFaults::ExemptFromFaults() { ++exemptions; }
ExemptFromFaults::~ExemptFromFaults() { --exemptions; }

}  // namespace jax_softmax2p

// All forms are replaced: those of a sanitizer would not call these.
using jax_softmax2p::Allocate;
using jax_softmax2p::AllocateOrThrow;
void* operator new(std::size_t size) { return AllocateOrThrow(size, 1); }
void* operator new[](std::size_t size) { return AllocateOrThrow(size, 1); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return Allocate(size, 1); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return Allocate(size, 1); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return AllocateOrThrow(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return AllocateOrThrow(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
