// Fills an instruction set's table from the kernel templates. Included by one source per instruction set.
#pragma once

#include "ffi/kernels/attention.h"
#include "ffi/kernels/attention_few.h"
#include "ffi/kernels/attention_gradient.h"
#include "ffi/kernels/gemm.h"
#include "ffi/kernels/jacobian.h"
#include "ffi/kernels/panel_jacobian.h"
#include "ffi/kernels/panels.h"
#include "ffi/kernels/row_split_sum.h"
#include "ffi/kernels/rows.h"
#include "ffi/kernels/scale_bias_mask.h"
#include "ffi/kernels/small_jacobian.h"
#include "ffi/kernels/small_logsumexp.h"
#include "ffi/kernels/small_softmax.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

template <typename V, typename E>
constexpr KernelTable<E> MakeKernelTable() {
  using T = typename V::Scalar;
  using Rows = RowKernels<V, E>;
  using Panels = PanelKernels<V, E>;
  using PanelJacobian = PanelJacobianKernels<V, E>;
  using Small = SmallSoftmaxKernels<V, E>;
  using SmallLse = SmallLogSumExpKernels<V>;
  using Jacobian = JacobianKernels<V, E>;
  KernelTable<E> table{};
  table.factor = kFactor<V>;
  table.max_exponent = ReductionFor<V>::kMaxExponent;
  table.lanes = V::kLanes;
  table.exponentials = Rows::Exponentials;
  table.row_max = Rows::Maximum;
  table.row_sum = Rows::Sum;
  table.row_split_sum = RowSplitSumKernels<V, E>::Sum;
  table.row_write = Rows::template Write<E>;
  table.row_write_log = Rows::template WriteLog<E>;
  table.block_rows = Rows::BlockRows;
  table.apply_scale_bias_mask = ScaleBiasMaskKernel<V, E>::Apply;
  table.logits_row_write = Rows::template Write<T>;
  table.logits_row_write_log = Rows::template WriteLog<T>;
  table.panel_apply = ScaleBiasMaskKernel<V, E>::ApplyToPanel;
  table.panel_max = Panels::Maximum;
  table.panel_sum = Panels::Sum;
  table.panel_merge = Panels::Merge;
  table.panel_invert = Panels::Invert;
  table.panel_lse = Panels::Lse;
  table.panel_lse_of_others = Panels::LseOfOthers;
  table.panel_scales = Panels::Scales;
  table.panel_write = Panels::Write;
  table.logits_panel_write = Panels::WriteLogits;
  table.panel_minus_lse = Panels::MinusLse;
  table.panel_dot = PanelJacobian::Dot;
  table.panel_sum_terms = PanelJacobian::Sum;
  table.panel_dot_minus_lse = PanelJacobian::DotMinusLse;
  table.panel_add_dots = PanelJacobian::Add;
  table.panel_jacobian_write = PanelJacobian::Write;
  table.panel_subtract_minus_lse = PanelJacobian::SubtractMinusLse;
  table.small_matrices = Small::template Matrices<E>;
  table.logits_small_matrices = Small::template Matrices<T>;
  table.small_columns = Small::Columns;
  table.small_columns_lse = SmallLse::template ColumnsLse<E>;
  table.small_columns_minus_lse = SmallLse::template ColumnsMinusLse<E>;
  table.small_lse = SmallLse::template Lse<E>;
  table.small_minus_lse = SmallLse::template MinusLse<E, E>;
  table.logits_small_minus_lse = SmallLse::template MinusLse<T, E>;
  table.labels_minus_lse = SmallLse::template LabelsMinusLse<E>;
  table.small_subtract_minus_lse = SmallLse::template SubtractMinusLse<E, E>;
  table.logits_small_subtract_minus_lse = SmallLse::template SubtractMinusLse<T, E>;
  table.long_row = SmallJacobianKernels<V, E>::kLongRow;
  table.small_jacobian_write = SmallJacobianKernels<V, E>::Write;
  table.dot = Jacobian::template Dot<E>;
  table.logits_dot = Jacobian::template Dot<T>;
  table.sum = Jacobian::Sum;
  table.subtract = Jacobian::Subtract;
  table.jacobian_write = Jacobian::Write;
  using Attention = AttentionKernels<V, E>;
  table.attention_columns = Gemm<V>::kColumns;
  table.attention_scratch = Attention::Scratch;
  table.attention = Attention::Attend;
  using FewQueries = FewQueriesKernels<V, E>;
  table.attention_few_rows = FewQueries::kMaxRows;
  table.attention_few_size = FewQueries::PartialSize;
  table.attention_few_scratch = FewQueries::Scratch;
  table.attention_few = FewQueries::AttendKeys;
  table.attention_few_combine = FewQueries::Combine;
  using AttentionGradient = AttentionGradientKernels<V, E>;
  table.attention_gradient_scratch = AttentionGradient::Scratch;
  table.attention_gradient = AttentionGradient::Compute;
  table.product_scratch = Gemm<V>::ProductScratch;
  table.product = Gemm<V>::Product;
  return table;
}

// constexpr, so that no code compiled for an instruction set runs while the library loads.
template <typename F32, typename F64>
constexpr Kernels MakeKernels(const char* name) {
  return {name, MakeKernelTable<F32, float>(), MakeKernelTable<F64, double>(),
          MakeKernelTable<F32, BFloat16>(), MakeKernelTable<F32, Float16>()};
}

}  // namespace jax_softmax2p
