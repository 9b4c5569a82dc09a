"""What the primitives of attention share: the roles of their operands, their batching and their lowering.

Their operands are query (B, T, N, H), key (B, S, K, H), value (B, S, K, H') and scale, one element; perhaps
others of four dimensions; then, as the parameter ``names`` tells, bias and mask, which broadcast to (B, N, T,
S), int32 lengths of queries and keys of shape (B,), a mask of dropout, which broadcasts as bias does, and
sinks (B, 1, N, 1). The batch of all but the lengths may be 1.

Weights that the mask of dropout does not keep become 0. The others stay as they are: the caller divides the
output by the probability with which weights are kept.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

from jax_softmax2p.primitives import attention_partitioning
from jax_softmax2p.primitives.collectives import as_axis_names
from jax_softmax2p.primitives.dispatch import Choice, forced_choice
from jax_softmax2p.primitives.operands import limits_of_band
from jax_softmax2p.primitives.registration import KernelLowering

Array = jax.Array
Role = attention_partitioning.Role

OPERAND_NAMES = ("bias", "mask", "query_lengths", "key_lengths", "dropout_mask", "sinks")
"""The operands that come last, in their order; their places are the bits of the FFI attribute."""

PARAMS = ("names", "band", "soft_cap", "return_lse", "implementation")
"""The primitives' parameters. Without return_lse, the lse means nothing."""

MIN_WORK_IN_LOOPS = 256
"""From how many multiply-adds on a kernel is faster in loops; elsewhere it always is.

jax.nn's time by that of the kernel, and by that of the composed function, forward, in a scan, on a Zen 3, for
(B, T, N, H) and a number of keys: (1, 4, 1, 4), 8 keys (256 multiply-adds) 0.83 and 0.71; (1, 2, 1, 8),
8 keys 0.97 and 0.94; (1, 2, 2, 8), 8 keys 1.26 to 1.61 and 0.88; (1, 2, 2, 8), 16 keys 1.63 and 0.88;
(1, 8, 2, 8), 8 keys 0.71 to 0.81 and 0.49; (1, 8, 4, 16), 32 keys 1.05 and 1.02.
"""

MIN_WORK_OF_ONE_QUERY_IN_LOOPS = 16384
"""The same where one query attends to a head of keys: XLA fuses its products with what surrounds them.

As above: (1, 1, 1, 4), 4 keys (32 multiply-adds) 0.12 and 0.92; (1, 1, 2, 8), 8 keys 0.32 and 0.95;
(1, 1, 8, 8), 8 keys 0.51 and 1.45; (1, 1, 8, 16), 16 keys 0.87 and 1.55; (1, 1, 8, 8), 32 keys 0.71 and 0.85;
(1, 1, 8, 16), 32 keys 0.90 and 1.18; (1, 1, 8, 32), 32 keys (16,384 multiply-adds) 1.40 and 1.46.
"""

ARRAY: Role = ("batch", None, "heads", None)
LOGITS: Role = ("batch", "heads", None, None)
_LENGTHS: Role = ("batch",)
_ROLES = dict(zip(OPERAND_NAMES, (LOGITS, LOGITS, _LENGTHS, _LENGTHS, LOGITS, ARRAY), strict=True))


def roles_of(names: Sequence[str], *num_leading: int) -> tuple[Role, ...]:
    """Which dimensions of the operands are those of batch and heads.

    Args:
      names: the parameter.
      num_leading: how many arrays there are before scale, and after it, and before the named ones: 3, and 3
        (output, lse and a cotangent) in a derivative.
    """
    before, after = num_leading
    return (ARRAY,) * before + ((None,),) + (ARRAY,) * after + tuple(_ROLES[name] for name in names)


def batch_of(operands: Sequence[Any], roles: Sequence[Role]) -> int:
    """The size of the batch, which is that of the results: that of some operands may be 1."""
    return _broadcast_size(x.shape[0] for x, role in zip(operands, roles, strict=True) if role[0] == "batch")


def _broadcast_size(sizes: Iterable[int]) -> int:
    """That of a dimension whose arrays have these sizes: 1 beside 0 is 0."""
    return next((size for size in sizes if size != 1), 1)


def batch_entry(operands: Sequence[ShapedArray], roles: Sequence[Role]) -> Any:
    """How the batch of the results is sharded, where that is explicit: as that of any operand."""
    entries = (x.sharding.spec[0] for x, role in zip(operands, roles, strict=True) if role[0] == "batch")
    return next((entry for entry in entries if entry is not None), None)


