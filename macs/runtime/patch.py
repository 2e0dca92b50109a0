"""Patches over an engine's own functions, for scripts that must not change."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Patch(Generic[Value]):
    """Installations over an engine, of which the last one acts.

    put: patches the engine and returns a function that restores it. It is called for the first installation;
    when the last one is removed, in whatever order, the engine is as before.
    """

    def __init__(self, put: Callable[[], Callable[[], None]]) -> None:
        self._put = put
        self._restore: Callable[[], None] | None = None
        self._values: list[tuple[object, Value]] = []

    @property
    def current(self) -> Value | None:
        """The value of the installation that acts, if any."""
        return self._values[-1][1] if self._values else None

    def add(self, value: Value) -> Callable[[], None]:
        """Install; returns a function that uninstalls it."""
        if self._restore is None:
            self._restore = self._put()
        entry = object(), value
        self._values.append(entry)

        def uninstall() -> None:
            self._values[:] = [one for one in self._values if one is not entry]
            if not self._values and self._restore is not None:
                self._restore()
                self._restore = None

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
