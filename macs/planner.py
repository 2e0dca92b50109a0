"""The planner: a router's choice in, a plan out.

Shapes: T tokens, D features, E experts, k assignments of a token (k' with those a policy adds), S sources,
R ranks, P pools.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.autograd.profiler import record_function
from torch.nn import functional

from .checks import FLOATS, expect
from .config import MACSConfig
from .policies import Policy, policy_of
from .steps.admission import admit
from .steps.capacity import GroupField, group_rows, measure_capacities
from .steps.combine import Plan, add_local_experts, combine
from .steps.contracts import (
    UNIT,
    AdmissionRule,
    Capacities,
    CapacityRule,
    Counts,
    LayerConstants,
    Placement,
    Routing,
    record_size,
)
from .steps.demand import measure_demand
from .steps.drops import limit_drops
from .steps.kernels.dispatch import on_device
from .steps.rerouting import reroute
from .steps.weighting import WeightRule, semantic_weights
from .tokens import Tokens
from .topology import Topology

SumOverGroup = Callable[[Tensor], None]
"""Adds a tensor of every member of a process group, in place, as an all-reduce does."""

STEPS = ("weights", "demand", "capacities", "admission", "rerouting", "drops", "combine")


def step(name: str) -> AbstractContextManager[object]:
    """Around a step of ``STEPS``: ``record_function`` of "macs::" and its name, while a profiler runs."""
    return record_function(f"macs::{name}") if _profiler_enabled() else nullcontext()


class Planner:
    """The planner of one MoE layer: ``plan`` turns the router's choice into a ``Plan``.

    Nothing in ``plan`` reads a tensor on the host, loops over tokens or experts, or, on a GPU, makes a tensor
    with a shape that depends on values. The first call on a device puts the constants there.

    Args:
        config: the user's settings; what the policy fixes is replaced.
        topology: where experts are, and which sources are planned.
        top_k: k, experts a token.
        policy: a name of ``POLICIES``, or a row.
        modality_bias: m_j in -1..1 of each expert (``Profile.bias``); none: 0.
        similarity: [E, E] in 0..1 (``router_similarity``); none: 1.

    Raises:
        ValueError: no policy has that name, or a value does not fit the topology.
    """

    def __init__(
        self,
        config: MACSConfig,
        topology: Topology,
        top_k: int,
        policy: str | Policy = "macs",
        *,
        modality_bias: Sequence[float] | Tensor | None = None,
        similarity: Tensor | None = None,
    ) -> None:
        experts = topology.num_experts
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: found {top_k}, expected 1 to {experts}, the number of experts")
        self.policy = policy_of(policy) if isinstance(policy, str) else policy
        self.config = self.policy.configured(config)
        self.topology = topology
        self.top_k = top_k
        self._bias = torch.as_tensor(
            [0.0] * experts if modality_bias is None else modality_bias, dtype=torch.float64
        ).cpu()
        expect("modality_bias", self._bias, (experts,), (torch.float64,))
        self._similarity = torch.ones(experts, experts) if similarity is None else similarity.detach().float()
        expect("similarity", self._similarity, (experts, experts), FLOATS)
        by_weight, settings = self.policy.cost == "weight", self.config
        rows_only = settings.capacity_factor is None and settings.level == "rank" and not by_weight
        self._weighting = WeightRule(
            settings.weighting, self.policy.sharpness, settings.visual_weight, len(topology.sources)
        )
        self._admission = AdmissionRule(self.policy.priority, by_weight)
        self._capacity = CapacityRule(
            settings.capacity_factor, rows_only, self.policy.modality_strength, self.policy.floor
        )
        self._on_device: dict[torch.device, LayerConstants] = {}

    @property
    def width(self) -> int:
        """k': assignments of a token in the plans."""
        return self.top_k + (self.topology.experts_per_rank if self.policy.adds_assignments else 0)

    def update_similarity(self, similarity: Tensor) -> None:
        """Replace the similarity, [E, E] in 0..1, in place, so that captured graphs read the new one."""
        experts = self.topology.num_experts
        expect("similarity", similarity, (experts, experts), FLOATS)
        with torch.inference_mode():  # constants made in an engine's inference mode are inference tensors
            self._similarity = similarity.detach().float()
            for device, constants in self._on_device.items():
                constants.affinity.copy_(self._affinity().to(device))

    def update_target(self, target: float) -> None:
        """Replace ``target_load`` in place, so that captured graphs read the new one.

        Raises:
            ValueError: this planner was not made with a ``target_load``.
        """
        if self.config.target_load is None:
            raise ValueError("update_target: found a planner without target_load, expected one with it")
        self.config = self.config.updated(target_load=target)
        with torch.inference_mode():  # as above
            for constants in self._on_device.values():
                constants.target_load.fill_(target)

    def bypasses(self, count: int, device: torch.device) -> bool:
        """Whether so many tokens on this device are too few to plan, as in decoding."""
        return count < self.config.least_tokens(device.type)

    def plan(
        self,
        hidden: Tensor,
        experts: Tensor,
        weights: Tensor,
        scores: Tensor,
        tokens: Tokens | None = None,
        *,
        statistics: bool = True,
        sum_over_group: SumOverGroup | None = None,
    ) -> Plan:
        """Plan one layer.

        Args:
            hidden: features that enter the layer, [T, D], any float dtype.
            experts: the router's choice, int64 [T, k]; -1: none.
            weights: its combine weights, [T, k], any float dtype.
            scores: the router's scores of every expert, [T, E] in 0..1, without correction bias.
            tokens: modality, padding and order of the tokens; none: all are text.
            statistics: whether the plan has statistics.
            sum_over_group: where other processes plan the other sources of a batch. With a ``target_load`` of
                1 or more it is called once a plan (``shares_bound``), with int64 [4, R]; without it the
                sources of this process share a bound among themselves.

        Returns:
            Where every assignment goes; the router's choice itself for fewer than ``min_tokens`` tokens.

        Raises:
            ValueError: a shape or dtype does not fit; the message names argument, found and expected.
        """
        count, device = hidden.shape[0], hidden.device
        tokens = Tokens.all_text(count, device) if tokens is None else tokens
        self._check(hidden, experts, weights, scores, tokens)
        routing = Routing(experts, weights, scores, self.top_k)
        with on_device(device):
            if not self.policy.plans or self.bypasses(count, device):
                return self._unchanged(hidden, routing, tokens, statistics)
            return self._planned(hidden, routing, tokens, statistics, sum_over_group)

    @property
    def shares_bound(self) -> bool:
        """Whether sources lend one another what their bounds leave: for a ``target_load`` of 1 or more."""
        target = self.config.target_load
        return self.policy.plans and target is not None and target >= 1

    def no_rows(self, device: torch.device) -> Tensor:
        """What a process whose step is too small to plan adds in ``sum_over_group``: zeros int64 [4, R]."""
        return torch.zeros(len(GroupField), self.topology.num_ranks, dtype=torch.int64, device=device)

    def _planned(
        self,
        hidden: Tensor,
        routing: Routing,
        tokens: Tokens,
        statistics: bool,
        sum_over_group: SumOverGroup | None,
    ) -> Plan:
        config, constants = self.config, self.constants(hidden.device)
        if config.spare_text:
            tokens = tokens.with_text_exempt()
        if self.policy.adds_assignments:
            routing = add_local_experts(routing, tokens, constants)
        counts = self._counts(hidden, statistics)
        with step("weights"):
            weights = semantic_weights(hidden, tokens, self._weighting, counts, statistics)
        with step("demand"):
            demand = measure_demand(routing, tokens, weights.weight, self._admission, counts)
        with step("capacities"):
            group = None
            if self.shares_bound and (sum_over_group is not None or len(self.topology.sources) > 1):
                group = group_rows(counts, constants, self.top_k)
                if sum_over_group is not None:
                    sum_over_group(group)
            capacities = measure_capacities(counts, constants, self._capacity, self.top_k, group)
        with step("admission"):
            placement = admit(demand, capacities, constants)
        if config.reroute != "none":
            with step("rerouting"):
                placement = reroute(demand, placement, constants, self.policy.reroute_rounds)
        if config.max_drop is not None:
            with step("drops"):
                placement = limit_drops(demand, placement, constants, config.max_drop)
        with step("combine"):
            return combine(demand, placement, capacities, weights.finite, counts)

    def _unchanged(self, hidden: Tensor, routing: Routing, tokens: Tokens, statistics: bool) -> Plan:
        """The router's choice as a plan; its loads are counted, and every token weighs one."""
        added = self.width - self.top_k
        experts = functional.pad(routing.experts, (0, added), value=-1)
        weights = functional.pad(routing.weights, (0, added))
        if not statistics:
            return Plan(experts, weights, torch.zeros_like(experts, dtype=torch.bool), None)
        counts = self._counts(hidden, statistics)
        weight = torch.full_like(tokens.position, UNIT)
        padded = Routing(experts, weights, routing.scores, self.top_k)
        demand = measure_demand(padded, tokens, weight, AdmissionRule("score", False), counts)
        tokens_of = counts.tokens
        idle = Capacities(tokens_of[:, None], None, torch.zeros_like(tokens_of, dtype=torch.bool), False)
        placement = Placement(experts, idle.pools)
        return combine(demand, placement, idle, torch.ones_like(tokens.valid), counts)

    def _counts(self, hidden: Tensor, statistics: bool) -> Counts:
        """Zeros in the shapes that this planner's steps add to."""
        sources, experts = len(self.topology.sources), self.topology.num_experts
        shapes: dict[str, tuple[int, ...]] = {"by_source": (3, sources), "rows": (sources, experts)}
        if self._admission.by_weight:
            shapes["cost"] = sources, experts
        if statistics:
            shapes["record"] = (record_size(experts),)
        return Counts.zeros(shapes | self._weighting.shapes(hidden.shape[1]), hidden.device)

    def _check(
        self, hidden: Tensor, experts: Tensor, weights: Tensor, scores: Tensor, tokens: Tokens
    ) -> None:
        expect("hidden", hidden, (None, None), FLOATS)
        count, device = hidden.shape[0], hidden.device
        if experts.dim() == 2 and experts.shape[1] != self.top_k:
            raise ValueError(
                f"experts: found {experts.shape[1]} a token, expected top_k = {self.top_k}, that of the layer"
            )
        expect("experts", experts, (count, self.top_k), (torch.int64,), device)
        expect("weights", weights, (count, self.top_k), FLOATS, device)
        expect("scores", scores, (count, self.topology.num_experts), FLOATS, device)
        expect("modality mask", tokens.modality, (count,), (torch.int8,), device)

    def _affinity(self) -> Tensor:
        """Similarity of the experts, 0 where rerouting is not allowed: float32 [E, E]."""
        rank = torch.tensor(self.topology.expert_rank)
        if self.config.reroute == "group":
            return self._similarity.cpu().contiguous()
        return (self._similarity.cpu() * (rank[:, None] == rank)).contiguous()

    def constants(self, device: torch.device) -> LayerConstants:
        """The layer's constants on a device; made there on first use."""
        if device not in self._on_device:
            topology, by_expert = self.topology, self.config.level == "expert"
            rank_of_expert = torch.tensor(topology.expert_rank)
            by_rank = torch.tensor(topology.experts_of_rank())
            target = math.inf if self.config.target_load is None else self.config.target_load
            constants = LayerConstants(
                pool_of_expert=torch.arange(topology.num_experts) if by_expert else rank_of_expert,
                rank_of_expert=rank_of_expert,
                affinity=self._affinity(),
                modality_bias=self._bias.contiguous(),
                target_load=torch.tensor([target], dtype=torch.float64),
                local_experts=by_rank[torch.tensor(topology.sources)],
                pools=topology.num_experts if by_expert else topology.num_ranks,
                ranks=topology.num_ranks,
                min_tokens=self.config.least_tokens(device.type),
            )
            self._on_device[device] = constants.to(device)
        return self._on_device[device]


def router_similarity(router_weight: Tensor) -> Tensor:
    """Similarity of experts by their router rows, (1 + cos) / 2.

    Rounded to 1/65536, so that every device and rank has the same numbers.

    Args:
        router_weight: [E, D], any float dtype.

    Returns:
        float32 [E, E] in 0..1, on the weight's device.
    """
    expect("router_weight", router_weight, (None, None), FLOATS)
    rows = functional.normalize(router_weight.detach().double(), dim=1)
    similarity = ((1 + rows @ rows.T) / 2).clamp(0, 1)
    return ((similarity * UNIT).round() / UNIT).float()
