"""A context in which functions of jax.nn and jax.scipy.special are replaced by this package's."""

import collections
import contextlib
import dataclasses
import functools
import inspect
import math
import pkgutil
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np

from jax_softmax2p import ops
from jax_softmax2p.arguments import Axis, canonical_axes
from jax_softmax2p.attention import dot_product_attention

Array = jax.Array
ArrayLike = jax.typing.ArrayLike

_JIT_METHODS = ("lower", "trace", "eval_shape", "clear_cache")
"""The methods of jitted functions that concern the compiled program, which is this package's in a context."""

_STATIC_ARGUMENTS = {"axis", "keepdims"}
"""The names of static arguments of JAX's functions that are jitted."""


@dataclasses.dataclass(frozen=True)
class PatchedCalls:
    """What happened to the calls of patched functions while a :func:`patch_jax_nn` context was open.

    Functions are named by where users find them, such as ``"jax.nn.softmax"``. A call inside a jitted
    function counts when it is traced. Calls of all threads count. A call that JAX's own function refuses as
    well does not count.

    Attributes:
      computed: by function, how many calls this package computed.
      fallbacks: by function and reason, how many calls went to JAX's own function.
    """

    computed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    fallbacks: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)


class PatchedFunction:
    """A function of JAX's that this package computes where it can.

    It looks like the original: its name, signature, documentation and all other attributes are those of the
    original, it binds to instances as a class attribute, and it has the methods of jitted functions if the
    original is jitted. ``__wrapped__`` is the original. It is not equal to the original, so that JAX traces
    it anew where it has traced the original.
    """

    __wrapped__: Callable[..., Any]

    def __init__(self, public_name: str, function: Callable[..., Any]):
        """Makes the replacement of a function of JAX's.

        Args:
          public_name: of JAX's function, such as "jax.nn.softmax".
          function: what computes it. A TypeError or a ValueError of it sends the call to the original.
        """
        functools.update_wrapper(self, pkgutil.resolve_name(public_name))
        self._public_name = public_name
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of this package, or of the original where this package refuses the call."""
        try:
            result = self._function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            self._count("computed", self._public_name)
            return result
        # JAX may accept the call, as with a mask of integers, or else raises its own error. It is called
        # outside of the handler, so that its error does not mention this package's.
        result = self.__wrapped__(*args, **kwargs)
        self._count("fallbacks", (self._public_name, reason))
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
        return f"<jax_softmax2p in place of {self._public_name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Loading a pickle gives whatever the public name stands for then. Outside of a context that is JAX's
        # own function, and this package need not be installed.
        return pkgutil.resolve_name, (self._public_name,)

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

    def _count(self, kind: str, key: Any) -> None:
        """Adds 1 to a counter of every open context."""
        with _lock:
            for calls in _open_contexts:
                getattr(calls, kind)[key] += 1


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
    shape = jnp.shape(x)
    if where is None:
        count = jnp.asarray(math.prod(shape[a] for a in canonical_axes(axis, len(shape))), lse.dtype)
    else:
        count = jnp.sum(jnp.broadcast_to(where, shape), axis, keepdims=keepdims, dtype=lse.dtype)
    return lse - jnp.log(count)


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

_REPLACEMENTS: dict[int, PatchedFunction] = {}
"""The replacement of each function of JAX's, and of each replacement, which is itself.

The keys are ids, since a module's attributes need not be hashable.
"""

for _public_name, _function in _FUNCTIONS.items():
    _patched = PatchedFunction(_public_name, _function)
    _REPLACEMENTS[id(_patched)] = _REPLACEMENTS[id(_patched.__wrapped__)] = _patched

_lock = threading.Lock()
_open_contexts: list[PatchedCalls] = []
_depths: dict[tuple[types.ModuleType, str], int] = {}
"""How many contexts, of all threads, currently replace an attribute of a module.

The lock guards both this and the list of open contexts.
"""


@contextlib.contextmanager
def patch_jax_nn(*modules: types.ModuleType) -> Iterator[PatchedCalls]:
    """Routes the softmaxes and attention of ``jax.nn`` and ``jax.scipy.special`` through this package.

    This is for code that one does not own. Within the context, this package's functions replace ``softmax``,
    ``log_softmax``, ``logsumexp``, ``logmeanexp`` and ``dot_product_attention`` of ``jax.nn``, and
    ``softmax``, ``log_softmax`` and ``logsumexp`` of ``jax.scipy.special``. A call that this package refuses
    goes to JAX's own function; the context says how many did and why. When the context is left, also by an
    exception, everything is as it was. Contexts may nest.

    The attributes of the modules are replaced. That reaches code that evaluates ``jax.nn.softmax(...)`` when
    it runs or is traced, as flax, equinox and optax do in their layers and losses. It reaches neither names
    that have been imported (``from jax.nn import softmax``), for which there is ``modules``, nor JAX's
    internals.

    A jitted function keeps what it was traced with. If it was traced inside the context, it uses this package
    afterwards too; if it was traced before, for the same shapes and dtypes, it does not change inside.
    ``jax.clear_caches()`` makes JAX forget such traces.

    The functions have the names, signatures and attributes of the originals, which are their ``__wrapped__``,
    but they are not equal to them. They are pickled by their public names: loading a pickle gives this
    package's function inside a context, and JAX's own function elsewhere.

    Modules belong to the process: other threads see the same functions for as long as any thread is inside.

    Args:
      modules: further modules in which JAX's functions are replaced, whatever their names are there, such as
        ``flax.linen``, whose ``softmax`` is JAX's.

    Yields:
      The :class:`PatchedCalls` of this context, which keep counting until it is left.

    Example:
      >>> import jax, jax_softmax2p
      >>> model = lambda x, where: jax.nn.softmax(x) + jax.nn.softmax(x, where=where)
      >>> with jax_softmax2p.patch_jax_nn() as calls:
      ...     y = model(jax.numpy.ones(3), jax.numpy.ones((2, 3), bool))
      >>> calls.computed["jax.nn.softmax"]
      1
      >>> for (function, reason), count in calls.fallbacks.items():
      ...     print(count, function, reason)
      1 jax.nn.softmax ValueError: where must broadcast to x's shape (3,), got shape (2, 3)
    """
    calls = PatchedCalls()
    with _lock:
        attributes = [
            (module, name, _REPLACEMENTS[id(value)])
            for module in dict.fromkeys((jax.nn, jax.scipy.special, *modules))
            for name, value in vars(module).items()
            if id(value) in _REPLACEMENTS
        ]
        for module, name, replacement in attributes:
            _depths[module, name] = _depths.get((module, name), 0) + 1
            setattr(module, name, replacement)
        _open_contexts.append(calls)
    try:
        yield calls
    finally:
        with _lock:
            _open_contexts[:] = [other for other in _open_contexts if other is not calls]
            for module, name, replacement in attributes:
                _depths[module, name] -= 1
                if not _depths[module, name]:
                    setattr(module, name, replacement.__wrapped__)
