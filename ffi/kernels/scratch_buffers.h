// Several buffers in one piece of scratch memory.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/base/layout.h"

namespace jax_softmax2p {

// Buffers in scratch memory, each of which begins at a cache line. The memory itself need not.
template <typename T, int count>
class ScratchBuffers {
 public:
  SOFTMAX2P_INLINE std::int64_t total() const { return total_; }
  SOFTMAX2P_INLINE T* At(T* aligned_scratch, int i) const { return aligned_scratch + at_[i]; }

  static SOFTMAX2P_INLINE T* Aligned(T* scratch) { return scratch + ElementsToAlignment<kAlign>(scratch); }

 protected:
  // `sizes` are in elements.
  SOFTMAX2P_INLINE void Allot(const std::int64_t (&sizes)[count]) {
    for (int i = 0; i < count; ++i) {
      at_[i] = total_ - kAlign;
      total_ += RoundUp(sizes[i], kAlign);
    }
  }

 private:
  static constexpr int kAlign = 64 / sizeof(T);
  std::int64_t at_[count];
  std::int64_t total_ = kAlign;
};

}  // namespace jax_softmax2p
