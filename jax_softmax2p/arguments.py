"""What users pass, checked and brought into the form that the primitives take."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_softmax2p.primitives import collectives
from jax_softmax2p.primitives.collectives import AxisNames
from jax_softmax2p.primitives.dispatch import (
    Implementation,
    as_implementation,
    check_native_support,
    choose_path,
)
from jax_softmax2p.primitives.operands import OPERAND_FLAGS, Band, OperandSpec, operand_mask
from jax_softmax2p.primitives.row_bias import apply_invariant_bias
from jax_softmax2p.reference import ScaleBiasMask, compute_dtype

Array = jax.Array
Axis = int | Sequence[int] | None
Where = jax.typing.ArrayLike | Band | None
Bias = jax.typing.ArrayLike | tuple[jax.typing.ArrayLike, ...] | None


@dataclasses.dataclass(frozen=True)
class Logits:
    """Arguments of a softmax of whatever kind, ready for a primitive.

    Attributes:
      operands: x with the axes merged into one, then scale, bias and where if they are given, of x's rank.
      axis: of the merged x, negative.
      spec: which operands there are, and the band.
      implementation: as users passed it.
      axes: those over which to normalise, negative and ascending, of x as it was passed.
      shape: of x as it was passed.
      partition: how x as it was passed is sharded, where that is explicit.
      dtype: of results.
      axis_name: the mesh axes over which the axis is sharded, if it is.
      row_biases: what is to be added to the lse of the operands, in its dtype: arrays of the merged x's rank
        that broadcast to it, of size 1 along the axis.
    """

    operands: tuple[Array, ...]
    axis: int
    spec: OperandSpec
    implementation: Implementation | None
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    partition: PartitionSpec
    dtype: np.dtype
    axis_name: tuple[str, ...] | None = None
    row_biases: tuple[Array, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that the primitives have in common."""
        return {"axis": self.axis, "spec": self.spec, "implementation": self.implementation}

    def reference_operands(self) -> tuple[Array, ScaleBiasMask[Array]]:
        """The merged x and what is applied to it, as functions of ``reference`` take them."""
        return self.operands[0], self.spec.unpack_with_band(self.operands)

    def merge(self, y: Array) -> Array:
        """An array of the shape of x as it was passed, with the axes merged as those of x are."""
        return merge_axes(y, self.axes)[0]

    def restore(self, y: Array) -> Array:
        """A result of the merged x's shape, in the shape and dtype that users expect."""
        if len(self.axes) != 1:
            moved = y.reshape(*y.shape[:-1], *(self.shape[a] for a in self.axes))
            y = jnp.moveaxis(moved, range(-len(self.axes), 0), self.axes)
            if jax.typeof(y).sharding.spec != self.partition:
                y = jax.sharding.reshard(y, self.partition)
        return y.astype(self.dtype)

    def restore_reduced(self, y: Array, keepdims: bool) -> Array:
        """The same for a result without the axes."""
        y = y.astype(self.dtype)
        if not keepdims:
            return y
        return jnp.expand_dims(y, tuple(a + len(self.shape) for a in self.axes))


