"""Finds the places in which modules hold given functions, and replaces and restores what they hold.

Python has no list of the names of a function. A search goes from the names of a module to what they stand
for: the functions and classes that are defined in the module, the containers that it holds, and what these
hold. It reads, and runs no code of theirs.
"""

import contextlib
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jax_softmax2p.integrations.patched_calls import HeldFunction
from jax_softmax2p.integrations.patched_functions import PatchedFunction

_MAX_DEPTH = 8
"""How far a search follows containers and functions that are held by one another."""

_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), types.ModuleType, type(...)})
"""The types of what cannot hold a function, or in the case of modules is searched by itself."""

_CONTAINERS = (dict, list, tuple, set, frozenset, types.MappingProxyType)
"""The types whose items are searched, with their subclasses. Only those of dictionaries can be replaced."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A place that holds a value, which can be replaced.

    Attributes:
      owner: the object that holds it.
      key: where in the owner.
      write: write(owner, key, value) puts a value there.
    """

    owner: Any
    key: Any
    write: Callable[[Any, Any, Any], None]

    def identity(self) -> tuple[int, Any, Any]:
        """What two places have in common if they are the same one, for as long as the owner lives."""
        return id(self.owner), self.key, self.write


def write_default(function: types.FunctionType, index: int, value: Any) -> None:
    """Replaces the default of a positional argument."""
    defaults = list(function.__defaults__ or ())
    if index < len(defaults):
        defaults[index] = value
        function.__defaults__ = tuple(defaults)


@dataclasses.dataclass(frozen=True)
class Holding:
    """A place that holds one of the functions.

    Attributes:
      place: None if it cannot be written to.
      description: for the user.
      held: what it holds: the function, or its replacement, or a staticmethod of either.
      replacement: what it is to hold instead.
    """

    place: Place | None
    description: HeldFunction
    held: Any
    replacement: Any


def find_holdings(
    modules: Iterable[types.ModuleType], replacements: Mapping[int, PatchedFunction]
) -> list[Holding]:
    """All places in the modules that hold a function which has a replacement.

    Args:
      modules: where to search. Functions and classes of other modules, and what they hold, are left out.
      replacements: by the ids of the functions, those that stand for themselves included.
    """
    modules = list({id(module): module for module in modules}.values())
    search = _Search(replacements, frozenset(map(name_of, modules)))
    # A dictionary that a module holds may be the names of another.
    search.seen |= {
        id(names_of(module))
        for module in list(sys.modules.values())
        if issubclass(type(module), types.ModuleType)
    }
    for module in modules:
        search.search_module(module)
    return search.holdings


def names_of(module: types.ModuleType) -> dict[str, Any]:
    """The dictionary of a module's names. A module may be of a class with attributes of its own."""
    names: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return names


def name_of(module: types.ModuleType) -> str:
    """A module's own name; nothing where it has none, as one that a program has made may."""
    name = names_of(module).get("__name__")
    return name if isinstance(name, str) else ""


class _Name(NamedTuple):
    """Where something is held in a module: a name, and keys of containers, which become text when needed."""

    text: str
    keys: tuple[Any, ...] = ()

    def item(self, key: Any) -> "_Name":
        return _Name(self.text, (*self.keys, key))

    def __str__(self) -> str:
        return self.text + "".join(f"[{_key_text(key)}]" for key in self.keys)


