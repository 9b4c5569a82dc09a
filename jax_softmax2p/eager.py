"""Eager calls of public functions: one compiled program instead of a JAX call for every step of them."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p import jax_compat

F = TypeVar("F", bound=Callable[..., Any])

_HASHABLE = (type(None), bool, int, str)


def jit_when_eager(
    *array_names: str, prepare: Mapping[str, Callable[[Any], Any]] = types.MappingProxyType({})
) -> Callable[[F], F]:
    """Makes a function run as a jitted one where nothing is being traced.

    Outside jit, checks of arguments and reshapes are calls into JAX of some 20 µs each: softmax of (8, 128)
    took 93 µs and the cross-entropy 411 µs, where their jitted calls take 7 (Zen 4). The jitted function is
    compiled once for shapes, dtypes and the values of the other arguments, and raises the same errors.

    The function runs as it is inside jit, grad, vmap and the like, which trace it themselves, and for
    arguments that jit does not hand on as they are: integers of NumPy that JAX would cut, unhashable values,
    an ``axis_name``, and what is no array where one belongs, which the function refuses.

    Args:
      array_names: the parameters that are arrays, numbers, tuples of these, or None; a ``Band``, which is a
        pytree without leaves, may stand in the place of one. All others are static.
      prepare: what is done first to the argument of each of these parameters. The function does it, too.
    """

    def decorate(function: F) -> F:
        names = tuple(inspect.signature(function).parameters)
        static_names = [name for name in names if name not in array_names]
        is_allowed = {name: _is_hashable if name in static_names else _is_kept for name in names}
        is_allowed["axis_name"] = _is_none
        jitted = jax.jit(function, static_argnames=static_names)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if jax_compat.is_tracing():
                return function(*args, **kwargs)
            for name, function_of in prepare.items():
                if name in kwargs:
                    kwargs[name] = function_of(kwargs[name])
                elif (place := names.index(name)) < len(args):
                    args = (*args[:place], function_of(args[place]), *args[place + 1 :])
            for name, value in zip(names, args, strict=False):
                if not is_allowed[name](value):
                    return function(*args, **kwargs)
            for name, value in kwargs.items():
                if name not in is_allowed or not is_allowed[name](value):
                    return function(*args, **kwargs)
            return jitted(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _is_none(value: Any) -> bool:
    return value is None


def _is_kept(value: Any) -> bool:
    """Whether jit hands the function an array of the same dtype, or the same value."""
    if value is None or isinstance(value, jax.Array | int | float | complex):
        return True
    if isinstance(value, tuple):
        return all(map(_is_kept, value))
    if isinstance(value, np.ndarray | np.generic):
        return _is_kept_dtype(value.dtype)
    return not jax.tree.leaves(value)


def _is_kept_dtype(dtype: np.dtype) -> bool:
    """Whether jit does with an array of NumPy of this dtype what jnp.asarray does, without an error."""
    if dtype in (np.float64, np.complex128):
        return True
    is_known = dtype.kind == "b" or jnp.issubdtype(dtype, jnp.number)
    return is_known and dtype.itemsize <= 8 and jax.dtypes.canonicalize_dtype(dtype) == dtype


def _is_hashable(value: Any) -> bool:
    if isinstance(value, _HASHABLE):
        return True
    try:
        hash(value)
    except TypeError:
        return False
    return True
