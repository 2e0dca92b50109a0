"""MACS in a running model: the object that all its MoE layers share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..config import MACSConfig
from ..files import check_output, rank_and_world
from ..policies import policy_of
from ..records.compensation import SCOPES
from ..records.counters import Counters
from ..records.load import LayerReport
from ..records.profile import Calibration, Profile, router_fingerprint
from ..records.recording import RoutingRecorder
from ..records.tuning import compensation_of, target_of
from ..topology import Topology
from .adapter import LayerAdapter
from .layer import LayerRuntime
from .state import Callback, PlanEvent, RuntimeState, capturing

DRIFT_WARNING = 0.15
"""Share of assignments at other experts than in the profile that is worth a warning."""


class Runtime(RuntimeState):
    """The policy of a model's MoE layers, to be switched, calibrated and read while it runs.

    Args:
        config, policy, profile: as in ``use``.
        virtual_ranks: plan as so many expert-parallel ranks would, with the batch divided among them; for
            measurements in one process, only where the engine itself has one rank.
    """

    def __init__(
        self,
        config: MACSConfig | None = None,
        *,
        policy: str = "macs",
        profile: Profile | None = None,
        virtual_ranks: int = 1,
    ) -> None:
        super().__init__(virtual_ranks)
        self.use(policy, config, profile)

    def _forget_process(self) -> None:
        super()._forget_process()
        self._calibrations: weakref.WeakKeyDictionary[LayerRuntime, Calibration] = weakref.WeakKeyDictionary()
        self._recorder: tuple[RoutingRecorder, Callable[[], None]] | None = None
        self._end_calibration: Callable[[], None] | None = None

    def use(
        self, policy: str = "macs", config: MACSConfig | None = None, profile: Profile | None = None
    ) -> None:
        """Switch policy, settings and profile of every layer, from the next forward pass on.

        Drops the records. It waits for a pass of another thread. Call it on every rank alike, with several
        ranks between the same two passes: they compare what they were given before anything takes effect.
        Another ``target_load`` or ``max_kl`` alone is applied in place, also in captured graphs.

        Args:
            policy: a name of ``POLICIES``.
            config: the settings; none: the defaults.
            profile: of this model; none: no modality bias and no tuning.

        Raises:
            ValueError: no policy has that name, an engine cannot do what it needs, or the profile has no
                tuning and the settings need one.
            RankMismatch: another rank was given something else.
            RuntimeError: a CUDA graph has captured MACS layers, and more than the target changes; or it is
                called inside a forward pass.
        """
        config = MACSConfig() if config is None else config
        if not isinstance(config, MACSConfig):
            raise TypeError(f"Runtime.use: found config {config!r}, expected a macs.MACSConfig")
        if profile is not None and not isinstance(profile, Profile):
            raise TypeError(
                f"Runtime.use: found profile {profile!r}, expected a macs.Profile; Profile.load reads one"
            )
        policy_of(policy)
        if config.split == "tuned" and (profile is None or profile.tuning is None):
            found = "no profile" if profile is None else "a profile without a tuning"
            raise ValueError(f"config.split: found 'tuned' and {found}, expected one that macs tune wrote")
        if SCOPES.get(config.compensation) and (profile is None or profile.compensation is None):
            found = "no profile" if profile is None else "a profile without compensation"
            raise ValueError(
                f"config.compensation: found {config.compensation!r} and {found}, expected one that "
                "macs tune --compensation-rank wrote"
            )
        if config.max_kl is not None:
            target_of(config, None if profile is None else profile.tuning)  # raises
        self._check_tuning(policy, config, profile, {layer.topology.num_ranks for layer in self.layers})
        if self._inside:
            raise RuntimeError("Runtime.use: found inside a forward pass, expected between two")
        self._targets(policy, config, profile)  # raises, before the ranks compare
        for group in {id(layer.adapter.group): layer.adapter.group for layer in self.layers}.values():
            consistency = self.consistency_of(group)
            if consistency is not None:
                consistency.compare(self.chosen(policy, config, profile))
        with self.between_passes():
            targets = self._targets(policy, config, profile)
            self.policy, self.config, self.profile = policy, config, profile
            for layer in self.layers:
                if targets is not None:
                    layer.retarget(targets[layer])
                else:
                    layer.adapter.refetch()  # weights may be others by now
                    layer.reset()

    def _targets(
        self, policy: str, config: MACSConfig, profile: Profile | None
    ) -> dict[LayerRuntime, float | None] | None:
        """The ``target_load`` of every layer where only the target changes, otherwise none; raises where the
        change cannot be made."""
        if self._retargets(policy, config, profile):
            return {layer: layer.target_under(config) for layer in self.layers}
        self._refuse_captured("use")
        for layer in self.layers:
            self.check_adapter(layer.adapter, policy, config)
        return None

    def _check_tuning(
        self, policy: str, config: MACSConfig, profile: Profile | None, ranks: set[int]
    ) -> None:
        """A KL holds for what it was verified with: others are an error under ``max_kl``, else a warning."""
        if config.split != "tuned" or profile is None or profile.tuning is None:
            return
        different = profile.tuning.differences(policy, config, ranks)
        if different and config.max_kl is not None:
            raise ValueError(
                f"config.max_kl: found {different}, expected what the profile's tuning verified its KL with; "
                "tune with these, or give a target_load"
            )
        if different:
            self.warn_once(f"MACS: the KL of the profile's tuning was not verified for {different}")

    def _retargets(self, policy: str, config: MACSConfig, profile: Profile | None) -> bool:
        """Whether only the target differs from the current one."""
        former: MACSConfig | None = getattr(self, "config", None)
        if former is None or policy != self.policy or profile is not self.profile:
            return False
        tuning = None if profile is None else profile.tuning
        if former == config or None in (target_of(former, tuning), target_of(config, tuning)):
            return False
        if not former.bound_given and policy_of(policy).default_bound is not None:
            return False
        if compensation_of(former, tuning) != compensation_of(config, tuning):
            return False
        same = {"target_load": 1.0, "split": "uniform"}
        return former.updated(**same) == config.updated(**same)

    # Layers.

    def add_layer(self, adapter: LayerAdapter) -> LayerRuntime:
        """Register a MoE layer, for engine adapters.

        The layer lives as long as the engine's module that holds the result.

        Raises:
            ValueError: the engine cannot do there what the policy needs.
        """
        topology = adapter.topology
        if self.virtual_ranks > 1:
            if topology.num_ranks > 1:
                raise ValueError(
                    f"virtual_ranks: found {self.virtual_ranks}, but the engine itself has "
                    f"{topology.num_ranks} expert-parallel ranks"
                )
            sources = tuple(range(self.virtual_ranks))
            topology = Topology(topology.num_experts, self.virtual_ranks, sources=sources)
        layer = LayerRuntime(self, len(self.layers), adapter, topology)
        rank_and_world()  # known from now on, also when the group is closed
        self.check_adapter(adapter, self.policy, self.config)
        self._check_tuning(self.policy, self.config, self.profile, {topology.num_ranks})
        self.register(layer)
        return layer

    def refresh(self) -> None:
        """Recompute what depends on the routers' weights, in place, also for captured graphs.

        Call it on every rank alike when weights were replaced while serving.
        """
        for layer in self.layers:
            layer.refresh()

    def on_plan(self, callback: Callback) -> Callable[[], None]:
        """``LayerRuntime.on_plan`` for every layer, also those added later."""
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def _refuse_captured(self, what: str) -> None:
        """A graph replays what it captured, and reads the memory of the planner it captured."""
        if any(layer.captured for layer in self.layers):
            raise RuntimeError(
                f"{what}: a CUDA graph has captured MACS layers, and replays their policy and settings; "
                "expected it before the engine captures"
            )

    # Calibration and recording.

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """In this block nothing is planned, and every layer counts assignments by expert and modality;
        ``measured_profile`` then returns the profile."""
        self.start_calibration()
        try:
            yield
        finally:
            self.stop_calibration()

    def start_calibration(self) -> None:
        """As ``calibration``, until ``stop_calibration``; layers may still be added."""
        self._refuse_captured("calibration")
        self._calibrations.clear()

        def count(event: PlanEvent) -> None:
            own = self._calibrations.setdefault(event.layer, Calibration(event.layer.topology.num_experts))
            own.observe(event.experts, event.tokens)

        self._end_calibration = self.on_plan(count)
        self.calibrating = True

    def stop_calibration(self) -> None:
        """Plan again."""
        self.calibrating = False
        if self._end_calibration is not None:
            self._end_calibration()
            self._end_calibration = None

    def measured_profile(self, group: dist.ProcessGroup | None = None) -> Profile:
        """The profile of the last ``calibration``, summed over the group's members if one is given."""
        if not self.layers:
            raise ValueError("calibration: the model has no MACS layer")
        device = self.layers[0].adapter.router_weight().device
        sizes = sorted({layer.topology.num_experts for layer in self.layers})
        if len(sizes) > 1:
            raise ValueError(
                f"calibration: found layers of {', '.join(map(str, sizes))} experts (as in PR-MoE); "
                "the layers of a profile are alike"
            )
        empty = Calibration(sizes[0])
        counts = torch.stack(
            [self._calibrations.get(layer, empty).counts(device) for layer in self.layers]
        )  # [L, 2, E]
        if group is not None:
            dist.all_reduce(counts, group=group)
        counts = counts.cpu()
        if not bool(counts.any()):
            raise ValueError("calibration: no tokens were observed; was the model run, in eval() mode?")
        return Profile(
            visual=counts[:, 1].contiguous(),
            text=counts[:, 0].contiguous(),
            fingerprints=tuple(router_fingerprint(layer.adapter.router_weight()) for layer in self.layers),
            top_k=self.layers[0].top_k,
        )

    @contextmanager
    def record_routing(self, path: str | Path, **options: Any) -> Iterator[RoutingRecorder]:
        """In this block the routing of every layer is recorded, under any policy, and written to ``path`` at
        its end (with several ranks one file each, with the rank in its name).

        ``options`` are those of ``RoutingRecorder``. Steps that are too small to plan are not recorded.
        """
        path = check_output(path, "record_routing")
        recorder = self.start_routing(**options)
        try:
            yield recorder
        finally:
            self.save_routing(path)

    def start_routing(self, **options: Any) -> RoutingRecorder:
        """As ``record_routing``, until ``save_routing``."""
        self._refuse_captured("record_routing")
        if self._recorder is not None:
            raise ValueError("record_routing: found another recording, expected one at a time")
        recorder = RoutingRecorder(**options)

        def observe(event: PlanEvent) -> None:
            if capturing(event.hidden.device):
                raise RuntimeError("record_routing: a CUDA graph captures this layer; record without graphs")
            if event.plan is not None:
                layer = event.layer.index
                recorder.observe(layer, event.experts, event.weights, event.scores, event.tokens)

        self._recorder = recorder, self.on_plan(observe)
        return recorder

    def save_routing(self, path: str | Path) -> Path | None:
        """Write the recording, if there is one, and stop; see ``RoutingRecorder.save``."""
        if self._recorder is None:
            return None
        (recorder, stop), self._recorder = self._recorder, None
        stop()
        return recorder.save(path, self.layers[0].topology.num_ranks if self.layers else 1)

    # Reports.

    def reports(self, group: dist.ProcessGroup | None = None) -> list[LayerReport]:
        """The records of every layer, in the order of the layers; see ``LayerRecorder.read``."""
        return [layer.recorder.read(group) for layer in self.layers]

    def drift(self, group: dist.ProcessGroup | None = None) -> list[tuple[float, float]]:
        """How far the recorded traffic of every layer is from the profile, (visual, text): see
        ``Profile.drift``; 0 where nothing was recorded.

        Synchronises; with a group, as ``reports`` does. Warns once if the traffic of a layer has moved so far
        that its experts' modality biases may have changed.
        """
        if self.profile is None:
            raise ValueError("drift: no profile to compare with; expected one in Runtime or use")
        moved = []
        for layer, report in zip(self.layers, self.reports(group), strict=True):
            visual, every = (report.rows_of_experts(stage).sum(0) for stage in ("visual", "before"))
            row = self.profile.row_of(layer.adapter.router_weight(), layer.top_k)
            moved.append(self.profile.drift(row, visual, every - visual))
        if max((max(one) for one in moved), default=0.0) > DRIFT_WARNING:
            self.warn_once(
                f"MACS: traffic differs from the profile: in a layer more than {DRIFT_WARNING:.0%} of the "
                "visual or text assignments go to other experts; Runtime.drift returns the shares; calibrate "
                "again"
            )
        return moved

    def start_counting(self) -> Counters:
        """Count every step of every layer from now on, across ``use`` and ``clear``; for ``serve_metrics``.

        Raises:
            RuntimeError: a CUDA graph has captured MACS layers, which would replay without counting.
        """
        if self.counters is None or self.counters.forked:
            if any(layer.graphed for layer in self.layers):
                raise RuntimeError(
                    "counting: a CUDA graph has captured MACS layers, and would replay them without; "
                    "expected it before the engine captures"
                )
            self.counters = Counters()
        return self.counters

    def clear(self) -> None:
        """Drop the records; counters go on."""
        for layer in self.layers:
            layer.recorder.clear()
