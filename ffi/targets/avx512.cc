#include "ffi/simd/avx512.h"

#include "ffi/targets/make_kernels.h"
#include "ffi/targets/targets.h"

namespace jax_softmax2p {

constexpr Kernels kAvx512Kernels = MakeKernels<avx512::F32, avx512::F64>("avx512");

}  // namespace jax_softmax2p
