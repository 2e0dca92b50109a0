"""MACS in a running model: one object that all its MoE layers share, and all state there is."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import MACSConfig
from ..files import check_output
from ..policies import build_policy
from ..records.metrics import LayerReport
from ..records.profile import Calibration, Profile, router_fingerprint
from ..records.totals import Counters
from ..records.traffic import RoutingRecorder
from ..records.tuning import target_of
from ..topology import Topology
from ..version import __version__
from .adapter import Seam
from .agreement import Agreement
from .layer import LayerRuntime

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
        if profile is not None and not isinstance(profile, Profile):
            raise TypeError(
                f"Runtime.profile: found {profile!r}, expected a macs.Profile; Profile.load reads one"
            )
        self.enabled = True
        self.recording = True
        self.counters: Counters | None = None
        self.virtual_ranks = virtual_ranks
        self._layers: list[weakref.ref[LayerRuntime]] = []
        self._agreements: list[tuple[Any, Agreement]] = []
        self._told: tuple[MACSConfig, dict[str, Any], dict[str, Any]] | None = None
        self.calibrating = False
        self.routing: RoutingRecorder | None = None
        self._warned: set[str] = set()
        self.use(policy, config, profile)

    def use(
        self, policy: str = "macs", config: MACSConfig | None = None, profile: Profile | None = None
    ) -> None:
        """Switch policy, settings and profile for every layer, from the next forward pass on.

        Forgets what was recorded. Call it on every rank alike. Another ``target_load`` or ``max_kl`` alone is
        put where the planners read it, also in graphs that were captured.

        Raises:
            ValueError: no policy has that name, an engine cannot do what it needs, or a tuning is asked for
                that the profile has not.
            RuntimeError: a CUDA graph has captured MACS layers, and more than the target changes.
        """
        config = MACSConfig() if config is None else config
        if not isinstance(config, MACSConfig):
            raise TypeError(f"Runtime.use: found config {config!r}, expected a macs.MACSConfig")
        if profile is not None and not isinstance(profile, Profile):
            raise TypeError(f"Runtime.use: found profile {profile!r}, expected a macs.Profile")
        if config.split == "tuned" and (profile is None or profile.tuning is None):
            found = "no profile" if profile is None else "a profile without a tuning"
            raise ValueError(f"config.split: found 'tuned' and {found}, expected one that macs tune wrote")
        if self._retargets(policy, config, profile):
            self.config, self._told = config, None
            for layer in self.layers:
                layer.retarget()
            return
        self._refuse_captured("use")
        # An unknown policy, or a profile that lacks something, is told here and changes nothing.
        build_policy(policy, config.updated(similarity="none"), Topology(1), 1)
        for layer in self.layers:
            layer.check(policy, config)
        self.policy, self.config, self.profile = policy, config, profile
        self._told = None
        for layer in self.layers:
            layer.reset()

    def _retargets(self, policy: str, config: MACSConfig, profile: Profile | None) -> bool:
        """Whether nothing but the target is another than it was."""
        former: MACSConfig | None = getattr(self, "config", None)
        if former is None or policy != self.policy or profile is not self.profile:
            return False
        tuning = None if profile is None else profile.tuning
        if former == config or None in (target_of(former, tuning), target_of(config, tuning)):
            return False
        same = {"target_load": 1.0, "split": "uniform"}
        return former.updated(**same) == config.updated(**same)

    def bound_of(self, router_weight: Tensor, top_k: int, ranks: int) -> float:
        """``target_load`` of the layer with this router [E, D], as the profile's tuning splits it."""
        assert self.profile is not None and self.profile.tuning is not None
        tuning = self.profile.tuning
        target = target_of(self.config, tuning)
        assert target is not None
        if tuning.ranks != ranks:
            self.say_once(
                f"MACS: the profile's tuning was made for {tuning.ranks} expert-parallel ranks, here are "
                f"{ranks}: its damage was not measured for them"
            )
        if tuning.policy != self.policy:
            self.say_once(
                f"MACS: the profile's tuning was made for policy {tuning.policy}, not {self.policy}"
            )
        found = tuning.bounds_at(target)
        if found is None:
            self.say_once(
                f"MACS: target_load {target:g} is beyond the tuning's {float(tuning.targets[-1]):g} to "
                f"{float(tuning.targets[0]):g}; every layer is bounded alike"
            )
            return target
        if not found[1]:
            self.say_once(
                f"MACS: target_load {target:g} lies between verified ones; its split was not verified"
            )
        return float(found[0][self.profile.row_of(router_weight, top_k)])

    def add_layer(self, seam: Seam) -> LayerRuntime:
        """Register a MoE layer, for engine adapters; a ``ValueError`` if the engine cannot do there what the
        policy needs, now or when ``use`` asks for another.

        The layer lives as long as the engine's module that keeps what is returned.
        """
        topology = seam.topology
        if self.virtual_ranks > 1:
            if topology.num_ranks > 1:
                raise ValueError(
                    f"virtual_ranks: found {self.virtual_ranks}, but the engine itself has "
                    f"{topology.num_ranks} expert-parallel ranks"
                )
            topology = Topology(
                topology.num_experts, self.virtual_ranks, sources=tuple(range(self.virtual_ranks))
            )
        layer = LayerRuntime(self, len(self.layers), seam, topology)
        layer.check(self.policy, self.config)
        self._register(layer)
        return layer

    @property
    def layers(self) -> list[LayerRuntime]:
        """The layers that are alive, in the order in which they were added."""
        return [layer for layer in (one() for one in self._layers) if layer is not None]

    def _register(self, layer: LayerRuntime) -> None:
        self._layers = [one for one in self._layers if one() is not None]
        self._layers.append(weakref.ref(layer))
        if layer.agreement is None:
            layer.agreement = self._agreement_of(layer.group)
        if layer.agreement is not None:
            layer.agreement.layers.add(layer)

    def _agreement_of(self, group: dist.ProcessGroup | None) -> Agreement | None:
        """The one that all layers on these processes share; none for a process by itself."""
        if not isinstance(group, dist.ProcessGroup) or group.size() == 1:
            return None
        self._agreements = [(held, one) for held, one in self._agreements if len(one.layers)]
        for held, one in self._agreements:
            if held is group:
                return one
        made = Agreement(group)
        self._agreements.append((group, made))
        return made

    def settings(self, training: bool) -> dict[str, Any]:
        """What members of a group must have alike, as plain values."""
        now = {
            "enabled": self.enabled,
            "calibrating": self.calibrating,
            "training": training,
        }
        if self._told is None or self._told[0] is not self.config or self._told[1] != now:
            more = {
                **now,
                "macs version": __version__,
                "policy": self.policy,
                **{f"config.{name}": value for name, value in asdict(self.config).items()},
                "profile": None if self.profile is None else self.profile.digest,
                "virtual_ranks": self.virtual_ranks,
            }
            self._told = self.config, now, more
        return self._told[2]

    def refresh(self) -> None:
        """Make what depends on the routers' weights anew, in place, also for captured graphs.

        To be called, on every rank alike, when weights were exchanged while serving. What is not called is
        noticed where a weight's version or memory tells, and by itself after a number of steps.
        """
        for layer in self.layers:
            layer.seam.refetch()
            layer.refresh()

    def __getstate__(self) -> dict[str, Any]:
        # Layers come back with the modules that keep them, and register themselves.
        return {**vars(self), "_layers": [], "_agreements": [], "_told": None, "counters": None}

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """Within this block nothing is planned, and every layer counts tokens per expert and modality;
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

        ``options`` are those of ``RoutingRecorder``. Steps that are bypassed, such as decoding, are not
        recorded.
        """
        path = check_output(path, "record_routing")
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
        device = self.layers[0].seam.router_weight().device
        sizes = sorted({layer.topology.num_experts for layer in self.layers})
        if len(sizes) > 1:
            raise ValueError(
                f"calibration: found layers of {', '.join(map(str, sizes))} experts (as in PR-MoE); "
                "a profile is of layers alike"
            )
        counts = torch.stack([layer.calibration.counts(device) for layer in self.layers])  # [L, 2, E]
        if group is not None:
            dist.all_reduce(counts, group=group)
        counts = counts.cpu()
        if not bool(counts.any()):
            raise ValueError("calibration: no tokens were observed; was the model run, in eval() mode?")
        return Profile(
            visual=counts[:, 1].contiguous(),
            text=counts[:, 0].contiguous(),
            fingerprints=tuple(router_fingerprint(layer.seam.router_weight()) for layer in self.layers),
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
            row = self.profile.row_of(layer.seam.router_weight(), layer.top_k)
            found.append(self.profile.drift(row, visual, every - visual))
        if max((max(one) for one in found), default=0.0) > DRIFT_WARNING:
            self.say_once(
                f"MACS: the traffic is not what the profile was measured on: in a layer more than "
                f"{DRIFT_WARNING:.0%} of the visual or text assignments go to other experts than then; "
                "Runtime.drift has the figures; calibrate again"
            )
        return found

    def start_counting(self) -> Counters:
        """Count every step of every layer from now on, whatever is switched or cleared.

        ``serve_metrics`` reads the counters. Nothing is spent on them where nobody called this.

        Raises:
            RuntimeError: a CUDA graph has captured MACS layers, which would replay without counting.
        """
        if self.counters is None:
            if any(layer.graphed for layer in self.layers):
                raise RuntimeError(
                    "counting: a CUDA graph has captured MACS layers, and would replay them without; "
                    "expected it before the engine captures"
                )
            self.counters = Counters()
        return self.counters

    def clear(self) -> None:
        """Forget what was recorded; counters go on."""
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
