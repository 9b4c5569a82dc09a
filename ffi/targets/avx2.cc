#include "ffi/simd/avx2.h"

#include "ffi/targets/make_kernels.h"
#include "ffi/targets/targets.h"

namespace jax_softmax2p {

constexpr Kernels kAvx2Kernels = MakeKernels<avx2::F32, avx2::F64>("avx2");

}  // namespace jax_softmax2p