class _Search:
    """A search through modules.

    Attributes:
      holdings: what has been found.
      seen: the ids of the objects that have been searched.
    """

    def __init__(self, replacements: Mapping[int, PatchedFunction], modules: frozenset[str]):
        self.holdings: list[Holding] = []
        self.seen: set[int] = set()
        self._replacements = replacements
        self._modules = modules
        self._module = ""
        self._depth = 0

    def search_module(self, module: types.ModuleType) -> None:
        """Searches what the names of a module stand for."""
        names = names_of(module)
        self._module = name_of(module)
        for name, value in names.copy().items():
            if type(value) not in _ATOMS:
                self._visit(value, _Name(name), Place(names, name, dict.__setitem__))

    def _visit(self, value: Any, name: _Name, place: Place | str) -> None:
        """Notes a value that is one of the functions, and searches others.

        Args:
          value: what is held.
          name: where it is held.
          place: the same as a place to write to, or why it cannot be replaced there.
        """
        replacement = self._replacements.get(id(value))
        if replacement is not None:
            self._note(name, place, value, replacement, replacement)
            return
        if type(value) in _ATOMS or id(value) in self.seen or self._depth == _MAX_DEPTH:
            return
        self.seen.add(id(value))
        self._depth += 1
        self._search(value, name)
        self._depth -= 1

    def _note(
        self, name: _Name, place: Place | str, held: Any, function: PatchedFunction, replacement: Any
    ) -> None:
        writable, reason = (None, place) if isinstance(place, str) else (place, None)
        description = HeldFunction(self._module, str(name), function.public_name, reason)
        self.holdings.append(Holding(writable, description, held, replacement))

    def _search(self, value: Any, name: _Name) -> None:
        """Searches an object, by its type: what it says of its class may be another's."""
        kind = type(value)
        if kind is types.FunctionType:
            self._search_function(value, name)
        elif issubclass(kind, type):
            if type.__getattribute__(value, "__module__") in self._modules:
                self._search_class(value)
        elif issubclass(kind, _CONTAINERS):
            self._search_container(value, name)
        elif issubclass(kind, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                self._visit(item, name, "it is in a functools.partial")
        elif issubclass(kind, staticmethod | classmethod):
            self._visit(value.__func__, name, f"it is in a {kind.__name__}")
        elif not issubclass(kind, types.ModuleType):
            self._search_object(value, name)

    def _search_container(self, container: Any, name: _Name) -> None:
        """Its items, by the ways of the built-in type: a subclass may have its own."""
        kind = next(base for base in _CONTAINERS if issubclass(type(container), base))
        if kind in (dict, types.MappingProxyType):
            items = list(kind.items(container))
        else:
            items = list(enumerate(kind.__iter__(container)))
        for key, item in items:
            if type(item) not in _ATOMS:
                in_dict = Place(container, key, dict.__setitem__)
                place = in_dict if kind is dict else f"it is in a {kind.__name__}"
                self._visit(item, name.item(key), place)

    def _search_function(self, function: types.FunctionType, name: _Name) -> None:
        """What a function holds if it is defined in the modules, and otherwise what it wraps."""
        if function.__module__ in self._modules or function.__globals__.get("__name__") in self._modules:
            self._search_defaults(function)
            self._search_variables(function)
            return
        wrapped = vars(function).get("__wrapped__")
        if id(wrapped) in self._replacements:
            self._visit(wrapped, name, "it is in a function that wraps it")

    def _search_defaults(self, function: types.FunctionType) -> None:
        """The default arguments of a function."""
        code, defaults = function.__code__, function.__defaults__ or ()
        arguments = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        for index, (argument, value) in enumerate(zip(arguments, defaults, strict=True)):
            name = _Name(f"{function.__qualname__}({argument}=)")
            self._visit(value, name, Place(function, index, write_default))
        for argument, value in (function.__kwdefaults__ or {}).items():
            name = _Name(f"{function.__qualname__}({argument}=)")
            self._visit(value, name, Place(function.__kwdefaults__, argument, dict.__setitem__))

    def _search_variables(self, function: types.FunctionType) -> None:
        """The attributes of a function, and the variables that it holds as a closure."""
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # It is empty.
                continue
            self._visit(value, _Name(f"{function.__qualname__}, variable {variable}"), "it is in a closure")
        for key, value in vars(function).copy().items():
            # What a decorator has wrapped is in the closure of the function that calls it.
            if key != "__wrapped__":
                place = Place(vars(function), key, dict.__setitem__)
                self._visit(value, _Name(f"{function.__qualname__}.{key}"), place)

    def _search_class(self, cls: type) -> None:
        """Its attributes, methods and the defaults of its fields, if it is a dataclass."""
        # As type does it: a metaclass may have its own ways.
        class_name = type.__getattribute__(cls, "__qualname__")
        for key, value in list(type.__getattribute__(cls, "__dict__").items()):
            name, place = _Name(f"{class_name}.{key}"), Place(cls, key, type.__setattr__)
            held = value.__func__ if type(value) is staticmethod else None
            function = self._replacements.get(id(held))
            if function is not None:
                self._note(name, place, value, function, staticmethod(function))
            elif key == "__dataclass_fields__":
                for field in value.values():
                    field_name = _Name(f"{class_name}.{field.name}, the field's default")
                    self._visit(field.default, field_name, Place(field, "default", setattr))
            else:
                self._visit(value, name, place)

    def _search_object(self, value: Any, name: _Name) -> None:
        """Its attributes, but not what they hold, except for the function that a jitted one has wrapped."""
        reason = f"it is in an object of type {type(value).__name__}"
        # Compiled functions that are not of Python's own type may have defaults.
        defaults, keyword_defaults = _attribute(value, "__defaults__"), _attribute(value, "__kwdefaults__")
        held = defaults if type(defaults) is tuple else ()
        for default in (*held, *(keyword_defaults.values() if type(keyword_defaults) is dict else ())):
            self._visit(default, name, reason)
        attributes = _attribute(value, "__dict__")
        noted = set()
        for key, held in attributes.copy().items() if type(attributes) is dict else ():
            # A jitted function has two attributes for what it has wrapped.
            if (id(held) in self._replacements or key == "__wrapped__") and id(held) not in noted:
                noted.add(id(held))
                self._visit(held, _Name(f"{name}.{key}"), reason)


def _attribute(value: Any, name: str) -> Any:
    """An attribute as object gives it, or None."""
    try:
        return object.__getattribute__(value, name)
    except (AttributeError, TypeError):
        return None


def _key_text(key: Any) -> str:
    """The key of a dictionary as text. Those of unknown types could run code."""
    return repr(key) if type(key) in _ATOMS else f"a {type(key).__name__}"


@dataclasses.dataclass
class _Replaced:
    """A place that open contexts, as many as ``contexts``, have replaced what it ``held``."""

    place: Place
    held: Any
    contexts: int = 0


_replaced: dict[tuple[int, Any, Any], _Replaced] = {}
"""What is replaced now, by the identity of the place. It keeps the owners alive. The lock guards it."""


def replace(
    holdings: Iterable[Holding], places: list[Place]
) -> tuple[list[HeldFunction], list[HeldFunction]]:
    """Puts the replacements into the places that can be written to. The caller holds the lock.

    Args:
      holdings: what to replace.
      places: each place is appended as soon as its content is replaced, for :func:`restore`.

    Returns:
      What was replaced, and what was not, with reasons.
    """
    replaced, not_replaced = [], []
    for holding in holdings:
        place = holding.place
        if place is None:
            not_replaced.append(holding.description)
            continue
        try:
            place.write(place.owner, place.key, holding.replacement)
        except (AttributeError, TypeError) as error:  # An immutable class, for example.
            not_replaced.append(dataclasses.replace(holding.description, reason=str(error)))
            continue
        _replaced.setdefault(place.identity(), _Replaced(place, holding.held)).contexts += 1
        places.append(place)
        replaced.append(holding.description)
    return replaced, not_replaced


def restore(places: Iterable[Place]) -> None:
    """Puts back what the places held, unless other contexts are open for them. The caller holds the lock.

    Raises:
      Exception: that of the first place that refuses; all others are restored first.
    """
    with contextlib.ExitStack() as writes:
        for place in places:
            known = _replaced[place.identity()]
            known.contexts -= 1
            if not known.contexts:
                del _replaced[place.identity()]
                writes.callback(place.write, place.owner, place.key, known.held)
