"""The state that all MACS layers of a model share."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import MACSConfig
from ..policies import policy_of
from ..records.counters import Counters
from ..records.profile import Profile
from ..steps.combine import Plan
from ..tokens import Tokens
from ..version import __version__
from .adapter import LayerAdapter
from .consistency import RankConsistency

logger = logging.getLogger("macs.runtime")


PATIENCE = 1.0
"""Seconds that a forward pass lets a change of settings go first."""

called_model: ContextVar[Any] = ContextVar("macs_called_model", default=None)
"""The model whose forward pass is running, where ``ModalityHook`` is on it."""


class PlanEvent(NamedTuple):
    """A step of a layer, as callbacks of ``on_plan`` get it: the planner's inputs and the plan; none while
    MACS calibrates."""

    layer: Any
    hidden: Tensor
    experts: Tensor
    weights: Tensor
    scores: Tensor
    tokens: Tokens
    plan: Plan | None


Callback = Callable[[PlanEvent], None]

OutputCallback = Callable[[PlanEvent, Tensor], None]


class RuntimeState:
    """Policy, settings and switches, which ``Runtime`` changes and layers read.

    Copies of a model share it. Saved with a model, it comes back with the same settings and no layers.
    """

    policy: str
    config: MACSConfig
    profile: Profile | None

    def __init__(self, virtual_ranks: int) -> None:
        self._enabled = True
        self.recording = True
        self.calibrating = False
        self.virtual_ranks = virtual_ranks
        self._warned: set[str] = set()
        self._forget_process()

    def _forget_process(self) -> None:
        """What belongs to this process and is not saved."""
        self.counters: Counters | None = None
        self.callbacks: list[Callback] = []
        self._layers: list[weakref.ref[Any]] = []
        self._consistency: dict[int, RankConsistency] = {}
        self._condition = threading.Condition()
        self._passes = self._waiting = 0  # forward passes that run; changes that wait for their end
        self._thread = threading.local()
        self._compared: tuple[Any, dict[str, Any]] | None = None

    @property
    def enabled(self) -> bool:
        """Whether layers plan; to be changed on every rank alike.

        Raises, when changed:
            RuntimeError: a CUDA graph has captured MACS layers, and would replay them as before.
        """
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value != self._enabled and any(layer.graphed for layer in self.layers):
            raise RuntimeError(
                "enabled: a CUDA graph has captured MACS layers, and would replay them as before; expected "
                "it before the engine captures"
            )
        self._enabled = value

    @property
    def on(self) -> bool:
        """Whether layers plan or calibrate now."""
        return self._enabled or self.calibrating

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimeState:
        return self

    def __getstate__(self) -> dict[str, Any]:
        kept = "policy", "config", "profile", "_enabled", "recording", "virtual_ranks", "_warned"
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_process()
        vars(self).update(state, calibrating=False)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around a forward pass of a model or, where it has no hook, of a layer: settings stay."""
        if self._inside:  # as a layer's within its model's
            yield
            return
        with self._condition:
            # A change that waits goes first, but not for long: a pass that runs may wait for this one.
            self._condition.wait_for(lambda: not self._waiting, PATIENCE)
            self._passes += 1
        self._thread.inside = True
        try:
            yield
        finally:
            self._thread.inside = False
            with self._condition:
                self._passes -= 1
                self._condition.notify_all()

    @property
    def _inside(self) -> bool:
        """Whether this thread is in a forward pass."""
        return getattr(self._thread, "inside", False)

    @contextmanager
    def between_passes(self) -> Iterator[None]:
        """Around a change of settings: waits until no forward pass runs, and none begins within."""
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._passes)
                yield
            finally:
                self._waiting -= 1
                self._condition.notify_all()

    def settings(self, training: bool) -> dict[str, Any]:
        """What the members of a group must have in common, as plain values; one object until it changes."""
        key = (training, self.enabled, self.calibrating, self.policy, self.config, id(self.profile))
        if self._compared is None or self._compared[0] != key:
            switches = {"enabled": self.enabled, "calibrating": self.calibrating, "training": training}
            chosen = self.chosen(self.policy, self.config, self.profile)
            self._compared = key, {**switches, **chosen}
        return self._compared[1]

    def chosen(self, policy: str, config: MACSConfig, profile: Profile | None) -> dict[str, Any]:
        """The part of ``settings`` that ``use`` sets."""
        return {
            "macs version": __version__,
            "policy": policy,
            **{f"config.{name}": value for name, value in config.as_dict().items()},
            "profile": None if profile is None else profile.digest,
            "virtual_ranks": self.virtual_ranks,
        }

    def consistency_of(self, group: dist.ProcessGroup | None) -> RankConsistency | None:
        """The comparison with a group's members; none for a process by itself."""
        if not isinstance(group, dist.ProcessGroup) or group.size() == 1:
            return None
        held = self._consistency.get(id(group))
        if held is None or held.group is not group:
            held = self._consistency[id(group)] = RankConsistency(group)
        return held

    def register(self, layer: Any) -> None:
        """Add a layer, also one that was copied or loaded with its module."""
        self._layers = [reference for reference in self._layers if reference() is not None]
        self._layers.append(weakref.ref(layer))

    @property
    def layers(self) -> list[Any]:
        """The layers that are alive, in the order in which they were added."""
        return [layer for layer in (reference() for reference in self._layers) if layer is not None]

    def check_adapter(self, adapter: LayerAdapter, policy: str, config: MACSConfig) -> None:
        """Raise a ``ValueError`` if the engine cannot honour this policy in a layer; log the adapter's
        advice."""
        reason = adapter.refusal(policy_of(policy))
        if reason is not None:
            raise ValueError(f"policy {policy}: {reason}")
        for advice in adapter.advice(policy, config):
            self.warn_once(advice)

    def warn_once(self, message: str) -> None:
        """Log a warning the first time it is given."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures the work on the device now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