def as_logits(
    x: jax.typing.ArrayLike,
    axis: Axis,
    where: Where,
    *,
    scale: jax.typing.ArrayLike | None = None,
    bias: Bias = None,
    splits_bias: bool = True,
    band: Band | None = None,
    axis_name: AxisNames | None = None,
    implementation: str | None,
    shift_invariant: bool = True,
    name: str = "x",
) -> Logits:
    """Checks the arguments that softmaxes have in common.

    Args:
      x: as in the public functions.
      axis: as in the public functions.
      where: as in the public functions.
      scale: as in the public functions.
      bias: as in the public functions.
      splits_bias: whether biases of rows may become ``row_biases``.
      band: a mask besides ``where``, if that is an array.
      axis_name: as in the public functions.
      implementation: as in the public functions.
      shift_invariant: whether the result does not change with a constant added to a row. The maximum of
        integers is subtracted then, which they do exactly and floats may not, and biases of rows only matter
        where they are not finite.
      name: what the public function calls x.

    Raises:
      TypeError, ValueError: as the public functions say.
    """
    chosen = as_implementation(implementation)
    x = as_numeric_array(x, name)
    if axis_name is not None:
        axis_name = as_axis_name(axis_name)
        if jnp.iscomplexobj(x):
            raise TypeError(f"{name} must be real where axis_name is given, got dtype {x.dtype}")
    axes = canonical_axes(axis, x.ndim)
    if isinstance(where, Band):
        where, band = None, where
    if band is not None:
        _check_band(x, axes, name)
    mask = None if where is None else as_mask(where, x.shape, name)
    scale, biases, promoted = _as_operands(x, axes, scale, bias, name)
    is_only_shifted = shift_invariant and scale is None and not biases and axis_name is None
    if is_only_shifted and jnp.issubdtype(x.dtype, jnp.integer):
        x = _relative_to_maximum(x, axes, operand_mask(x.shape, mask, band))
    # That of the formula, jnp.exp(x * scale + bias).
    dtype = jax.eval_shape(jnp.exp, jax.ShapeDtypeStruct((), promoted or x.dtype)).dtype
    wide = jnp.float32 if _is_narrower_than_16_bits(dtype) else dtype
    x = x.astype(wide)
    check_native_support(chosen, x.dtype)
    computed = compute_dtype(wide)
    row_biases: list[Array] = []
    if isinstance(bias, tuple):
        biases = [_with_rank(term, x.ndim).astype(computed) for term in biases]
        if splits_bias and choose_path(chosen, axis_name) == "primitive" and not jnp.iscomplexobj(x):
            row_biases = [term for term in biases if _is_of_rows(term, axes)]
            biases = [term for term in biases if not _is_of_rows(term, axes)]
    merged, merged_axis = merge_axes(x, axes)
    named = {
        "scale": None if scale is None else scale.astype(computed),
        "bias": sum(biases[1:], biases[0]).astype(wide) if biases else None,
        "where": mask,
    }
    operands = {
        key: _merge_operand(operand, x.shape, axes) for key, operand in named.items() if operand is not None
    }
    row_biases = [merge_axes(term, axes)[0] for term in row_biases]
    if shift_invariant and row_biases:
        merged, operands = apply_invariant_bias(merged, operands, row_biases, band)
        row_biases = []
    spec = OperandSpec(tuple(key for key in OPERAND_FLAGS if key in operands), band)
    return Logits(
        operands=(merged, *(operands[key] for key in spec.names)),
        axis=merged_axis,
        spec=spec,
        implementation=chosen,
        axes=axes,
        shape=x.shape,
        partition=jax.typeof(x).sharding.spec,
        dtype=dtype,
        axis_name=axis_name,
        row_biases=tuple(row_biases),
    )


def as_array(x: jax.typing.ArrayLike, name: str) -> Array:
    """x as an array of JAX's; its TypeError names the argument, where JAX's names a function of JAX."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        of_dtype = f" of dtype {x.dtype}" if hasattr(x, "dtype") else ""
        raise TypeError(f"{name} must be an array, got {type(x).__name__}{of_dtype}") from error


def as_floating_array(x: jax.typing.ArrayLike, name: str) -> Array:
    """An array of floating-point numbers; a TypeError names the argument."""
    array = as_array(x, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point numbers, got dtype {array.dtype}")
    return array


def as_numeric_array(x: jax.typing.ArrayLike, name: str = "x") -> Array:
    """An array of numbers."""
    if not isinstance(x, (jax.Array, np.ndarray, np.generic, int, float, complex)) and not hasattr(
        x, "__jax_array__"
    ):
        raise TypeError(f"{name} must be an array or a number, got {type(x).__name__}")
    array = as_array(x, name)
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}")
    if jnp.issubdtype(array.dtype, jnp.integer) and jnp.iinfo(array.dtype).bits < 8:
        # JAX promotes integers of 4 bits in some operations only, and those of 2 bits in none.
        array = array.astype(np.int8 if jnp.issubdtype(array.dtype, jnp.signedinteger) else np.uint8)
    return array


def as_real_array(x: jax.typing.ArrayLike, name: str) -> Array:
    """An array of real numbers."""
    array = as_numeric_array(x, name)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got dtype {array.dtype}")
    return array


def as_boolean_array(x: jax.typing.ArrayLike, name: str) -> Array:
    """An array of booleans."""
    array = as_array(x, name)
    if array.dtype != jnp.bool_:
        raise ValueError(f"{name} must be boolean, got dtype {array.dtype}")
    return array


def canonical_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes as negative integers, ascending."""
    if axis is None:
        return tuple(range(-ndim, 0))
    try:
        given = tuple(map(operator.index, axis)) if isinstance(axis, Sequence) else (operator.index(axis),)
    except TypeError:
        raise TypeError(f"axis must be an integer, several, or None; got {axis!r}") from None
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for an array of {ndim} dimensions")
    axes = tuple(sorted(a - ndim if a >= 0 else a for a in given))
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis names a dimension twice: {axis!r}")
    return axes


def as_mask(where: jax.typing.ArrayLike, shape: tuple[int, ...], name: str = "x") -> Array:
    """A boolean array that broadcasts to the shape."""
    mask = as_boolean_array(where, "where")
    check_broadcasts("where", mask, shape, f"{name}'s shape")
    return mask


