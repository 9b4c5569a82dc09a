// Fills an instruction set's table from the kernel templates. Included by one source per instruction set.
#pragma once

#include "ffi/kernels/jacobian.h"
#include "ffi/kernels/softmax.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

template <typename V>
constexpr KernelTable<typename V::Scalar> MakeKernelTable() {
  KernelTable<typename V::Scalar> table{};
  table.max_exponent = ReductionFor<V>::kMaxExponent;
  table.max = SoftmaxRow<V>::Maximum;
  table.sum = SoftmaxRow<V>::Sum;
  table.sum_less_maximum = SoftmaxRow<V>::SumLessMaximum;
  table.write = SoftmaxRow<V>::Write;
  table.dot = JacobianRow<V>::Dot;
  table.jacobian_write = JacobianRow<V>::Write;
  return table;
}

// constexpr, so that no code compiled for an instruction set runs while the library loads.
template <typename F32, typename F64>
constexpr Kernels MakeKernels(const char* name) {
  return {name, MakeKernelTable<F32>(), MakeKernelTable<F64>()};
}

}  // namespace jax_softmax2p
