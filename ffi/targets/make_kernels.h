// Fills an instruction set's table from the kernel templates. Included by one source per instruction set.
#pragma once

#include "ffi/kernels/jacobian.h"
#include "ffi/kernels/pack.h"
#include "ffi/kernels/scale_bias_mask.h"
#include "ffi/kernels/softmax.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

template <typename V, typename E>
constexpr KernelTable<E> MakeKernelTable() {
  using Softmax = SoftmaxKernels<V, E>;
  KernelTable<E> table{};
  table.max_exponent = ReductionFor<V>::kMaxExponent;
  table.lanes = V::kLanes;
  table.exponential = Softmax::Exponential;
  table.row_max = Softmax::RowMaximum;
  table.row_sum = Softmax::Sum;
  table.row_write = Softmax::template RowWrite<E>;
  table.row_write_log = Softmax::template RowWriteLog<E>;
  table.apply_scale_bias_mask = ScaleBiasMaskKernel<V, E>::ApplyScaleBiasMask;
  table.logits_row_write = Softmax::template RowWrite<typename V::Scalar>;
  table.logits_row_write_log = Softmax::template RowWriteLog<typename V::Scalar>;
  table.logits_small_matrices = Softmax::template SmallMatrices<typename V::Scalar>;
  table.panel_max = Softmax::PanelMaximum;
  table.panel_sum = Softmax::PanelSum;
  table.panel_merge = Softmax::PanelMerge;
  table.panel_invert = Softmax::PanelInvert;
  table.panel_write = Softmax::PanelWrite;
  table.small_matrices = Softmax::template SmallMatrices<E>;
  table.small_lse = Softmax::template SmallLse<E>;
  table.small_less = Softmax::template SmallLess<E>;
  table.logits_small_less = Softmax::template SmallLess<typename V::Scalar>;
  table.small_columns = Softmax::SmallColumns;
  table.pack_columns = PackKernels<V, E>::Pack;
  table.unpack_columns = PackKernels<V, E>::Unpack;
  table.dot = JacobianRow<V, E>::template Dot<E>;
  table.logits_dot = JacobianRow<V, E>::template Dot<typename V::Scalar>;
  table.total = JacobianRow<V, E>::Total;
  table.less = JacobianRow<V, E>::Less;
  table.jacobian_write = JacobianRow<V, E>::Write;
  return table;
}

// constexpr, so that no code compiled for an instruction set runs while the library loads.
template <typename F32, typename F64>
constexpr Kernels MakeKernels(const char* name) {
  return {name, MakeKernelTable<F32, float>(), MakeKernelTable<F64, double>(),
          MakeKernelTable<F32, BFloat16>(), MakeKernelTable<F32, Float16>()};
}

}  // namespace jax_softmax2p
