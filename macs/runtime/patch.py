"""Patches over an engine's own functions, for scripts that must not change."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Patch(Generic[Value]):
    """Installations over an engine, of which the last one acts.

    replacements: gives (owner, attribute, value) of what is put there, at the first installation; when the
    last one is removed, in whatever order, the engine is as before. What somebody else has wrapped since
    stays, with ours inside, which passes calls on until there is an installation again.
    """

    def __init__(self, replacements: Callable[[], Iterable[tuple[Any, str, Any]]]) -> None:
        self._replacements = replacements
        self._replaced: dict[tuple[int, str], tuple[Any, str, Any, Any]] = {}
        self._values: list[tuple[object, Value]] = []

    @property
    def current(self) -> Value | None:
        """The value of the installation that acts, if any."""
        return self._values[-1][1] if self._values else None

    def add(self, value: Value) -> Callable[[], None]:
        """Install; returns a function that uninstalls it."""
        for owner, name, ours in [] if self._values else list(self._replacements()):
            if (id(owner), name) not in self._replaced:
                self._replaced[id(owner), name] = owner, name, ours, getattr(owner, name)
                setattr(owner, name, ours)
        entry = object(), value
        self._values.append(entry)

        def uninstall() -> None:
            self._values[:] = [one for one in self._values if one is not entry]
            for key, (owner, name, ours, stock) in [] if self._values else list(self._replaced.items()):
                if getattr(owner, name) is ours:
                    setattr(owner, name, stock)
                    del self._replaced[key]

        return uninstall


def missing_symbols(needed: Mapping[str, Sequence[str]]) -> list[str]:
    """Those of ``{module: (attribute path, ...)}`` that do not exist, as "module.path"; all of a module that
    cannot be imported."""
    return [
        f"{module}.{path}" for module, paths in needed.items() for path in paths if not _has(module, path)
    ]


def _has(module: str, path: str) -> bool:
    try:
        value: Any = importlib.import_module(module)
    except ImportError:
        return False
    for name in path.split("."):
        value = getattr(value, name, None)
    return value is not None
