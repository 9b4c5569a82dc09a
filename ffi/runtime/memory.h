// The caches of this machine, and hints about memory to its operating system.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_softmax2p {

// The sizes in bytes of the caches that one core reaches: its own second-level cache, and the last one before
// memory. Common sizes where the system does not say.
std::int64_t SecondLevelCacheBytes();
std::int64_t LastLevelCacheBytes();

// Asks for huge pages under a large buffer that is about to be written for the first time. It has no effect
// where the system has none, or where the pages exist already.
void AdviseHugePages(void* data, std::size_t bytes);

// Makes this thread's non-temporal stores visible to other threads before its later stores.
void FenceNonTemporalStores();

}  // namespace jax_softmax2p
