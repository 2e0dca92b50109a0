"""MACS in a running model: one object that all its MoE layers share, and all state there is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import MACSConfig
from .metrics import LayerRecorder, LayerReport
from .modality import Modality, Tokens, current_modality
from .plan import Plan
from .planner import Planner, router_similarity
from .policies import build_policy
from .profile import Calibration, Profile, router_fingerprint
from .recording import RoutingRecorder
from .topology import Topology

logger = logging.getLogger(__name__)

DRIFT_WARNING = 0.15
"""Share of assignments at other experts than in the profile that is worth a warning."""


class Runtime:
    """The policy of a model's MoE layers, to be switched, calibrated and read while it runs.

    config, policy, profile: what ``use`` takes. virtual_ranks: plan as if there were so many
    expert-parallel ranks, with the batch divided among them; for measuring, in one process, what
    several would do. Only where the engine itself has one.
    """

    def __init__(
        self,
        config: MACSConfig | None = None,
        *,
        policy: str = "macs",
        profile: Profile | None = None,
        virtual_ranks: int = 1,
    ) -> None:
        self.enabled = True
        self.recording = True
        self.virtual_ranks = virtual_ranks
        self.layers: list[LayerRuntime] = []
        self.calibrating = False
        self.routing: RoutingRecorder | None = None
        self._warned: set[str] = set()
        self.use(policy, config, profile)

    def use(
        self, policy: str = "macs", config: MACSConfig | None = None, profile: Profile | None = None
    ) -> None:
        """Switch policy, settings and profile for every layer, from the next forward pass on.

        Forgets what was recorded. Call it on every rank alike.
        """
        config = MACSConfig() if config is None else config
        self._refuse_captured("use")
        # An unknown policy, or a profile that lacks something, is told here and changes nothing.
        build_policy(policy, config.updated(similarity="none"), Topology(1), 1)
        if config.similarity == "profile" and (profile is None or profile.similarity is None):
            raise ValueError("config.similarity: found 'profile', but no profile has a similarity matrix")
        for layer in self.layers:
            layer.check(policy, config)
        self.policy, self.config, self.profile = policy, config, profile
        for layer in self.layers:
            layer.reset()

    def add_layer(
        self,
        router_weight: Callable[[], Tensor],
        topology: Topology,
        top_k: int,
        group: dist.ProcessGroup | None = None,
        check: Callable[[str, MACSConfig], None] | None = None,
        part: Callable[[], tuple[int, int]] = lambda: (0, 1),
    ) -> LayerRuntime:
        """Register a MoE layer; for engine adapters.

        ``router_weight`` returns the router's rows [E, D] once weights are loaded. ``group`` holds
        the processes whose tokens meet in this layer's experts. ``check`` raises a ``ValueError`` for a
        policy and settings that the engine cannot honour here, now or when ``use`` asks for them.
        ``part`` tells (index, parts): under sequence parallelism this process has the index-th part of
        every sequence, while masks cover whole ones. An engine may change its mind about that.
        """
        if check is not None:
            check(self.policy, self.config)
        if self.virtual_ranks > 1:
            if topology.num_ranks > 1:
                raise ValueError(
                    f"virtual_ranks: found {self.virtual_ranks}, but the engine itself has "
                    f"{topology.num_ranks} expert-parallel ranks"
                )
            topology = Topology(
                topology.num_experts, self.virtual_ranks, sources=tuple(range(self.virtual_ranks))
            )
        layer = LayerRuntime(self, len(self.layers), router_weight, topology, top_k, group, check, part)
        self.layers.append(layer)
        return layer

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """Within this block nothing is planned, and every layer counts whom its experts serve;
        ``measured_profile`` then has the result."""
        self.start_calibration()
        try:
            yield
        finally:
            self.calibrating = False

    def start_calibration(self) -> None:
        """As ``calibration``, for a run that does nothing else; layers may still be added."""
        self._refuse_captured("calibration")
        for layer in self.layers:
            layer.calibration = Calibration(layer.topology.num_experts)
        self.calibrating = True

    @contextmanager
    def record_routing(self, path: str | Path, **options: Any) -> Iterator[RoutingRecorder]:
        """Within this block every layer's routing is recorded, under whatever policy is in force, and
        written to ``path`` at its end (with several ranks, one file each, with the rank in its name).

        ``options`` are those of ``RoutingRecorder``. Steps that are left alone, such as decoding, are not
        recorded.
        """
        path = Path(path).resolve()
        if not path.parent.is_dir():
            raise ValueError(f"record_routing: found no folder {path.parent}")
        recorder = self.start_routing(**options)
        try:
            yield recorder
        finally:
            self.save_routing(path)

    def start_routing(self, **options: Any) -> RoutingRecorder:
        """As ``record_routing``, for a run that does nothing else; ``save_routing`` ends it."""
        self._refuse_captured("record_routing")
        if self.routing is not None:
            raise ValueError("record_routing: found another recording under way, expected one at a time")
        self.routing = RoutingRecorder(**options)
        return self.routing

    def save_routing(self, path: str | Path) -> Path | None:
        """Write what is being recorded, if anything is, and stop; see ``RoutingRecorder.save``."""
        recorder, self.routing = self.routing, None
        if recorder is None:
            return None
        return recorder.save(path, self.layers[0].topology.num_ranks if self.layers else 1)

    def measured_profile(self, group: dist.ProcessGroup | None = None) -> Profile:
        """The profile of the last ``calibration`` block, summed over the group's members."""
        if not self.layers:
            raise ValueError("calibration: the model has no MACS layer")
        device = self.layers[0].router_weight().device
        counts = torch.stack([layer.calibration.counts(device) for layer in self.layers])  # [L, 2, E]
        if group is not None:
            dist.all_reduce(counts, group=group)
        counts = counts.cpu()
        if not bool(counts.any()):
            raise ValueError("calibration: no tokens were observed; was the model run, in eval() mode?")
        return Profile(
            visual=counts[:, 1].contiguous(),
            text=counts[:, 0].contiguous(),
            fingerprints=tuple(router_fingerprint(layer.router_weight()) for layer in self.layers),
            top_k=self.layers[0].top_k,
        )

    def reports(self, group: dist.ProcessGroup | None = None) -> list[LayerReport]:
        """What every layer recorded, in the order of the layers; see ``LayerRecorder.read``."""
        return [layer.recorder.read(group) for layer in self.layers]

    def drift(self, group: dist.ProcessGroup | None = None) -> list[tuple[float, float]]:
        """How far the recorded traffic of every layer is from the profile, (visual, text): see
        ``Profile.drift``; 0 where nothing was recorded since.

        Synchronises; with a group, as ``reports`` does. Warns, once, when the traffic of a layer has moved
        so far that its experts' modality biases may be others by now.
        """
        if self.profile is None:
            raise ValueError("drift: no profile to compare with; expected one in Runtime or use")
        found = []
        for layer, report in zip(self.layers, self.reports(group), strict=True):
            visual, every = report.loads("visual").sum(0), report.loads("before").sum(0)
            row = self.profile.row_of(layer.router_weight(), layer.top_k)
            found.append(self.profile.drift(row, visual, every - visual))
        if max((max(one) for one in found), default=0.0) > DRIFT_WARNING:
            self.say_once(
                f"MACS: the traffic is not what the profile was measured on: in a layer more than "
                f"{DRIFT_WARNING:.0%} of the visual or text assignments go to other experts than then; "
                "Runtime.drift has the figures; calibrate again"
            )
        return found

    def clear(self) -> None:
        """Forget what was recorded."""
        for layer in self.layers:
            layer.recorder.clear()

    def _refuse_captured(self, what: str) -> None:
        """A graph replays what it captured, and reads the memory of the planner it captured."""
        if any(layer.captured for layer in self.layers):
            raise RuntimeError(
                f"{what}: a CUDA graph has captured MACS layers, and replays the policy and settings of "
                "then; expected it before the engine captures"
            )

    def say_once(self, message: str) -> None:
        """Log a message the first time it is given."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


class LayerRuntime:
    """One MoE layer's part: its planner, its records, and the scores on their way to the planner."""

    def __init__(
        self,
        runtime: Runtime,
        index: int,
        router_weight: Callable[[], Tensor],
        topology: Topology,
        top_k: int,
        group: dist.ProcessGroup | None,
        check: Callable[[str, MACSConfig], None] | None,
        part: Callable[[], tuple[int, int]],
    ) -> None:
        self.runtime = runtime
        self.index = index
        self.router_weight = router_weight
        self.topology = topology
        self.top_k = top_k
        self.group = group
        self._check = check
        self._part = part
        self._parts = part()[1]
        self.captured = False
        self.calibration = Calibration(topology.num_experts)
        self._scores: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the planner and the records; needed when the model's weights change."""
        self._planner: Planner | None = None
        self.recorder = LayerRecorder(self.topology, self.top_k)

    def check(self, policy: str, config: MACSConfig) -> None:
        """Raise a ``ValueError`` if the engine cannot honour this policy or these settings here."""
        if self._check is not None:
            self._check(policy, config)

    @property
    def on(self) -> bool:
        """Whether MACS does anything now: plan, or observe for a calibration."""
        return self.runtime.enabled or self.runtime.calibrating

    def acts_on(self, count: int) -> bool:
        """Whether it does anything with a forward pass over ``count`` tokens, known without looking at
        them. Otherwise the layer is to be the engine's own, and costs what that does."""
        return self.runtime.calibrating or (self.runtime.enabled and not self.planner.leaves_alone(count))

    def offer_scores(self, scores: Tensor) -> None:
        """From the router: scores [T, E] of the tokens that are about to be dispatched."""
        self._scores = scores

    def take_scores(self) -> Tensor | None:
        """For the dispatcher: the scores offered since the last call, if any."""
        scores, self._scores = self._scores, None
        return scores

    def prepare(self, device: torch.device) -> None:
        """Make what a forward pass makes when it is the first: planner, constants, room for records.

        A CUDA graph can capture the layer only afterwards: making them reads weights and copies from
        the host.
        """
        self.planner.prepare(device)
        self.recorder.prepare(device)

    @property
    def planner(self) -> Planner:
        """The layer's planner; made on first use, when the router's weights are there."""
        if self._planner is None:
            runtime, config = self.runtime, self.runtime.config
            bias, similarity = None, None
            if runtime.profile is not None:
                row = runtime.profile.row_of(self.router_weight(), self.top_k)
                bias = runtime.profile.bias(config)[row]
                if config.similarity == "profile" and runtime.profile.similarity is not None:
                    similarity = runtime.profile.similarity[row]
            elif runtime.policy == "macs" and config.modality_strength > 0 and not config.pools_rows:
                runtime.say_once("MACS: no profile; no expert has a modality bias")
            if config.similarity == "router":
                similarity = router_similarity(self.router_weight())
            self._planner = build_policy(
                runtime.policy,
                config,
                self.topology,
                self.top_k,
                modality_bias=bias,
                similarity=similarity,
                group=self.group,
            )
        return self._planner

    def tokens(
        self,
        batch: int,
        length: int,
        sequence_major: bool,
        device: torch.device,
        first: int = 0,
        whole: int | None = None,
    ) -> Tokens:
        """The layer's tokens, B x S = batch x length of them, from the modality around the call.

        ``whole``: where this call has but a part of this process's tokens, from token ``first`` of every
        sequence on, how many of each sequence the process has. A mask of another shape or device is an
        error; no mask at all makes every token text.
        """
        whole = length if whole is None else whole
        index, parts = self._part()
        if parts != self._parts:
            self.check(self.runtime.policy, self.runtime.config)  # of what may hold no longer
            self._parts = parts
        expected = batch, whole * parts
        modality = self._modality(*expected, device)
        found = tuple(modality.kinds.shape)
        if found != expected:
            raise ValueError(
                f"modality mask: found shape {found}, the layer has {batch} sequences of {expected[1]} tokens"
            )
        return self._laid_out(modality.columns(index * whole + first, length), sequence_major)

    def counted_tokens(self, count: int, sequence_major: bool, device: torch.device) -> Tokens:
        """As ``tokens``, for an engine that says only how many tokens, B S = count, there are."""
        modality = self._modality(1, count, device)
        if modality.kinds.numel() != count:
            raise ValueError(
                f"modality mask: found shape {tuple(modality.kinds.shape)}, {modality.kinds.numel()} tokens; "
                f"the layer has {count}"
            )
        return self._laid_out(modality, sequence_major)

    def _modality(self, batch: int, length: int, device: torch.device) -> Modality:
        """The modality around the call; all text, [batch, length], where there is none."""
        modality = current_modality()
        if capturing(device) and (modality is None or not modality.held):
            raise RuntimeError(
                "modality: a CUDA graph captures this layer, and would replay the mask of this one step; "
                "expected attach_modality, which keeps masks where a graph finds them"
            )
        if modality is None:
            self.runtime.say_once(
                "MACS: no modality mask around this forward pass; every token counts as text"
            )
            return Modality.of(torch.zeros(batch, length, dtype=torch.bool, device=device))
        if modality.kinds.device != device:
            raise ValueError(
                f"modality mask: found on {modality.kinds.device}, the hidden states are on {device}"
            )
        return modality

    def _laid_out(self, modality: Modality, sequence_major: bool) -> Tokens:
        sources = len(self.topology.sources)
        return modality.sequence_major(sources) if sequence_major else modality.batch_major(sources)

    def plan(
        self, hidden: Tensor, experts: Tensor, weights: Tensor, scores: Tensor, tokens: Tokens
    ) -> Plan | None:
        """The plan of ``Planner.plan``; none while MACS is off or calibrating."""
        if self.runtime.calibrating:
            self.calibration.observe(experts, tokens)
            return None
        if not self.runtime.enabled:
            return None
        if self.runtime.routing is not None:
            if capturing(hidden.device):
                raise RuntimeError("record_routing: a CUDA graph captures this layer; record without graphs")
            self.runtime.routing.observe(self.index, experts, weights, scores, tokens)
        self.captured = self.captured or capturing(hidden.device)
        plan = self.planner.plan(hidden, experts, weights, scores, tokens)
        if self.runtime.recording:
            self.recorder.record(plan.statistics)
        return plan


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what is done on the device now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