def as_axis_name(axis_name: AxisNames) -> tuple[str, ...]:
    """The mesh axes that users name, checked to be those of an enclosing shard_map."""
    try:
        names = collectives.as_axis_names(axis_name)
        if not names:
            raise ValueError
        collectives.shard_index(names)
    except (KeyError, NameError, TypeError, ValueError):
        raise ValueError(
            f"axis_name must name axes of the mesh of an enclosing jax.shard_map, got {axis_name!r}"
        ) from None
    return names


def _check_band(x: Array, axes: tuple[int, ...], name: str) -> None:
    if x.ndim < 2:
        raise ValueError(f"where=Band(...) needs {name} of two dimensions at least, got shape {x.shape}")
    if axes != (-1,):
        raise ValueError(f"where=Band(...) needs the last axis, got axes {axes}")


def _as_operands(
    x: Array, axes: tuple[int, ...], scale: jax.typing.ArrayLike | None, bias: Bias, name: str
) -> tuple[Array | None, list[Array], Any]:
    """Scale and the terms of the bias as arrays, and to which dtype they promote x; None where it stays."""
    scales = [] if scale is None else [_as_operand("scale", scale, x.shape, name)]
    if isinstance(bias, tuple):
        biases = [_as_operand(f"bias[{i}]", term, x.shape, name) for i, term in enumerate(bias)]
    else:
        biases = [] if bias is None else [_as_operand("bias", bias, x.shape, name)]
    if scales and not _is_of_rows(_with_rank(scales[0], x.ndim), axes):
        raise ValueError(
            f"scale must have size 1 along axis {axes if len(axes) > 1 else axes[0]}, "
            f"got shape {scales[0].shape}"
        )
    # A number in Python takes on x's dtype, as in x * scale + bias.
    promoted = jnp.result_type(x, *scales, *biases) if scales or biases else None
    return (scales[0] if scales else None), biases, promoted


def _as_operand(key: str, operand: jax.typing.ArrayLike, shape: tuple[int, ...], name: str) -> Array:
    array = as_real_array(operand, key)
    check_broadcasts(key, array, shape, f"{name}'s shape")
    return array


def _is_of_rows(operand: Array, axes: tuple[int, ...]) -> bool:
    """Whether an array of x's rank has one number for every row."""
    return all(operand.shape[a] == 1 for a in axes)


def check_broadcasts(name: str, array: Array, shape: tuple[int, ...], target: str) -> None:
    """Raises ValueError where an array of that name does not broadcast to a shape, which ``target`` names."""
    try:
        fits = jnp.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to {target} {shape}, got shape {array.shape}")


def _with_rank(array: Array, ndim: int) -> Array:
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def _merge_operand(operand: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """An operand of x, of whose shape that is, with its axes merged as those of x are."""
    ranked = _with_rank(operand, len(shape))
    return merge_axes(broadcast_along_all_or_none(ranked, shape, axes), axes)[0]


def broadcast_along_all_or_none(operand: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The operand, broadcast along all of the axes unless it has size 1 along all: so they can be merged."""
    if all(operand.shape[a] == 1 for a in axes) or all(operand.shape[a] == shape[a] for a in axes):
        return operand
    target = tuple(shape[a] if a in axes else operand.shape[a] for a in range(-len(shape), 0))
    return jnp.broadcast_to(operand, target)


def _relative_to_maximum(x: Array, axes: tuple[int, ...], mask: Array | None) -> Array:
    """Integers minus their maximum, as floats: integers subtract exactly, and floats may not."""
    x_max = jnp.max(x, axes, keepdims=True, where=mask, initial=jnp.iinfo(x.dtype).min)
    # The difference may exceed the signed range; it then wraps to what is right as unsigned.
    unsigned = jnp.dtype(f"uint{jnp.iinfo(x.dtype).bits}")
    return -(x_max - x).astype(unsigned).astype(jax.eval_shape(jnp.exp, x).dtype)


def _is_narrower_than_16_bits(dtype: np.dtype) -> bool:
    """Computed in float32; some of these formats lack -inf for masking."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def _unsharded_along(x: Array, axes: Sequence[int]) -> Array:
    """The array, whole along the axes: JAX reshapes no axes that are sharded explicitly."""
    spec = list(jax.typeof(x).sharding.spec)
    if all(spec[a] is None for a in axes):
        return x
    for a in axes:
        spec[a] = None
    whole: Array = jax.sharding.reshard(x, PartitionSpec(*spec))
    return whole


def merge_axes(x: Array, axes: tuple[int, ...]) -> tuple[Array, int]:
    """The array with the axes merged into one, and that axis, which is negative."""
    if len(axes) == 1:
        return x, axes[0]
    moved = jnp.moveaxis(_unsharded_along(x, axes), axes, range(-len(axes), 0))
    batch = moved.shape[: x.ndim - len(axes)]
    return moved.reshape(*batch, math.prod(x.shape[a] for a in axes)), -1
