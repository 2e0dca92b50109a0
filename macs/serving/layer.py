"""One MoE layer in a running model: its planner, its records, the tokens that it has."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import MACSConfig
from ..plan import Plan
from ..planner import Planner, router_similarity
from ..policies import build_policy, policy_of
from ..records.metrics import LayerRecorder
from ..records.profile import Calibration
from ..tokens import Modality, Tokens
from ..topology import Topology
from .adapter import Seam
from .agreement import Agreement
from .context import needed_modality

if TYPE_CHECKING:
    from .runtime import Runtime

REFRESH_EVERY = 64
"""Planned steps of a layer after which its similarity is made anew from the router's weights, for those
who overwrite weights where nothing tells (``param.data.copy_``)."""


class LayerRuntime:
    """One MoE layer's part: its planner, its records, and the scores on their way to the planner.

    A copy of the module that keeps it has one of its own, of the same runtime and process group. Saved
    with a module, it comes back with a runtime of the same settings, and without a process group.
    """

    def __init__(self, runtime: Runtime, index: int, seam: Seam, topology: Topology) -> None:
        self.runtime = runtime
        self.index = index
        self.seam = seam
        self.topology = topology  # the seam's, or that of virtual ranks
        self.top_k = seam.top_k
        self.agreement: Agreement | None = None
        self._shared = seam.share()
        self._settle_place()
        self.captured = self.graphed = False  # its plans by a CUDA graph; anything of it
        self.calibration = Calibration(topology.num_experts)
        self._scores: Tensor | None = None
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerRuntime:
        made = object.__new__(LayerRuntime)
        memo[id(self)] = made
        shared = {"runtime": self.runtime, "topology": self.topology}
        own = {
            name: copy.deepcopy(value, memo)
            for name, value in self.__getstate__().items()
            if name not in (*shared, "calibration")
        }
        vars(made).update(own, **shared)
        if self.agreement is not None:  # the copy's layers share one of their own
            key = "macs agreement", id(self.agreement)
            if key not in memo:
                memo[key] = Agreement(self.group)  # type: ignore[index, arg-type]
            made.agreement = memo[key]  # type: ignore[index]
        made.__setstate__({})
        return made

    def __getstate__(self) -> dict[str, Any]:
        dropped = {"agreement": None, "_planner": None, "recorder": None, "_scores": None}
        return {**vars(self), **dropped, "calibration": None, "captured": False, "graphed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.calibration = Calibration(self.topology.num_experts)
        self.reset()
        self.runtime._register(self)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes whose tokens meet in the layer's experts."""
        return self.seam.group

    def reset(self) -> None:
        """Forget the planner and the records."""
        self._planner: Planner | None = None
        self.profile_row: int | None = None  # of the runtime's profile, as the planner has it
        self._weights_seen: tuple[int, int] | None = None
        self._steps_since = 0
        self.recorder = LayerRecorder(self.topology, self.top_k)

    def refresh(self) -> None:
        """Make the similarity anew from the router's weights as they are now, in place."""
        if self._planner is None:
            return
        self._steps_since = 0
        weight = self.seam.router_weight()
        self._weights_seen = seen_of(weight)
        if self.runtime.config.similarity == "router" and policy_of(self.runtime.policy).reads_modality:
            self._planner.update_similarity(router_similarity(weight))

    def _follow_weights(self) -> None:
        """``refresh`` where the router's weights are, or may be, others than they were."""
        weight = self.seam.router_weight()
        seen = seen_of(weight)
        self._steps_since += 1
        if seen != self._weights_seen or self._steps_since >= REFRESH_EVERY:
            self.refresh()

    @contextmanager
    def entering(self, count: int, device: torch.device, training: bool) -> Iterator[None]:
        """Around what a layer does with ``count`` tokens before its collectives; ``left`` comes after them.

        The first layer of a group's makes sure that all members run with the same settings; an error
        within leaves the others alone in the pass, and every later pass of this process is refused.
        """
        agreement = self.agreement
        captured = capturing(device)
        self.graphed |= captured
        if agreement is None or captured:
            self._count_bypassed(count, device, training)
            yield
            return
        try:
            agreement.refuse_broken()
            if self.index == agreement.first_layer():
                enough = count >= self.runtime.config.least_tokens(device.type)
                agreement.begin(self.runtime.settings(training), enough)
            self._count_bypassed(count, device, training)
            yield
        except BaseException as error:
            agreement.break_off(error)
            raise

    def _count_bypassed(self, count: int, device: torch.device, training: bool) -> None:
        """Tell the counters, if there are any, of a step too small to plan; in a captured graph, too."""
        runtime, counters = self.runtime, self.runtime.counters
        if counters is None or training or runtime.calibrating or not runtime.enabled:
            return
        if self.planner.bypasses(count, device):
            self._prepare_counters(device)
            counters.bypassed(self)

    def _prepare_counters(self, device: torch.device) -> None:
        if self.runtime.counters is not None and self not in self.runtime.counters:
            layers = {
                layer: (layer.topology, layer.top_k)
                for layer in self.runtime.layers
                # A model may lie on several GPUs: each has memory of its own.
                if layer is self or device.type == "cpu" or layer.seam.router_weight().device == device
            }
            self.runtime.counters.prepare(layers, device)

    def left(self) -> None:
        """The layer has made its last collective."""
        if self.agreement is not None:
            self.agreement.end(self.index)

    @contextmanager
    def forward_pass(self, count: int, device: torch.device, training: bool) -> Iterator[None]:
        """``entering`` and ``left``, around all that a layer does."""
        with self.entering(count, device, training):
            yield
        self.left()

    def _settle_place(self) -> None:
        place = self._shared.place
        if place is not None and len(self.topology.sources) == 1:
            self.topology = replace(self.topology, places=(place,))

    def check(self, policy: str, config: MACSConfig) -> None:
        """Raise a ``ValueError`` if the engine cannot honour this policy here; say what is of no use."""
        self.seam.limits().check(policy)
        for advice in self.seam.advice(policy, config):
            self.runtime.say_once(advice)

    @property
    def on(self) -> bool:
        """Whether MACS does anything now: plan, or observe for a calibration."""
        return self.runtime.enabled or self.runtime.calibrating

    def acts_on(self, count: int, device: torch.device) -> bool:
        """Whether it does anything with a forward pass over so many tokens on a device, known without looking
        at them. Otherwise the layer is to be the engine's own, and costs what that does."""
        runtime = self.runtime
        return runtime.calibrating or (runtime.enabled and not self.planner.bypasses(count, device))

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
        self._prepare_counters(device)

    @property
    def planner(self) -> Planner:
        """The layer's planner; made on first use, when the router's weights are there."""
        if self._planner is None:
            runtime, config = self.runtime, self.runtime.config
            bias, similarity = None, None
            reads = policy_of(runtime.policy).reads_modality
            if runtime.profile is not None:
                self.profile_row = runtime.profile.row_of(self.seam.router_weight(), self.top_k)
                bias = runtime.profile.bias(config)[self.profile_row]
            elif reads and self._biased(config):
                runtime.say_once("MACS: no profile; no expert has a modality bias")
            if config.similarity == "router":
                similarity = router_similarity(self.seam.router_weight())
            self._planner = build_policy(
                runtime.policy,
                self._own(config),
                self.topology,
                self.top_k,
                modality_bias=bias,
                similarity=similarity,
            )
            self._weights_seen = seen_of(self.seam.router_weight())
        return self._planner

    def _biased(self, config: MACSConfig) -> bool:
        """Whether the policy, as it sets these settings, lets capacities follow modality."""
        own = policy_of(self.runtime.policy).configured(config)
        return own.modality_strength > 0 and not own.pools_rows

    def _own(self, config: MACSConfig) -> MACSConfig:
        """The settings with this layer's bound, where the profile's tuning splits it."""
        if config.split == "uniform":
            return config
        bound = self.runtime.bound_of(self.seam.router_weight(), self.top_k, self.topology.num_ranks)
        return config.updated(target_load=bound, split="uniform")

    def retarget(self) -> None:
        """Take the bound of the runtime's settings, in place, and forget the records."""
        if self._planner is not None:
            target = self._own(self.runtime.config).target_load
            assert target is not None
            self._planner.update_target(target)
        self.recorder.clear()

    def tokens(
        self,
        batch: int,
        length: int,
        sequence_major: bool,
        device: torch.device,
        first: int = 0,
        chunks: int = 1,
    ) -> Tokens:
        """The layer's tokens, B x S = batch x length of them, from the modality around the call.

        Where an engine cuts what a process has into ``chunks``, this call has those from token ``first`` of
        every sequence on. A mask of another shape or device is an error that says what to do; no mask at all
        makes every token text.
        """
        share = self.seam.share()
        if share != self._shared:
            self.check(self.runtime.policy, self.runtime.config)  # of what may hold no longer
            self._shared = share
            self._settle_place()
            if self._planner is not None:
                self._refuse_moved()
                self._planner = None
        modality = self._modality(batch, length * share.parts, device)
        rows, columns = modality.kinds.shape
        whole = columns // share.parts
        size = -(-whole // max(1, min(chunks, whole)))  # as torch.chunk has it
        if length == whole:  # not cut: engines cut prompts alone, and only while they serve
            first, size = 0, whole
        if (rows, whole * share.parts) != (batch, columns) or length != min(size, whole - first):
            raise ValueError(misfit(modality, batch, length * share.parts))
        return self._laid_out(modality.columns(share.index * whole + first, length), sequence_major)

    def counted_tokens(self, count: int, sequence_major: bool, device: torch.device) -> Tokens:
        """As ``tokens``, for an engine that says only how many tokens, B S = count, there are."""
        modality = self._modality(1, count, device)
        if modality.kinds.numel() != count:
            raise ValueError(misfit(modality, None, count))
        return self._laid_out(modality, sequence_major)

    def _refuse_moved(self) -> None:
        if self.captured:
            raise RuntimeError("sequence parallelism changed after a CUDA graph captured this layer")

    def _modality(self, batch: int, length: int, device: torch.device) -> Modality:
        """The modality around the call; all text, [batch, length], where there is none."""
        modality = needed_modality()
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
        make = modality.sequence_major if sequence_major else modality.batch_major
        return make(len(self.topology.sources), self.runtime.config.normalization == "image")

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
        if capturing(hidden.device):
            self.captured = True
        else:
            self._follow_weights()
        counters = self.runtime.counters
        recorded = self.runtime.recording or counters is not None
        plan = self.planner.plan(hidden, experts, weights, scores, tokens, statistics=recorded)
        if plan.statistics is None:
            return plan
        if counters is None:
            self.recorder.record(plan.statistics)
        else:
            self._prepare_counters(hidden.device)
            self.recorder.record(plan.statistics, counters.row(self))
            counters.publish(self)
        return plan


def seen_of(weight: Tensor) -> tuple[int, int]:
    """What changes, without a look at its values, when a weight is replaced or written in the usual ways."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def misfit(modality: Modality, batch: int | None, length: int) -> str:
    """What to say of a mask that is of other tokens than a layer has, and what to do: [batch, length], or
    ``length`` tokens in all."""
    rows, columns = modality.kinds.shape
    if batch is None:
        said = f"found shape {(rows, columns)}, {rows * columns} tokens; the layer has {length}"
    else:
        said = f"found shape {(rows, columns)}, the layer has {batch} sequences of {length} tokens"
    count = length if batch is None else batch * length
    if batch == rows and length < columns:
        way_out = (
            "if this is a decoding step of generate() inside a macs.modality block, the block covers the "
            "prompt alone: use attach_modality, which follows every step, or set min_tokens above the "
            "batch size"
        )
    elif batch == 1 and count < rows * columns:
        way_out = (
            "if the model packs padded sequences by itself, the layers get fewer tokens than it was called "
            "with: use attach_modality on the model that is called with packed_seq_params too, or set "
            "macs.modality around that one"
        )
    else:
        way_out = "set macs.modality, or attach_modality, on the very call whose tokens reach this layer"
    return f"modality mask: {said}; {way_out}"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what is done on the device now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
