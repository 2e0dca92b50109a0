"""The planner: a router's choice in, a plan out.

Shapes: T tokens, D features, E experts, k assignments of a token (k' with those a policy adds),
S sources, R ranks, P pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .checks import FLOATS, expect
from .config import MACSConfig
from .plan import Plan, PlanStatistics
from .steps.admission import admit
from .steps.capacity import bounds_of, capacities
from .steps.combine import Findings, combine
from .steps.contracts import LOADS, SCALARS, Choice, Constants, Placement, Room, Sums, Terms
from .steps.demand import measure
from .steps.drops import limit_drops
from .steps.fixed_point import UNIT
from .steps.rerouting import reroute
from .steps.weighting import WEIGHTINGS, Weighting, semantic_weights
from .tokens import Tokens
from .topology import Topology

STEPS = (
    "weights",
    "demand",
    "capacities",
    "admission",
    "rerouting",
    "bound on drops",
    "combine",
)
"""What a plan is made of, in this order."""

_watcher: ContextVar[Callable[[str], AbstractContextManager[Any]] | None] = ContextVar(
    "macs_steps", default=None
)


@contextmanager
def watching_steps(watcher: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within this block every step of a plan, one of ``STEPS``, runs inside ``watcher(step)``: for benchmarks
    and counts."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def _step(name: str) -> AbstractContextManager[Any]:
    watcher = _watcher.get()
    return nullcontext() if watcher is None else watcher(name)


class Planner:
    """MACS for one MoE layer: ``plan`` turns the router's choice into a ``Plan``.

    config: the settings. topology: where experts live and whose tokens these are. top_k: k.
    modality_bias: m_j in -1..1 for each expert (``Profile.bias``); none is 0 everywhere.
    similarity: [E, E] in 0..1 (``router_similarity``); none is 1 everywhere.

    Nothing in ``plan`` reads a tensor on the host, loops over tokens or experts, or, on a GPU, makes a
    tensor whose shape depends on values. The first call on a device puts the constants there.
    """

    plans = True
    """False for a policy that plans nothing."""

    def __init__(
        self,
        config: MACSConfig,
        topology: Topology,
        top_k: int,
        *,
        modality_bias: Sequence[float] | Tensor | None = None,
        similarity: Tensor | None = None,
    ) -> None:
        experts = topology.num_experts
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: found {top_k}, expected 1 to {experts}, the number of experts")
        self.config = config
        self.topology = topology
        self.top_k = top_k
        self._bias = torch.as_tensor(
            [0.0] * experts if modality_bias is None else modality_bias, dtype=torch.float64
        ).cpu()
        expect("modality_bias", self._bias, (experts,), (torch.float64,))
        if similarity is None:
            similarity = torch.ones(experts, experts)
        expect("similarity", similarity, (experts, experts), FLOATS)
        self._similarity = similarity.detach().float()
        by_image, sources = config.normalization == "image", len(topology.sources)
        self._weighting = Weighting(
            config.weighting, config.entropy_sharpness, config.visual_weight, by_image, sources
        )
        self._on_device: dict[torch.device, Constants] = {}

    @property
    def slots(self) -> int:
        """k': the width of the plans."""
        return self.top_k

    def prepare(self, device: torch.device) -> None:
        """Put the constants on a device, which the first plan there does otherwise."""
        self._constants(device)

    def update_similarity(self, similarity: Tensor) -> None:
        """Replace the similarity, [E, E] in 0..1, where it lies, so that captured graphs read the new one."""
        experts = self.topology.num_experts
        expect("similarity", similarity, (experts, experts), FLOATS)
        with torch.inference_mode():  # constants made in an engine's inference mode are of it
            self._similarity = similarity.detach().float()
            for device, constants in self._on_device.items():
                constants.affinity.copy_(self._similarity.to(device) * constants.reachable)

    def update_target(self, target: float) -> None:
        """Replace ``target_load`` where it lies, so that captured graphs read the new one.

        Raises:
            ValueError: this planner was not made for a target.
        """
        if self.config.target_load is None:
            raise ValueError("update_target: found a planner without target_load, expected one with it")
        self.config = self.config.updated(target_load=target)
        with torch.inference_mode():  # as above
            for device, constants in self._on_device.items():
                constants.bounds.copy_(bounds_of(self.config).to(device))

    def bypasses(self, count: int, device: torch.device) -> bool:
        """Whether so many tokens on this device are too few to plan, as in decoding; no look at them."""
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
    ) -> Plan:
        """Plan one layer.

        Args:
            hidden: what enters the layer, [T, D], any float dtype.
            experts: the router's choice, int64 [T, k]; -1: none.
            weights: its combine weights, [T, k], any float dtype.
            scores: the router's scores of every expert, [T, E] in 0..1, without correction bias.
            tokens: which token is which; none: all are text.
            statistics: whether the plan says what it did; otherwise its ``statistics`` are none.

        Returns:
            Where every assignment goes; the router's choice itself where fewer than ``min_tokens`` are
            planned.

        Raises:
            ValueError: a shape or dtype does not fit; the message names argument, found and expected.
        """
        tokens = self._check(hidden, experts, weights, scores, tokens)
        choice = Choice(experts, weights, scores, self.top_k)
        if not self.plans or self.bypasses(len(hidden), hidden.device):
            return self._untouched(hidden, choice, tokens, statistics)
        config, constants = self.config, self._constants(hidden.device)
        if config.spare_text:
            tokens = tokens.with_text_exempt()
        choice = self._extended(choice, tokens, constants)
        sums = self._sums(hidden, statistics)
        with _step("weights"):
            weighed = semantic_weights(hidden, tokens, self._weighting, sums, statistics)
        with _step("demand"):
            terms = Terms(config.priority, config.cost == "weight")
            demand = measure(choice, tokens, weighed.weight, terms, sums)
        with _step("capacities"):
            room = capacities(sums, constants, config, self.top_k)
        with _step("admission"):
            placement = admit(demand, room, constants)
        if config.reroute != "none":
            with _step("rerouting"):
                placement = reroute(demand, placement, constants, config.reroute_rounds)
        excess = None
        if config.max_drop is not None:
            with _step("bound on drops"):
                hard = config.max_load_factor is not None
                placement, excess = limit_drops(demand, placement, constants, config.max_drop, hard)
        with _step("combine"):
            findings = None if weighed.finite is None else Findings(sums, weighed.finite, excess)
            combined = combine(demand, placement, room, config.drop_padding, findings)
        record = PlanStatistics(sums.record) if statistics else None
        return Plan(combined.experts, combined.weights, combined.rerouted, record)

    def _untouched(self, hidden: Tensor, choice: Choice, tokens: Tokens, statistics: bool) -> Plan:
        """The router's choice as a plan, with its loads counted and every token weighing one."""
        more = self.slots - self.top_k
        experts = functional.pad(choice.experts, (0, more), value=-1)
        weights = functional.pad(choice.weights, (0, more))
        if not statistics:
            return Plan(experts, weights, torch.zeros_like(experts, dtype=torch.bool), None)
        constants, sums = self._constants(hidden.device), self._sums(hidden, statistics)
        weight = torch.full_like(tokens.position, UNIT)
        everything = Choice(experts, weights, choice.scores, self.top_k)
        demand = measure(everything, tokens, weight, Terms("score", False), sums)
        idle = torch.zeros_like(constants.places, dtype=torch.bool)
        room = Room(constants.places[:, None], None, idle, False)
        findings = Findings(sums, torch.ones_like(tokens.valid), None)
        combined = combine(demand, Placement(experts, room.pools, None), room, False, findings)
        return Plan(combined.experts, weights, combined.rerouted, PlanStatistics(sums.record))

    def _extended(self, choice: Choice, tokens: Tokens, constants: Constants) -> Choice:
        """The router's assignments and, behind them, those that a policy adds."""
        return choice

    def _sums(self, hidden: Tensor, statistics: bool) -> Sums:
        """Nothing added yet, in the shapes that this planner's steps add to."""
        rule, (tokens, size) = self._weighting, hidden.shape
        sources, experts = rule.sources, self.topology.num_experts
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("tokens", "weight", "visual_weight"), (sources,))
        shapes["rows"] = sources, experts
        if self.config.cost == "weight":
            shapes["cost"] = sources, experts
        if WEIGHTINGS[rule.rule].value is not None:
            shapes["moments"] = 3, rule.groups(tokens)
        if WEIGHTINGS[rule.rule].directions:
            shapes["directions"] = sources, size
        if statistics:
            shapes["record"] = (len(SCALARS) + len(LOADS) * experts,)
        return Sums.zeros(shapes, hidden.device)

    def _check(
        self, hidden: Tensor, experts: Tensor, weights: Tensor, scores: Tensor, tokens: Tokens | None
    ) -> Tokens:
        expect("hidden", hidden, (None, None), FLOATS)
        count, device = hidden.shape[0], hidden.device
        expect("experts", experts, (count, self.top_k), (torch.int64,), device)
        expect("weights", weights, (count, self.top_k), FLOATS, device)
        expect("scores", scores, (count, self.topology.num_experts), FLOATS, device)
        if tokens is None:
            return Tokens.all_text(count, device)
        expect("modality mask", tokens.kinds, (count,), (torch.int8,), device)
        if self.config.normalization == "image" and tokens.segment is None:
            raise ValueError(
                "tokens.segment: found none, expected every token's picture, under normalization = image: "
                "Modality.batch_major or sequence_major with segmented=True"
            )
        return tokens

    def _constants(self, device: torch.device) -> Constants:
        if device not in self._on_device:
            topology, experts = self.topology, self.topology.num_experts
            rank_of_expert = torch.tensor(topology.expert_rank)
            by_rank = torch.tensor(topology.experts_of_rank())
            reachable = rank_of_expert[:, None] == rank_of_expert
            if self.config.reroute == "group":
                reachable = torch.ones_like(reachable)
            by_expert = self.config.level == "expert"
            constants = Constants(
                pool_of_expert=torch.arange(experts) if by_expert else rank_of_expert,
                rank_of_expert=rank_of_expert,
                affinity=(self._similarity.cpu() * reachable).contiguous(),
                modality_bias=self._bias.contiguous(),
                reachable=reachable,
                bounds=bounds_of(self.config),
                places=torch.tensor(topology.places),
                local_experts=by_rank[torch.tensor(topology.sources)],
                pools=experts if by_expert else topology.num_ranks,
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
