// The kernels of every instruction set: one source each in this folder, listed best first in
// runtime/dispatch.cc.
#pragma once

#include "ffi/kernels/table.h"

namespace jax_softmax2p {

extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kNeonKernels;
extern const Kernels kPortableKernels;

}  // namespace jax_softmax2p
