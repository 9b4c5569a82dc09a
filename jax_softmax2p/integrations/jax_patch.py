"""A context in which functions of JAX and flax are replaced by this package's."""

import contextlib
import sys
import types
from collections.abc import Iterator, Set

from jax_softmax2p.integrations.held_functions import (
    Place,
    find_holdings,
    name_of,
    names_of,
    replace,
    restore,
)
from jax_softmax2p.integrations.patched_calls import PatchedCalls, counting, lock
from jax_softmax2p.integrations.patched_functions import loaded_replacements

_ALWAYS_SEARCHED = {"jax", "flax"}
"""The packages that are searched, where they are loaded, without being asked for."""


@contextlib.contextmanager
def patch_jax_nn(*modules: types.ModuleType | str, loaded_modules: bool = False) -> Iterator[PatchedCalls]:
    """Routes the softmaxes and attention of ``jax.nn`` and ``jax.scipy.special`` through this package.

    This is for code that one does not own. Within the context, this package's functions replace ``softmax``,
    ``log_softmax``, ``logsumexp``, ``logmeanexp`` and ``dot_product_attention`` of ``jax.nn``, and
    ``softmax``, ``log_softmax`` and ``logsumexp`` of ``jax.scipy.special``, under all public names of JAX.
    Where flax is loaded, they also replace ``dot_product_attention`` and ``dot_product_attention_weights`` of
    ``flax.linen`` and ``flax.nnx``, and all these functions wherever flax holds them: the defaults of
    ``attention_fn`` of its layers, and other names such as ``flax.linen.softmax``. When the context is left,
    also by an exception, everything is as it was. Contexts may nest, and overlap in any order.

    A call that this package refuses goes to the original function. The context says how many did and why,
    what was replaced, and what was found and could not be: ``print(calls)``.

    Code that evaluates ``jax.nn.softmax(...)`` when it runs or is traced, as flax, equinox and optax do in
    their layers and losses, is reached. Code that holds the function by a name of its own
    (``from jax.nn import softmax``) is reached where its module is one of ``modules``, or with
    ``loaded_modules``. In these modules, the functions are replaced

    - as names of the module, whatever the names are,
    - as attributes of the classes that are defined there, and as defaults of dataclass fields,
    - as values of dictionaries, such as a table of activations, and
    - as defaults of arguments of the functions that are defined there.

    They are not replaced in closures, lists, tuples, ``functools.partial``, jitted functions and other
    objects, which the context lists in ``not_replaced``; nor in local variables and in what objects hold that
    the modules do not hold themselves, which are not searched: a layer that was made before the context keeps
    the function that it was given. JAX's internals are never changed.

    Code that was compiled is the caller's. A jitted function keeps what it was traced with. If it was traced
    inside the context, it uses this package afterwards too; if it was traced before, for the same shapes and
    dtypes, it does not change inside. ``jax.clear_caches()`` makes JAX forget such traces. A layer that is
    made inside the context, and a module that is first imported there, keep the functions too.

    The functions have the names, signatures and attributes of the originals, which are their ``__wrapped__``,
    but they are not equal to them. They are pickled by their public names: loading a pickle gives this
    package's function inside a context, and the original elsewhere.

    Modules belong to the process: other threads see the same functions for as long as any thread is inside.
    To enter takes some milliseconds, and some tenths of a second with ``loaded_modules``.

    Args:
      modules: modules, or names of loaded modules, in which the functions are replaced as well: in the module
        itself and in all loaded modules of the package that it is.
      loaded_modules: whether the functions are replaced in all modules that are loaded.

    Yields:
      The :class:`~jax_softmax2p.integrations.PatchedCalls` of this context, which keep counting until it is
      left.

    Raises:
      TypeError: one of modules is neither a module nor a string.
      ValueError: one of modules is not loaded, or is one of JAX's private modules or of this package.

    Example:
      >>> import jax, jax_softmax2p, types
      >>> model = lambda x, where: jax.nn.softmax(x) + jax.nn.softmax(x, where=where)
      >>> with jax_softmax2p.patch_jax_nn() as calls:
      ...     y = model(jax.numpy.ones(3), jax.numpy.ones((2, 3), bool))
      >>> calls.computed["jax.nn.softmax"]
      1
      >>> for (function, reason), count in calls.fallbacks.items():
      ...     print(count, function, reason)
      1 jax.nn.softmax ValueError: where must broadcast to x's shape (3,), got shape (2, 3)

      >>> library = types.ModuleType("library")  # As if it had imported the function.
      >>> library.softmax = jax.nn.softmax
      >>> library.table, library.gates = {"softmax": jax.nn.softmax}, (jax.nn.softmax,)
      >>> with jax_softmax2p.patch_jax_nn(library) as calls:
      ...     for held in (*calls.replaced, *calls.not_replaced):
      ...         if held.module == "library":
      ...             print(held)
      library: softmax is jax.nn.softmax
      library: table['softmax'] is jax.nn.softmax
      library: gates[0] is jax.nn.softmax (it is in a tuple)
    """
    asked_for = _modules_asked_for(modules, loaded_modules)
    places: list[Place] = []
    try:
        with lock:
            replacements = loaded_replacements()
            searched = [*_holding_modules(replacements.keys()), *asked_for]
            replaced, not_replaced = replace(find_holdings(searched, replacements), places)
        calls = PatchedCalls(replaced=tuple(replaced), not_replaced=tuple(not_replaced))
        with counting(calls):
            yield calls
    finally:
        with lock:
            restore(places)


