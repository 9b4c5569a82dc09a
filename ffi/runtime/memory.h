// What the memory of this machine is like, and hints to its system.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_softmax2p {

// Sizes of the caches that one core reaches, in bytes: its own second-level one, and the last before memory.
// Common sizes where the system does not say.
std::int64_t SecondLevelCacheBytes();
std::int64_t LastLevelCacheBytes();

// Asks for huge pages under a large buffer that is about to be written for the first time. A hint: no
// effect where the system has none, or where the pages are there already.
void AdviseHugePages(void* data, std::size_t bytes);

// Makes this thread's stores past the caches visible to others before its later stores.
void FenceNonTemporalStores();

}  // namespace jax_softmax2p
