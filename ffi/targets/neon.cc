#include "ffi/simd/neon.h"

#include "ffi/targets/make_kernels.h"
#include "ffi/targets/targets.h"

namespace jax_softmax2p {

constexpr Kernels kNeonKernels = MakeKernels<neon::F32, neon::F64>("neon");

}  // namespace jax_softmax2p
