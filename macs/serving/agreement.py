"""Ranks that must run alike: the settings of a group's members, compared before they plan.

The members of an expert-parallel group exchange tokens in every layer. What MACS does is never told to
the collectives, so members that differ in their settings do not hang; but their answers would differ
from what anybody asked for. So each member numbers its changes of settings, and puts the n-th where
the others find it: in ``torch.distributed``'s store. Before a forward pass that follows a change, the n-th
of all members are compared; before any other, one look tells whether somebody has gone on to the next.
That look is one request to the store in a forward pass that plans: 40 us on one machine.
"""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

WAIT = timedelta(seconds=10)
"""How long a member waits for the others to tell their n-th settings."""

REFUSED = "refused"
"""The key under which a member says that the n-th settings do not agree."""


class Disagreement(RuntimeError):
    """Members of a group run with different settings."""


class Agreement:
    """What one process knows of a group's settings.

    group: the processes whose tokens meet in a layer's experts. Members make their agreements on a group
    in the same order, as they build their models.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.own = dist.get_rank()
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._first: tuple[int, int] = (0, -1)
        self.broken: str | None = None
        self.changes = 0
        self._passes = 0
        self._settings: dict[str, Any] = {}
        self._former: dict[str, Any] = {}
        self._compared = True
        self._done: set[int] = set()
        self._store = _store()
        number = _number_of(group)
        self._prefix = f"macs/{'-'.join(map(str, self.ranks))}/{number}"

    def first_layer(self) -> int:
        """The lowest index of the layers that are alive, where a forward pass begins."""
        if self._first[0] != len(self.layers):
            self._first = len(self.layers), min(layer.index for layer in self.layers)
        return self._first[1]

    # A forward pass.

    def begin(self, settings: dict[str, Any], plans: bool) -> None:
        """At the first layer of a forward pass: raise unless all members run with these settings.

        plans: whether the pass is large enough to plan; others only publish what changed.
        """
        self._passes += 1
        self._done.clear()
        begun = _begun.get()
        if begun is not None:
            begun.add(self)
        if settings != self._settings:
            self._former, self._settings = self._settings, settings
            self.changes += 1
            self._compared = False
            self._tell()
        if self._store is None or not plans:
            return
        if self._compared:
            self._look()
        else:
            self._compare()

    def refuse_broken(self) -> None:
        """Raise where an earlier forward pass of this process ended half way."""
        if self.broken is not None:
            raise RuntimeError(
                f"MACS: an earlier forward pass on rank {self.own} ended before its last collective "
                f"({self.broken}), and the other members of its group, ranks {self.ranks}, may still wait in "
                "it: what this rank sends now would be taken for a part of that batch. Build the process "
                "groups and the model anew, or start the processes again"
            )

    def end(self, layer: int) -> None:
        """A layer of the pass has made its last collective."""
        self._done.add(layer)

    @property
    def complete(self) -> bool:
        """Whether every layer has run since the pass began."""
        return len(self._done) >= len(self.layers)

    def break_off(self, error: BaseException) -> None:
        """The pass under way ended with an error, and this process left the others alone in it."""
        if self.broken is None:
            self.broken = f"{type(error).__name__}: {error}".split("\n")[0][:300]

    # The others' settings.

    def _key(self, number: int, who: int | str) -> str:
        return f"{self._prefix}/{number}/{who}"

    def _tell(self) -> None:
        if self._store is None:
            return
        said = json.dumps({"pass": self._passes, "settings": self._settings}, sort_keys=True)
        self._store.set(self._key(self.changes, self.own), said)
        self._store.set(self._key(self.changes, "any"), str(self.own))

    def _said(self, number: int, rank: int) -> dict[str, Any]:
        assert self._store is not None
        said: dict[str, Any] = json.loads(self._store.get(self._key(number, rank)))
        return said

    def _look(self) -> None:
        """Whether a member has made a change that this one should have made by now."""
        assert self._store is not None
        following = self._key(self.changes + 1, "any")
        if not self._store.check([following]):
            return
        other = int(self._store.get(following))
        said = self._said(self.changes + 1, other)
        if said["pass"] <= self._passes:
            changed = difference(self._settings, said["settings"])
            self._refuse(
                self.changes + 1,
                f"rank {other} changed {changed} before this forward pass, and rank {self.own} did not",
            )

    def _compare(self) -> None:
        """All members' n-th settings with this one's."""
        assert self._store is not None
        deadline = time.monotonic() + WAIT.total_seconds()
        missing = [rank for rank in self.ranks if rank != self.own]
        while missing:
            refused = self._key(self.changes, REFUSED)
            if self._store.check([refused]):
                raise Disagreement(self._store.get(refused).decode())
            for rank in list(missing):
                if self._store.check([self._key(self.changes, rank)]):
                    missing.remove(rank)
                    settings = self._said(self.changes, rank)["settings"]
                    if settings != self._settings:
                        changed = difference(self._settings, settings, f"rank {self.own}", f"rank {rank}")
                        self._refuse(self.changes, f"they differ in {changed}")
            if missing and time.monotonic() > deadline:
                if self.changes > 1:
                    changed = difference(self._former, self._settings)
                    self._refuse(
                        self.changes,
                        f"rank {self.own} changed {changed} before this forward pass, and rank {missing[0]} "
                        f"did not within {WAIT.total_seconds():g} s",
                    )
                # The first pass of all: the others may be long in loading, and are looked for again.
                logger.warning(
                    "MACS: ranks %s have not begun their first forward pass after %g s; their settings are "
                    "compared when they have",
                    missing,
                    WAIT.total_seconds(),
                )
                return
            if missing:
                time.sleep(0.002)
        self._compared = True

    def _refuse(self, number: int, what: str) -> None:
        message = (
            f"MACS: the ranks {self.ranks} of a group do not run with the same settings: {what}. Change the "
            "settings (Runtime.use, enabled, calibration, train and eval) on every rank alike"
        )
        assert self._store is not None
        self._store.set(self._key(number, REFUSED), message)
        raise Disagreement(message)


def difference(first: dict[str, Any], second: dict[str, Any], one: str = "", other: str = "") -> str:
    """The fields in which settings differ, and how."""
    fields = [name for name in {**first, **second} if first.get(name) != second.get(name)]

    def shown(settings: dict[str, Any], name: str) -> str:
        return repr(settings.get(name))

    if not one:
        return (
            ", ".join(f"{name} from {shown(first, name)} to {shown(second, name)}" for name in fields)
            or "nothing"
        )
    return ", ".join(
        f"{name}: {shown(first, name)} on {one}, {shown(second, name)} on {other}" for name in fields
    )


_begun: ContextVar[set[Agreement] | None] = ContextVar("macs_begun", default=None)


@contextmanager
def pass_around(members: Callable[[], Iterable[Agreement]] = tuple) -> Iterator[None]:
    """A forward pass, from before its first layer to after its last one.

    An error that leaves it before a group's last collective breaks that group off. members: lists the
    groups of the layers that were to run, for an error before the first of them.
    """
    begun: set[Agreement] = set()
    around = _begun.get()
    token = _begun.set(begun)
    try:
        yield
    except BaseException as error:
        for one in (*begun, *members()):
            if one not in begun or not one.complete:
                one.break_off(error)
        raise
    finally:
        _begun.reset(token)
        if around is not None:
            around |= begun


_numbers: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], int]] = weakref.WeakKeyDictionary()


def _number_of(group: dist.ProcessGroup) -> int:
    """How many agreements on these ranks this process has made before, since its groups were built."""
    counts = _numbers.setdefault(dist.group.WORLD, {})
    ranks = tuple(dist.get_process_group_ranks(group))
    counts[ranks] = counts.get(ranks, -1) + 1
    return counts[ranks]


_warned = False


def _store() -> dist.Store | None:
    """Where the members find what each other says; none, told once, where the backend has none (MPI)."""
    global _warned
    try:
        store: dist.Store | None = dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        store = None
    if store is None and not _warned:
        _warned = True
        logger.warning("MACS: torch.distributed has no store here; settings are not compared among ranks")
    return store
