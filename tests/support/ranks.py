"""Tests whose body runs on several ranks: ``@on_ranks(2)``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def on_ranks(
    world: int | Callable[..., int], **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a test's body on ``world`` gloo ranks of the pool; what it asserts, it asserts on each.

    Its arguments are the test's parameters, from which a function ``world`` gets the number of ranks.
    ``options`` are those of ``Pool.run``.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def test(pool: Any, **arguments: Any) -> None:
            pool.run(body, world if isinstance(world, int) else world(**arguments), arguments, **options)

        names = ["pool", *inspect.signature(body).parameters]
        kind = inspect.Parameter.KEYWORD_ONLY
        test.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        return test

    return decorate


def gathered(value: Any, group: Any = None) -> list[Any]:
    """The value of every rank, in their order."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
