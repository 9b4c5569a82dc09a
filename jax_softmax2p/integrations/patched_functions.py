"""The functions that patch_jax_nn puts in the place of JAX's and flax's."""

import functools
import inspect
import math
import pkgutil
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np

from jax_softmax2p import ops
from jax_softmax2p.arguments import Axis, canonical_axes
from jax_softmax2p.attention import dot_product_attention
from jax_softmax2p.integrations.flax_hook import flax_attention, flax_attention_weights
from jax_softmax2p.integrations.patched_calls import count
from jax_softmax2p.reference import compute_dtype

Array = jax.Array
ArrayLike = jax.typing.ArrayLike

_JIT_METHODS = ("lower", "trace", "eval_shape", "clear_cache")
"""The methods of jitted functions that concern the compiled program, which is this package's in a context."""

_STATIC_ARGUMENTS = {"axis", "keepdims"}
"""The names of static arguments of JAX's functions that are jitted."""


class PatchedFunction:
    """A function of JAX's, or of flax's, that this package computes where it can.

    It looks like the original: its name, signature, documentation and all other attributes are those of the
    original, it binds to instances as a class attribute, and it has the methods of jitted functions if the
    original is jitted. ``__wrapped__`` is the original. It is not equal to the original, so that JAX traces
    it anew where it has traced the original.

    Attributes:
      public_name: of the original, such as "jax.nn.softmax".
    """

    __wrapped__: Callable[..., Any]

    def __init__(self, public_name: str, function: Callable[..., Any]):
        """Makes the replacement of a function.

        Args:
          public_name: of the original, as pkgutil.resolve_name takes it.
          function: what computes it. A TypeError or a ValueError of it sends the call to the original.
        """
        functools.update_wrapper(self, pkgutil.resolve_name(public_name))
        self.public_name = public_name
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of this package, or of the original where this package refuses the call."""
        try:
            result = self._function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            count("computed", self.public_name)
            return result
        # The original may accept the call, as with a mask of integers, or else raises its own error. It is
        # called outside of the handler, so that its error does not mention this package's.
        result = self.__wrapped__(*args, **kwargs)
        count("fallbacks", (self.public_name, reason))
        return result

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # It is not set yet.
            raise AttributeError(name)
        attribute = getattr(self.__wrapped__, name)
        return getattr(self._jitted, name) if name in _JIT_METHODS else attribute

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.__wrapped__)})

    def __repr__(self) -> str:
        return f"<jax_softmax2p in place of {self.public_name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Loading a pickle gives whatever the public name stands for then. Outside of a context that is JAX's
        # own function, and this package need not be installed.
        return pkgutil.resolve_name, (self.public_name,)

    def __copy__(self) -> "PatchedFunction":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "PatchedFunction":
        return self

    @functools.cached_property
    def _jitted(self) -> Any:
        """The jitted function whose methods those of _JIT_METHODS are."""

        @functools.wraps(self.__wrapped__)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        static = _STATIC_ARGUMENTS & inspect.signature(call).parameters.keys()
        return jax.jit(call, static_argnames=tuple(static))


def _logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
) -> Array | tuple[Array, Array]:
    """jax.nn.logsumexp where this package has a kernel. What ops.logsumexp leaves to JAX is a fallback."""
    if b is not None or np.iscomplexobj(a):
        raise TypeError("logsumexp has no kernel with b, nor for complex numbers")
    return ops.logsumexp(a, axis, None, keepdims, return_sign, where)


def _logmeanexp(
    x: ArrayLike, axis: Axis = None, where: ArrayLike | None = None, keepdims: bool = False
) -> Array:
    """jax.nn.logmeanexp: the lse minus the logarithm of how many elements take part."""
    lse = ops.logsumexp(x, axis, keepdims=keepdims, where=where)
    shape, dtype = jnp.shape(x), compute_dtype(lse.dtype)  # The count may exceed 16 bits.
    if where is None:
        count = jnp.asarray(math.prod(shape[a] for a in canonical_axes(axis, len(shape))), dtype)
    else:
        count = jnp.sum(jnp.broadcast_to(where, shape), axis, keepdims=keepdims, dtype=dtype)
    return (lse.astype(dtype) - jnp.log(count)).astype(lse.dtype)


def _scipy_softmax(x: ArrayLike, /, *, axis: Axis = None) -> Array:
    """jax.scipy.special.softmax, whose axis is None by default and given by keyword only."""
    return ops.softmax(x, axis)


def _scipy_log_softmax(x: ArrayLike, /, *, axis: Axis = None) -> Array:
    """jax.scipy.special.log_softmax, whose axis is None by default and given by keyword only."""
    return ops.log_softmax(x, axis)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "jax.nn.softmax": ops.softmax,
    "jax.nn.log_softmax": ops.log_softmax,
    "jax.nn.logsumexp": _logsumexp,
    "jax.nn.logmeanexp": _logmeanexp,
    "jax.nn.dot_product_attention": dot_product_attention,
    "jax.scipy.special.softmax": _scipy_softmax,
    "jax.scipy.special.log_softmax": _scipy_log_softmax,
}
"""What computes each of JAX's functions, by their public names. jax.scipy.special's logsumexp is jax.nn's."""

_FLAX_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "flax.linen.dot_product_attention": flax_attention,
    "flax.linen.dot_product_attention_weights": flax_attention_weights,
    "flax.nnx.dot_product_attention": flax_attention,
    "flax.nnx.nn.attention.dot_product_attention_weights": flax_attention_weights,
}
"""What computes each of flax's functions, by their public names, with the same names of arguments."""

_REPLACEMENTS: dict[int, PatchedFunction] = {}
"""The replacement of each function, and of each replacement, which is itself.

The keys are ids, since what a module holds need not be hashable. A replacement keeps its original alive.
"""


def loaded_replacements() -> dict[int, PatchedFunction]:
    """The replacements by the ids of JAX's functions, of flax's where it is loaded, and of replacements."""
    for public_name, function in _FLAX_FUNCTIONS.items():
        module_name, _, name = public_name.rpartition(".")
        # Another thread may be in the midst of importing flax.
        original = getattr(sys.modules.get(module_name), name, None)
        if original is not None and id(original) not in _REPLACEMENTS:
            _add_replacement(public_name, _with_arguments_of(original, function))
    return _REPLACEMENTS


def _add_replacement(public_name: str, function: Callable[..., Any]) -> None:
    patched = PatchedFunction(public_name, function)
    _REPLACEMENTS[id(patched)] = _REPLACEMENTS[id(patched.__wrapped__)] = patched


def _with_arguments_of(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes arguments as ``original`` does, and passes them by name."""
    signature = inspect.signature(original)
    return lambda *args, **kwargs: function(**signature.bind(*args, **kwargs).arguments)


for _public_name, _function in _FUNCTIONS.items():
    _add_replacement(_public_name, _function)