def _modules_asked_for(
    modules: tuple[types.ModuleType | str, ...], loaded_modules: bool
) -> list[types.ModuleType]:
    """The modules in which functions are to be replaced, for the arguments of patch_jax_nn."""
    packages = [_checked_name(module) for module in modules]
    given = [module for module in modules if not isinstance(module, str)]
    if not packages and not loaded_modules:
        return []
    found = [
        module
        for name, module in _public_modules().items()
        if loaded_modules or any(_is_within(name, package) for package in packages)
    ]
    return [*given, *found]


def _holding_modules(function_ids: Set[int]) -> list[types.ModuleType]:
    """The modules of JAX and flax that have one of the functions among their names.

    The others are not searched, since that takes longer: a class or a function of these packages that holds
    one of the functions is defined where the function has a name.
    """
    return [
        module
        for name, module in _public_modules().items()
        if name.partition(".")[0] in _ALWAYS_SEARCHED
        and not function_ids.isdisjoint(map(id, names_of(module).values()))
    ]


def _public_modules() -> dict[str, types.ModuleType]:
    """The loaded modules by name, but for JAX's internals and this package."""
    return {
        name: module
        for name, module in sys.modules.copy().items()
        if issubclass(type(module), types.ModuleType) and name_of(module) and not _is_internal(name)
    }


def _checked_name(module: types.ModuleType | str) -> str:
    """The name of one of the modules that patch_jax_nn is given, or an error."""
    if isinstance(module, str):
        name = module
        if name not in sys.modules:
            raise ValueError(f"modules must be loaded, got {name!r}, which has not been imported")
    elif isinstance(module, types.ModuleType):
        name = name_of(module)
        if not name:
            raise ValueError(f"modules must have names, got {module!r}")
    else:
        raise TypeError(f"modules must be modules or their names, got {module!r}")
    if _is_internal(name):
        raise ValueError(f"modules must not be JAX's private modules or this package's, got {name!r}")
    return name


def _is_internal(name: str) -> bool:
    """Whether a module is JAX's own business or this package's, where replacing could recurse."""
    package = name.partition(".")[0]
    return package in ("jaxlib", "jax_softmax2p") or (package == "jax" and "._" in name)


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
