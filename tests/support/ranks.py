"""Tests whose body runs on several ranks: ``@on_ranks(2)``."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any


def on_ranks(world: int, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a test's body on ``world`` gloo ranks of the pool; what it asserts, it asserts on each.

    Its arguments are the test's parameters. ``options`` are those of ``Pool.run``.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def test(pool: Any, **arguments: Any) -> None:
            pool.run(
                run_body, world, inspect.getfile(inspect.unwrap(body)), body.__name__, arguments, **options
            )

        names = ["pool", *inspect.signature(body).parameters]
        kind = inspect.Parameter.KEYWORD_ONLY
        test.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        return test

    return decorate


def run_body(file: str, name: str, arguments: dict[str, Any]) -> None:
    """In a worker: the body of the test ``name`` of a file."""
    module = sys.modules.get(file)
    if module is None:
        spec = importlib.util.spec_from_file_location(file, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    getattr(module, name).__wrapped__(**arguments)
