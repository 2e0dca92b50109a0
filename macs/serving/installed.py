"""What is put over an engine's own functions, for scripts that must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Installed(Generic[Value]):
    """Installations over an engine, of which the last one acts.

    put: puts our functions in the place of the engine's and returns what takes them away again. It is called
    for the first installation; with the last one, whichever it is, the engine is as it was.
    """

    def __init__(self, put: Callable[[], Callable[[], None]]) -> None:
        self._put = put
        self._take_away: Callable[[], None] | None = None
        self._values: list[tuple[object, Value]] = []

    @property
    def current(self) -> Value | None:
        """What acts now, if anything."""
        return self._values[-1][1] if self._values else None

    def add(self, value: Value) -> Callable[[], None]:
        """Install; returns what uninstalls it, in any order among others, once."""
        if self._take_away is None:
            self._take_away = self._put()
        mark = object(), value
        self._values.append(mark)

        def uninstall() -> None:
            self._values[:] = [one for one in self._values if one is not mark]
            if not self._values and self._take_away is not None:
                self._take_away()
                self._take_away = None

        return uninstall
