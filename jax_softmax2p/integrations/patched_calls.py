"""What an open patch_jax_nn context has replaced, and what happens to the calls of patched functions."""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class HeldFunction:
    """A place that holds one of the functions that :func:`jax_softmax2p.patch_jax_nn` replaces.

    Attributes:
      module: the name of the module in which the place was found.
      place: what holds the function there: a name, such as ``"softmax"``, ``"Layer.activation"``,
        ``"ACTIVATIONS['softmax']"`` or ``"Layer.__init__(activation=)"``.
      function: where users find the function, such as ``"jax.nn.softmax"``.
      reason: why it could not be replaced there; None if it was.
    """

    module: str
    place: str
    function: str
    reason: str | None = None

    def __str__(self) -> str:
        text = f"{self.module}: {self.place} is {self.function}"
        return text if self.reason is None else f"{text} ({self.reason})"


@dataclasses.dataclass(frozen=True, repr=False)
class PatchedCalls:
    """What a :func:`jax_softmax2p.patch_jax_nn` context replaced, and what happened to calls meanwhile.

    Functions are named by where users find them, such as ``"jax.nn.softmax"``. A call inside a jitted
    function counts when it is traced. Calls of all threads count. A call that JAX's own function refuses as
    well does not count.

    Attributes:
      computed: by function, how many calls this package computed.
      fallbacks: by function and reason, how many calls went to JAX's own function.
      replaced: the places in which this package's function stands within the context.
      not_replaced: the places that were found to hold a function and keep it, each with the reason.
    """

    computed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    fallbacks: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    replaced: tuple[HeldFunction, ...] = ()
    not_replaced: tuple[HeldFunction, ...] = ()

    def __repr__(self) -> str:
        computed = [f"{count} of {function}" for function, count in sorted(self.computed.items())]
        fallbacks = [
            f"{count} of {function}: {reason}" for (function, reason), count in sorted(self.fallbacks.items())
        ]
        parts = {
            "replaced": self.replaced,
            "not replaced": self.not_replaced,
            "calls computed": computed,
            "calls that went to the original": fallbacks,
        }
        lines = []
        for title, items in parts.items():
            lines += [f"{title}: {len(items) or 'none'}", *(f"  {item}" for item in items)]
        return "\n".join(lines)


lock = threading.Lock()
"""Guards the list of open contexts, and in :mod:`held_functions` what they replace."""

_open_contexts: list[PatchedCalls] = []


def count(kind: str, key: object) -> None:
    """Adds 1 to a counter, ``computed`` or ``fallbacks``, of every open context."""
    with lock:
        for calls in _open_contexts:
            getattr(calls, kind)[key] += 1


@contextlib.contextmanager
def counting(calls: PatchedCalls) -> Iterator[None]:
    """While this is open, the calls of patched functions count in ``calls``."""
    with lock:
        _open_contexts.append(calls)
    try:
        yield
    finally:
        with lock:
            _open_contexts[:] = [other for other in _open_contexts if other is not calls]
