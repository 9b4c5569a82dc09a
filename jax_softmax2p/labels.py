"""Labels as users pass them, checked and brought into the form that the primitives take."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p.arguments import as_array

Array = jax.Array
_INT32 = np.iinfo(np.int32)


def saturate_known_labels(labels: Any) -> Any:
    """Integers of NumPy and of Python as int32, to whose range they saturate; anything else as it is.

    Without jax_enable_x64, JAX would cut 64 bits down to 32, and refuse such a number in Python.
    """
    if isinstance(labels, int) and not isinstance(labels, bool):
        return np.int32(min(max(labels, _INT32.min), _INT32.max))
    if isinstance(labels, np.ndarray | np.generic) and labels.dtype.kind in "iu":
        return _saturate_to_int32(labels)
    return labels


def as_labels(labels: jax.typing.ArrayLike) -> Array:
    """Integers of any dtype as int32, to whose range they saturate.

    There are at most 2^31 - 1 classes, so a number that int32 cannot hold names no class, and neither does
    the number to which it saturates. A cast would wrap it around to a number that may name one.

    Raises:
      TypeError: labels are not integers.
    """
    labels = as_array(saturate_known_labels(labels), "labels")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}")
    return _saturate_to_int32(labels)


def as_class_indices(labels: Array, num_classes: int) -> Array:
    """The classes that labels name.

    Args:
      labels: int32, as :func:`as_labels` returns them. Those below 0 count from the end.
      num_classes: how many classes a row has, on all devices together.

    Returns:
      int32 array of the labels' shape, of numbers from 0 to num_classes, where num_classes stands for no
      class.

    Raises:
      ValueError: there are more classes than int32 can count.
    """
    # A symbolic size of jax.export cannot be compared.
    if isinstance(num_classes, int) and num_classes > _INT32.max:
        raise ValueError(f"there must be no more than {_INT32.max} classes, got {num_classes}")
    return _class_indices(labels, num_classes)


# Jitted, since eager calls would otherwise dispatch each of its operations by itself.
@functools.partial(jax.jit, static_argnames="num_classes", inline=True)
def _class_indices(labels: Array, num_classes: int) -> Array:
    labels = jnp.where(labels < 0, labels + num_classes, labels)
    return jnp.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def _saturate_to_int32(x: Any) -> Any:
    """Integers of any dtype, in an array of JAX or of NumPy, as int32."""
    limits = jnp.iinfo(x.dtype)
    if limits.min < _INT32.min or limits.max > _INT32.max:
        x = x.clip(max(limits.min, _INT32.min), min(limits.max, _INT32.max))
    return x.astype(np.int32)
