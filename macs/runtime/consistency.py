"""Ranks must run with the same settings: the members of a group compare them before they plan.

The members of an expert-parallel group exchange tokens in every layer. No exchange compares their settings,
so members with different settings would exchange as ever, and give answers of no setting that anybody chose.
Each member therefore writes its settings to ``torch.distributed``'s store when they change, and reads those
of the others: in ``Runtime.use`` before anything takes effect, and, for ``enabled``, calibration, train
and eval, in the next pass. A pass without a change makes no request.

A member waits as long as a collective of the group would: a late rank is no error, another answer is.
"""

from __future__ import annotations

import itertools
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


class RankMismatch(RuntimeError):
    """Members of a group run with different settings."""


class RankConsistency:
    """The settings that this process last compared with the members of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.broken: str | None = None
        self._store = _store(group)
        # A model that is built once more on one rank goes on with what the others run with.
        self._compared: dict[str, Any] | None = _last.get(group)

    def check(self, settings: dict[str, Any]) -> None:
        """Compare settings that changed since the last comparison.

        Raises:
            RankMismatch: another rank has others, or did not compare within the group's timeout.
        """
        if settings is not self._compared:
            if settings != self._compared:
                self.compare(settings)
            self._compared = _last[self.group] = settings

    def compare(self, settings: dict[str, Any]) -> None:
        """Compare with all members; every member must make the same call, in the same order."""
        if self._store is None:
            return
        self.refuse_broken()
        number = next(_numbers.setdefault(self.group, itertools.count()))
        keys = {rank: f"macs/{self.group.group_name}/{number}/{rank}" for rank in self.ranks}
        self._store.set(keys[self.rank], json.dumps(settings, sort_keys=True))
        try:
            self._store.wait(list(keys.values()), _timeout(self.group))
        except (dist.DistStoreError, RuntimeError) as error:
            missing = [rank for rank, key in keys.items() if not self._store.check([key])]
            former = {name: (self._compared or {}).get(name) for name in settings}
            mismatch = RankMismatch(
                f"MACS: rank {self.rank} changed {_difference(former, settings)}, and ranks {missing} of its "
                f"group {self.ranks} did not within {_timeout(self.group)}. {_WAY_OUT}"
            )
            # A rank that comes later must not succeed alone; later comparisons would be out of step.
            self._store.set(keys[self.rank], json.dumps({"settings": "withdrawn after the timeout"}))
            self.break_off(mismatch)
            raise mismatch from error
        for rank, key in keys.items():
            other = json.loads(self._store.get(key))
            if other != settings:
                fields = _difference(settings, other, f" on rank {self.rank}", f" on rank {rank}")
                raise RankMismatch(
                    f"MACS: the ranks {self.ranks} of a group have different settings: {fields}. {_WAY_OUT}"
                )
        self._compared = _last[self.group] = {**(self._compared or {}), **settings}

    def refuse_broken(self) -> None:
        """Raise a ``RuntimeError`` if an earlier forward pass of this process ended half way."""
        if self.broken is not None:
            raise RuntimeError(
                f"MACS: an earlier forward pass on rank {self.rank} ended before its last collective "
                f"({self.broken}), and the other members of its group, ranks {self.ranks}, may still wait in "
                "it: they would take what this rank sends now for a part of that batch. Build the process "
                "groups and the model anew, or restart the processes"
            )

    def break_off(self, error: BaseException) -> None:
        """The current pass ended with an error, and the others may wait in it."""
        if self.broken is None:
            self.broken = f"{type(error).__name__}: {error}".split("\n")[0][:300]


_WAY_OUT = "Change settings (Runtime.use, enabled, calibration, train and eval) on every rank alike"

_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()
"""The number of the next comparison in each group: members make them in the same order."""


_last: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, Any]] = weakref.WeakKeyDictionary()
"""The settings that the members of each group last compared."""


def _difference(first: dict[str, Any], second: dict[str, Any], one: str = "", other: str = "") -> str:
    """The fields in which settings differ, with both values."""
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return ", ".join(f"{name}: {first.get(name)!r}{one}, {second.get(name)!r}{other}" for name in names)


_completed: ContextVar[set[Any] | None] = ContextVar("macs_completed", default=None)


def complete(layer: Any) -> None:
    """A layer has made its last collective in the current model call."""
    layers = _completed.get()
    if layers is not None:
        layers.add(layer)


@contextmanager
def model_call(layers: Callable[[], Iterable[Any]]) -> Iterator[None]:
    """Around a model's forward pass: an error that leaves it before all of ``layers`` have made their last
    collective breaks their groups off."""
    completed: set[Any] = set()
    outer = _completed.get()
    token = _completed.set(completed)
    try:
        yield
    except RankMismatch:
        raise  # no member has begun the pass, or the comparison itself has broken off
    except BaseException as error:
        for layer in layers():
            if layer not in completed and layer.consistency is not None:
                layer.consistency.break_off(error)
        raise
    finally:
        _completed.reset(token)
        if outer is not None:
            outer |= completed


def _store(group: dist.ProcessGroup) -> dist.Store | None:
    """The store; none, with a warning, where the backend has none."""
    try:
        store: dist.Store | None = dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        store = None
    if store is None or dist.get_backend(group) == "fake":
        logger.warning("MACS: torch.distributed has no store here; settings are not compared among ranks")
        return None
    return store


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of the group waits."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None) or dist.default_pg_timeout