def fold_batch(
    operands: Sequence[Array], dims: Sequence[int | None], roles: Sequence[Role], *, broadcast: bool
) -> tuple[list[Array], Callable[[Array], Array]]:
    """The operands with the dimension that is batched made a part of their batch, and what splits results.

    Args:
      operands: the primitive's.
      dims: the dimension of each that is batched, or None.
      roles: those of the operands.
      broadcast: whether arrays may not have a batch of 1 beside others.
    """
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    shapes = [
        x.shape if dim is None else x.shape[:dim] + x.shape[dim + 1 :]
        for x, dim in zip(operands, dims, strict=True)
    ]
    batch = _broadcast_size(shape[0] for shape, role in zip(shapes, roles, strict=True) if role[0] == "batch")
    specs = [jax.typeof(x).sharding.spec for x in operands]
    mapped = [spec[dim] for spec, dim in zip(specs, dims, strict=True) if dim is not None]
    entry = next((found for found in mapped if found is not None), None)

    def fold(x: Array, dim: int | None, role: Role) -> Array:
        if role[0] != "batch" or (dim is None and x.shape[0] == 1 and role != _LENGTHS and not broadcast):
            return x
        x = x[None] if dim is None else jnp.moveaxis(x, dim, 0)
        x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
        spec = jax.typeof(x).sharding.spec
        if spec[0] != entry:
            taken = as_axis_names(entry)
            rest = (None if set(taken) & set(as_axis_names(other)) else other for other in spec[1:])
            x = jax.sharding.reshard(x, PartitionSpec(entry, *rest))
        return x.reshape(size * batch, *x.shape[2:])

    folded = [fold(x, dim, role) for x, dim, role in zip(operands, dims, roles, strict=True)]
    return folded, lambda x: x.reshape(size, batch, *x.shape[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLowering(KernelLowering):
    """How they are lowered.

    Attributes:
      num_leading: as in :func:`roles_of`.
      min_rows: from how many queries that share a head of keys on the kernel is faster.
    """

    num_leading: tuple[int, int] = (3, 0)
    min_rows: int = 0

    def choose_on_device(self, avals: Sequence[Any], params: Mapping[str, Any], *, on_cpu: bool) -> Choice:
        """By the number of multiply-adds, and of queries."""
        forced = forced_choice(params["implementation"], avals[0], on_cpu=on_cpu)
        if forced is not None:
            return forced
        query, key, value = avals[:3]
        rows = query.shape[1] * query.shape[2] // key.shape[2]
        if rows < self.min_rows:
            return Choice("reference", f"{rows} queries: from {self.min_rows} on a kernel is faster")
        in_loop = params["implementation"] == "in_loop"
        min_in_loop = MIN_WORK_OF_ONE_QUERY_IN_LOOPS if rows == 1 else MIN_WORK_IN_LOOPS
        least = min_in_loop if in_loop else 0
        batch = batch_of(avals, roles_of(params["names"], *self.num_leading))
        work = batch * rows * math.prod(key.shape[1:3]) * (query.shape[3] + value.shape[3])
        reason = f"{work} multiply-adds{' in a loop' * in_loop}: from {least} on a kernel is faster"
        return Choice("native" if work >= least else "reference", reason)

    def is_composed(self, ctx: mlir.LoweringRuleContext, params: Mapping[str, Any]) -> bool:
        """Never: kernels take all operands."""
        return False

    def result_roles(self, params: Mapping[str, Any]) -> tuple[Role, ...]:
        """The roles of the results."""
        return ARRAY, ARRAY

    def lower_sharded(
        self, primitive: Primitive, ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any
    ) -> Sequence[Any]:
        """By batch and heads."""
        roles = roles_of(params["names"], *self.num_leading)
        return attention_partitioning.lower(
            primitive, roles, self.result_roles(params), ctx, *operands, **params
        )

    def ffi_attributes(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Which operands there are, the band, and the soft cap; a limit of -1 is none, as is a cap of 0."""
        operands = sum(1 << OPERAND_NAMES.index(name) for name in params["names"])
        return {
            "operands": np.int64(operands),
            "soft_cap": np.float64(params["soft_cap"] or 0),
        } | limits_of_band(params["band"])
