"""What bounds do to a model's answers: a runtime, a way to score answers, and requests in two halves.

Shapes: L layers, G groups of them that share a bound, Q requests, A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from macs import MACSConfig, Profile, Runtime
from macs.adapters import LayerRuntime
from macs.runtime.state import OutputCallback

from ..common.answers import divergence
from .search import UNBOUNDED, Measured

Said = Callable[[Any, list[list[int]]], list[Tensor]]
"""Prompts of a batch, whatever they are to the engine, and answers, token ids -> the log-probabilities [A, V]
that predict the tokens of each."""


@dataclass(frozen=True)
class Batch:
    """prompts: what the engine is asked; answers: token ids that it says without a bound; expected: what
    predicts them there."""

    prompts: Any
    answers: list[list[int]]
    expected: list[Tensor]


class Scorer:
    """A model whose layers are bounded one by one, or in groups, and the requests that tell what it costs.

    runtime: the model's. said: scores answers. asked: batches of prompts, with the model's answers; every
    second one is to verify. groups: of consecutive layers that share a bound, all of one size; none is every
    layer by itself. group: the expert-parallel ranks, each of which makes the same calls, with batches of its
    own; none where one process plans as all of them.
    """

    @torch.inference_mode()
    def __init__(
        self,
        runtime: Runtime,
        said: Said,
        asked: Sequence[tuple[Any, list[list[int]]]],
        *,
        policy: str = "macs",
        config: MACSConfig | None = None,
        groups: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        layers = len(runtime.layers)
        self.groups = groups or layers
        if layers % self.groups:
            raise ValueError(f"groups: found {groups}, expected a divisor of the model's {layers} layers")
        self.runtime, self.said, self.group = runtime, said, group
        self.policy = policy
        self.config = (config or MACSConfig()).updated(min_tokens=0, compensation="tuned")
        self.ranks = runtime.virtual_ranks if group is None else dist.get_world_size(group)
        self.modality: Profile | None = None  # what is served with a tuning has it, too
        self.passes = 0
        runtime.enabled = False
        whole = [Batch(prompts, answers, said(prompts, answers)) for prompts, answers in asked]
        runtime.enabled = True
        self.halves = {"tune": whole[::2], "verify": whole[1::2]}

    @property
    def tokens(self) -> int:
        """Of a rank in a prompt step."""
        steps = torch.stack([report.prefill.tokens for report in self.runtime.reports(self.group)])
        return int(steps.double().mean()) // self.ranks

    @property
    def share(self) -> int:
        """Layers in a group."""
        return len(self.runtime.layers) // self.groups

    @torch.inference_mode()
    def measure(self, half: str, bounds: Sequence[float], compensation: str = "none") -> Measured:
        """What bounds [G] and a setting of compensation do to the requests of a half, of all ranks."""
        settings = self.config.updated(target_load=UNBOUNDED, compensation=compensation)
        self.runtime.use(self.policy, settings, self.modality)
        for layer, bound in zip(self.runtime.layers, np.repeat(bounds, self.share), strict=True):
            layer.planner.update_target(float(bound))
        return self._measured(self.halves[half])

    @torch.inference_mode()
    def under(self, policy: str, config: MACSConfig, profile: Profile | None = None) -> Measured:
        """What a policy and its settings do to the requests of both halves, of all ranks."""
        self.runtime.use(policy, config.updated(min_tokens=0), profile)
        return self._measured([*self.halves["tune"], *self.halves["verify"]])

    def _measured(self, batches: Sequence[Batch]) -> Measured:
        kl: list[float] = []
        same: list[bool] = []
        for batch in batches:
            said = self.said(batch.prompts, batch.answers)
            for expected, found, ids in zip(batch.expected, said, batch.answers, strict=True):
                kl.append(divergence(expected, found))
                same.append(found.argmax(-1).tolist() == ids)
            self.passes += 1
        return Measured(self._loads("after"), np.array(self._gathered(kl)), np.array(self._gathered(same)))

    def natural(self) -> np.ndarray:
        """Loads [G] without a bound, on the tuning half."""
        self.measure("tune", [UNBOUNDED] * self.groups)
        return self._loads("before")

    @torch.inference_mode()
    def profile(self) -> Profile:
        """Which expert serves which modality, on the tuning half."""
        with self.runtime.calibration():
            for batch in self.halves["tune"]:
                self.said(batch.prompts, batch.answers)
        return self.runtime.measured_profile(self.group)

    @torch.inference_mode()
    def observe(self, half: str, callbacks: Mapping[LayerRuntime, OutputCallback]) -> None:
        """Read the requests of a half without a plan; callbacks get the routed output of some layers."""
        ends = [layer.on_output(callback) for layer, callback in callbacks.items()]
        try:
            with self.runtime.calibration():
                for batch in self.halves[half]:
                    self.said(batch.prompts, batch.answers)
                    self.passes += 1
        finally:
            for end in ends:
                end()

    def requests(self, half: str) -> int:
        """Of a half, over all ranks."""
        return len(self._gathered([None for batch in self.halves[half] for _ in batch.answers]))

    def _loads(self, stage: str) -> np.ndarray:
        by_layer = [float(one.load(stage).mean()) for one in self.runtime.reports(self.group)]
        return np.array(by_layer).reshape(self.groups, -1).mean(1)

    def _gathered(self, mine: list[Any]) -> list[Any]:
        if self.group is None:
            return mine
        parts: list[list[Any]] = [[] for _ in range(dist.get_world_size(self.group))]
        dist.all_gather_object(parts, mine, self.group)
        return [one for part in parts for one in part]
