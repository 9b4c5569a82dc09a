"""Finds the places in which modules hold given functions, and replaces and restores what they hold.

Python has no list of the names of a function. A search goes from the names of a module to what they stand
for: the functions and classes that are defined in the module, the containers that it holds, and what these
hold. It reads, and runs no code of theirs.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax_softmax2p.integrations.patched_calls import HeldFunction
from jax_softmax2p.integrations.patched_functions import PatchedFunction

_MAX_DEPTH = 8
"""How far a search follows containers and functions that are held by one another."""

_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), types.ModuleType, type(...)})
"""The types of what cannot hold a function, or in the case of modules is searched by itself."""


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
    search = _Search(replacements, frozenset(names_of(module)["__name__"] for module in modules))
    # A dictionary that a module holds may be the names of another.
    search.seen |= {
        id(names_of(module))
        for module in list(sys.modules.values())
        if issubclass(type(module), types.ModuleType)
    }
    for module in modules:
        search.module = names_of(module)["__name__"]
        search.items(names_of(module), lambda name: str(name))
    return search.holdings


def names_of(module: types.ModuleType) -> dict[str, Any]:
    """The dictionary of a module's names. A module may be of a class with attributes of its own."""
    names: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return names


class _Search:
    """A search through modules.

    Attributes:
      holdings: what has been found.
      module: the name of the module that is searched now.
      seen: the ids of the objects that have been searched.
    """

    def __init__(self, replacements: Mapping[int, PatchedFunction], modules: frozenset[str]):
        self.holdings: list[Holding] = []
        self.module = ""
        self.seen: set[int] = set()
        self._replacements = replacements
        self._modules = modules
        self._depth = 0

    def items(self, items: dict[Any, Any], name_of: Callable[[Any], str]) -> None:
        """Visits what a dictionary holds. A subclass may have its own ways, which are not taken."""
        for key, value in dict.copy(items).items():
            if type(value) not in _ATOMS:
                self._visit(value, lambda key=key: name_of(key), Place(items, key, dict.__setitem__))

    def _visit(self, value: Any, name: Callable[[], str], place: Place | str) -> None:
        """Notes a value that is one of the functions, and searches others.

        Args:
          value: what is held.
          name: gives the name of where it is held.
          place: where it is held, or why it cannot be replaced there.
        """
        replacement = self._replacements.get(id(value))
        if replacement is not None:
            self._note(name(), place, value, replacement, replacement)
            return
        if type(value) in _ATOMS or id(value) in self.seen or self._depth == _MAX_DEPTH:
            return
        self.seen.add(id(value))
        self._depth += 1
        self._search(value, name)
        self._depth -= 1

    def _note(
        self, name: str, place: Place | str, held: Any, function: PatchedFunction, replacement: Any
    ) -> None:
        reason = place if isinstance(place, str) else None
        description = HeldFunction(self.module, name, function.public_name, reason)
        self.holdings.append(
            Holding(None if isinstance(place, str) else place, description, held, replacement)
        )

    def _search(self, value: Any, name: Callable[[], str]) -> None:
        """Searches an object, by its type: what it says of its class may be another's."""
        kind = type(value)
        if kind is types.FunctionType:
            if value.__module__ in self._modules or value.__globals__.get("__name__") in self._modules:
                self._search_function(value)
            else:
                wrapped = vars(value).get("__wrapped__")
                if id(wrapped) in self._replacements:
                    self._visit(wrapped, name, "it is in a function that wraps it")
        elif issubclass(kind, type):
            if type.__getattribute__(value, "__module__") in self._modules:
                self._search_class(value)
        elif issubclass(kind, dict):
            self.items(value, lambda key: f"{name()}[{_key_text(key)}]")
        elif issubclass(kind, list | tuple | set | frozenset):
            for index, item in enumerate(list(kind.__iter__(value))):
                if type(item) not in _ATOMS:
                    item_name = lambda index=index: f"{name()}[{index}]"
                    self._visit(item, item_name, f"it is in a {_base_name(kind)}")
        elif kind is types.MappingProxyType:
            for key, item in list(value.items()):
                item_name = lambda key=key: f"{name()}[{_key_text(key)}]"
                self._visit(item, item_name, "it is in a mappingproxy")
        elif issubclass(kind, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                self._visit(item, name, "it is in a functools.partial")
        elif issubclass(kind, staticmethod | classmethod):
            self._visit(value.__func__, name, f"it is in a {kind.__name__}")
        elif not issubclass(kind, types.ModuleType):
            self._search_object(value, name)

    def _search_function(self, function: types.FunctionType) -> None:
        """Its default arguments, attributes, and the variables that it holds as a closure."""
        name = function.__qualname__
        code = function.__code__
        arguments = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        for index, value in enumerate(defaults):
            argument = arguments[len(arguments) - len(defaults) + index]
            self._visit(
                value, lambda argument=argument: f"{name}({argument}=)", Place(function, index, write_default)
            )
        if function.__kwdefaults__:
            self.items(function.__kwdefaults__, lambda argument: f"{name}({argument}=)")
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # It is empty.
                continue
            self._visit(
                value, lambda variable=variable: f"{name}, variable {variable}", "it is in a closure"
            )
        for key, value in vars(function).copy().items():
            # What a decorator has wrapped is in the closure of the function that calls it.
            if key != "__wrapped__":
                place = Place(vars(function), key, dict.__setitem__)
                self._visit(value, lambda key=key: f"{name}.{key}", place)

    def _search_class(self, cls: type) -> None:
        """Its attributes, methods and the defaults of its fields, if it is a dataclass."""
        # As type does it: a metaclass may have its own ways.
        class_name = type.__getattribute__(cls, "__qualname__")
        for key, value in list(type.__getattribute__(cls, "__dict__").items()):
            name = lambda key=key: f"{class_name}.{key}"
            place = Place(cls, key, type.__setattr__)
            held = value.__func__ if type(value) is staticmethod else None
            function = self._replacements.get(id(held))
            if function is not None:
                self._note(name(), place, value, function, staticmethod(function))
            elif key == "__dataclass_fields__":
                for field in value.values():
                    field_name = lambda field=field: f"{class_name}.{field.name}, the field's default"
                    self._visit(field.default, field_name, Place(field, "default", setattr))
            else:
                self._visit(value, name, place)

    def _search_object(self, value: Any, name: Callable[[], str]) -> None:
        """Its attributes, but not what they hold, except for the function that a jitted one has wrapped."""
        reason = f"it is in an object of type {type(value).__name__}"
        # Compiled functions that are not of Python's own type may have defaults.
        for defaults in _attribute(value, "__defaults__"), _attribute(value, "__kwdefaults__"):
            held = defaults.values() if type(defaults) is dict else defaults
            for default in held if type(defaults) in (tuple, dict) else ():
                self._visit(default, name, reason)
        attributes = _attribute(value, "__dict__")
        if type(attributes) is not dict:
            return
        noted = set()
        for key, held in attributes.copy().items():
            # A jitted function has two attributes for what it has wrapped.
            if (id(held) in self._replacements or key == "__wrapped__") and id(held) not in noted:
                noted.add(id(held))
                self._visit(held, lambda key=key: f"{name()}.{key}", reason)


def _attribute(value: Any, name: str) -> Any:
    """An attribute as object gives it, or None."""
    try:
        return object.__getattribute__(value, name)
    except (AttributeError, TypeError):
        return None


def _key_text(key: Any) -> str:
    """The key of a dictionary as text. Those of unknown types could run code."""
    return repr(key) if type(key) in _ATOMS else f"a {type(key).__name__}"


def _base_name(kind: type) -> str:
    """The name of the built-in container that a type is, or is a subclass of."""
    return next(base.__name__ for base in (list, tuple, set, frozenset) if issubclass(kind, base))


@dataclasses.dataclass
class _Replaced:
    """A place that open contexts, as many as ``contexts``, have replaced what it ``held``."""

    place: Place
    held: Any
    contexts: int = 0


_replaced: dict[tuple[int, Any, Any], _Replaced] = {}
"""What is replaced now, by the identity of the place. It keeps the owners alive. The lock guards it."""


def replace(holdings: Iterable[Holding], places: list[Place]) -> tuple[list[HeldFunction], list[HeldFunction]]:
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
    """Puts back what the places held, unless other contexts are open for them. The caller holds the lock."""
    for place in places:
        known = _replaced[place.identity()]
        known.contexts -= 1
        if not known.contexts:
            del _replaced[place.identity()]
            place.write(place.owner, place.key, known.held)
