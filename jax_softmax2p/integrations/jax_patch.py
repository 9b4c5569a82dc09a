"""The functions of jax.nn, replaced by this package's for as long as a context lasts."""

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.scipy.special

from jax_softmax2p.attention import dot_product_attention
from jax_softmax2p.ops import log_softmax, logsumexp, softmax


def _with_fallback(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or the original for calls that the function refuses."""

    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError):
            # jax.nn may accept the call, as with a mask of integers, or else raises its own error.
            return original(*args, **kwargs)

    return routed


_FUNCTIONS = (softmax, log_softmax, logsumexp, dot_product_attention)
_ORIGINALS: dict[str, Any] = {f.__name__: getattr(jax.nn, f.__name__) for f in _FUNCTIONS}
_ROUTED = {f.__name__: _with_fallback(f, _ORIGINALS[f.__name__]) for f in _FUNCTIONS}

_lock = threading.Lock()
_depths: dict[tuple[types.ModuleType, str], int] = {}
"""How many contexts, of all threads, currently replace an attribute of a module. The lock guards it."""


@contextlib.contextmanager
def patch_jax_nn(*modules: types.ModuleType) -> Iterator[None]:
    """Routes jax.nn's softmax, log_softmax, logsumexp and dot_product_attention through this package.

    This is for code that one does not own. Within the context, ``jax.nn`` has this package's functions under
    those names, and so has ``jax.scipy.special`` for logsumexp, which is jax.nn's. A call that this package
    refuses goes to JAX's own function. When the context is left, also by an exception, everything is as it
    was. Contexts may nest.

    The attributes of the modules are replaced. That reaches code that evaluates ``jax.nn.softmax(...)`` when
    it runs or is traced, as flax, equinox and optax do in their layers and losses. It reaches neither names
    that have been imported (``from jax.nn import softmax``), for which there is ``modules``, nor JAX's
    internals.

    A jitted function keeps what it was traced with. If it was traced inside the context, it uses this package
    afterwards too; if it was traced before, for the same shapes and dtypes, it does not change inside.
    ``jax.clear_caches()`` makes JAX forget such traces.

    Modules belong to the process: other threads see the same functions for as long as any thread is inside.

    Args:
      modules: further modules in which those of the four names that stand for JAX's functions are replaced,
        such as ``flax.linen``, whose ``softmax`` is JAX's.

    Example:
      >>> import jax, jax_softmax2p
      >>> model = lambda x: jax.nn.softmax(x).sum()
      >>> with jax_softmax2p.patch_jax_nn():
      ...     "softmax2p" in str(jax.make_jaxpr(model)(jax.numpy.ones(3)))
      True
    """
    with _lock:
        attributes = [
            (module, name)
            for module in dict.fromkeys((jax.nn, jax.scipy.special, *modules))
            for name in _ORIGINALS
            if getattr(module, name, None) in (_ORIGINALS[name], _ROUTED[name])
        ]
        for module, name in attributes:
            _depths[module, name] = _depths.get((module, name), 0) + 1
            setattr(module, name, _ROUTED[name])
    try:
        yield
    finally:
        with _lock:
            for module, name in attributes:
                _depths[module, name] -= 1
                if not _depths[module, name]:
                    setattr(module, name, _ORIGINALS[name])
