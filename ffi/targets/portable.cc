#include "ffi/simd/portable.h"

#include "ffi/targets/make_kernels.h"
#include "ffi/targets/targets.h"

namespace jax_softmax2p {

constexpr Kernels kPortableKernels = MakeKernels<portable::F32, portable::F64>("portable");

}  // namespace jax_softmax2p
