"""What an engine's modules have, for adapters that build on part of what is its own business."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any


def missing_symbols(needed: Mapping[str, Sequence[str]]) -> list[str]:
    """Of ``{module: (attribute path, ...)}`` those that are not there, as "module.path".

    A module that cannot be imported lacks everything.
    """
    return [
        f"{module}.{path}" for module, paths in needed.items() for path in paths if not _has(module, path)
    ]


def _has(module: str, path: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return False
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None
