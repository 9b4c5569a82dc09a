// The hot loops alone, for llvm-mca: benchmarks/llvm_mca.py compiles this to assembly for every instruction
// set.

#if defined(__AVX512F__)
#include "ffi/simd/avx512.h"
namespace simd = jax_softmax2p::avx512;
#elif defined(__AVX2__)
#include "ffi/simd/avx2.h"
namespace simd = jax_softmax2p::avx2;
#else
#include "ffi/simd/neon.h"
namespace simd = jax_softmax2p::neon;
#endif

#include <cstdint>

#include "ffi/kernels/passes.h"

namespace jax_softmax2p {

// What lies between is one turn of a loop, of kUnroll vectors.
#define BEGIN(name) __asm__ volatile("# LLVM-MCA-BEGIN " name::: "memory")
#define END __asm__ volatile("# LLVM-MCA-END" ::: "memory")
#define FOR_GROUPS for (std::int64_t i = 0; i < groups * kUnroll * V::kLanes; i += kUnroll * V::kLanes)

template <typename V>
struct Loops {
  using T = typename V::Scalar;

  static SOFTMAX2P_INLINE void Maximum(const T* x, std::int64_t groups, V (&most)[kUnroll]) {
    FOR_GROUPS {
      BEGIN("maximum");
      SOFTMAX2P_UNROLL for (int k = 0; k < kUnroll; ++k) most[k] =
          Max(V::Load(x + i + k * V::kLanes), most[k]);
      END;
    }
  }

  template <typename Kept>
  static SOFTMAX2P_INLINE void Pass1(const T* x, Kept kept, std::int64_t groups, LaneAccumulator<V>& out) {
    LaneAccumulator<V> sum = out;
    const Recompute<V, Identity> source(sum.reference(), Identity{});
    FOR_GROUPS {
      if constexpr (std::is_same_v<Kept, Discard>) {
        BEGIN("pass 1, keeping nothing");
      } else {
        BEGIN("pass 1");
      }
      AddVectors<kUnroll>(FullVector<V>{}, x + i, kept + i, kAdjacent<V>, Ahead<256>{}, source, sum);
      END;
    }
    out = sum;
  }

  static SOFTMAX2P_INLINE void Pass2(const T* x, const T* kept, T* y, std::int64_t groups, V hi, V lo,
                                     V reference) {
    const SoftmaxScaler<V> scaler{hi, lo};
    const Reload<V> reload(reference);
    FOR_GROUPS {
      BEGIN("pass 2");
      const auto write = [&](const auto& source, const T* from, auto mantissas) {
        WriteVectors<kUnroll, V>(FullVector<V>{}, FullVector<V>{}, source, from, mantissas, y + i,
                                 kAdjacent<V>, kAdjacent<V>, WriteAhead{}, scaler);
      };
      if constexpr (kTakesValues<V>) {
        write(KeptValues<V>{}, kept + i, Discard{});
      } else {
        write(reload, x + i, kept + i);
      }
      END;
    }
  }

  static SOFTMAX2P_INLINE void Pass2Recomputing(const T* x, T* y, std::int64_t groups, V hi, V lo,
                                                V reference) {
    const SoftmaxScaler<V> scaler{hi, lo};
    const Recompute<V, Identity> source(reference, Identity{});
    FOR_GROUPS {
      BEGIN("pass 2, recomputing");
      WriteVectors<kUnroll, V>(FullVector<V>{}, FullVector<V>{}, source, x + i, Discard{}, y + i,
                               kAdjacent<V>, kAdjacent<V>, WriteAhead{}, scaler);
      END;
    }
  }
};

#define DEFINE_LOOPS(V, T)                                                                        \
  void Maximum##V(const T* x, std::int64_t groups, simd::V(&most)[kUnroll]) {                     \
    Loops<simd::V>::Maximum(x, groups, most);                                                     \
  }                                                                                               \
  void Pass1##V(const T* x, T* kept, std::int64_t groups, LaneAccumulator<simd::V>& sum) {        \
    Loops<simd::V>::Pass1(x, kept, groups, sum);                                                  \
  }                                                                                               \
  void Pass1Alone##V(const T* x, std::int64_t groups, LaneAccumulator<simd::V>& sum) {            \
    Loops<simd::V>::Pass1(x, Discard{}, groups, sum);                                             \
  }                                                                                               \
  void Pass2##V(const T* x, const T* kept, T* y, std::int64_t groups, const simd::V(&scale)[3]) { \
    Loops<simd::V>::Pass2(x, kept, y, groups, scale[0], scale[1], scale[2]);                      \
  }                                                                                               \
  void Pass2Recomputing##V(const T* x, T* y, std::int64_t groups, const simd::V(&scale)[3]) {     \
    Loops<simd::V>::Pass2Recomputing(x, y, groups, scale[0], scale[1], scale[2]);                 \
  }

#ifdef DOUBLE
DEFINE_LOOPS(F64, double)
#else
DEFINE_LOOPS(F32, float)
#endif

}  // namespace jax_softmax2p
