"""The planner: a router's choice in, a plan out.

Shapes: T tokens, D features, E experts, k assignments of a token (k' with those a policy adds),
S sources, R ranks, P pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .capacity import LoadTable, Pools, bounds_of, measure, pool_capacity, row_bound
from .checks import FLOATS, expect
from .config import MACSConfig
from .fixed_point import MASS_UNIT, UNIT, to_fixed
from .modality import KINDS, Tokens
from .plan import Outcome, Plan, describe
from .routing import (
    UNBOUNDED,
    Demand,
    Placement,
    ask,
    combine_weights,
    limit_drops,
    place_admitted,
    places_of,
    reroute,
)
from .topology import Topology
from .weighting import constant_weights, distinct_weights, entropy_weights, feature_entropy


@dataclass(frozen=True)
class Constants:
    """What does not change from step to step, on one device."""

    pool_of_expert: Tensor  # int64 [E]
    rank_of_expert: Tensor  # int64 [E]
    affinity: Tensor  # float32 [E, E], similarity; 0 where rerouting may not go
    modality_bias: Tensor  # float64 [E]
    reachable: Tensor  # bool [E, E], where rerouting may go
    bounds: Tensor  # float64 [2], ``bounds_of`` the settings
    places: Tensor  # int64 [S], where sources stand among those whose tokens meet
    local_experts: Tensor  # int64 [S, G], the experts on each source's own rank


STEPS = (
    "semantic weights",
    "loads",
    "capacities",
    "order",
    "admission",
    "rerouting",
    "bound on drops",
    "combine weights",
    "statistics",
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
    """False for a policy that leaves every layer alone."""

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

    def leaves_alone(self, count: int) -> bool:
        """Whether ``count`` tokens are too few to plan, as in decoding, known without looking at them."""
        return count < self.config.min_tokens

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

        hidden [T, D] what enters the layer; experts int64 [T, k] the router's choice (-1: none);
        weights [T, k] its combine weights; scores [T, E] the router's scores of every expert, 0..1,
        without correction bias; tokens: which token is which (none: all are text). statistics: whether
        the plan says what it did; otherwise its ``statistics`` are none.
        """
        tokens = self._check(hidden, experts, weights, scores, tokens)
        if not self.plans or self.leaves_alone(len(hidden)):
            return self._untouched(experts, weights, tokens, statistics)
        constants = self._constants(hidden.device)
        asked, asked_weights = self._extend(experts, weights, scores, tokens, constants)
        with _step("semantic weights"):
            weight, finite = self._weights(hidden, tokens)
            cost = weight if self.config.cost == "weight" else torch.full_like(weight, UNIT)
        with _step("loads"):
            sources, count = len(self.topology.sources), self.topology.num_experts
            loads = measure(tokens, weight, cost, asked, sources, count)
        with _step("capacities"):
            active = loads.tokens >= self.config.min_tokens
            start = Placement(asked, *self._room(loads, active, constants))
        with _step("order"):
            demand = self._demand(asked, scores, weight, cost, tokens, constants)
        with _step("admission"):
            placement = place_admitted(demand, start)
        if self.config.reroute != "none":
            with _step("rerouting"):
                rounds, rule = self.config.reroute_rounds, self.config.priority
                placement = reroute(demand, placement, constants.affinity, rounds, rule)
        excess = None
        if self.config.max_drop is not None:
            with _step("bound on drops"):
                placement, excess = self._readmit(demand, placement, weights)
        with _step("combine weights"):
            combined, rerouted = combine_weights(demand, placement.experts, asked_weights, self.top_k)
            placed, combined = self._finished(placement.experts, combined, tokens, active)
        if not statistics:
            return Plan(placed, combined, rerouted, None)
        with _step("statistics"):
            if finite is None:
                finite = torch.isfinite(hidden.sum(-1, dtype=torch.float32))
            outcome = Outcome(placed, rerouted, active, self._unmet(placement, excess), finite)
            return Plan(placed, combined, rerouted, describe(tokens, loads, experts, weights, outcome))

    def _readmit(self, demand: Demand, placement: Placement, weights: Tensor) -> tuple[Placement, Tensor]:
        """The placement within ``max_drop``, and which sources still drop more, bool [S]."""
        assert self.config.max_drop is not None
        mass = torch.where(demand.planned[:, : self.top_k], to_fixed(weights, MASS_UNIT), 0)
        mass = functional.pad(mass, (0, placement.experts.shape[1] - self.top_k))
        # max_drop takes precedence over a target, but not over the hard bound on rows.
        hard = self.config.max_load_factor is not None
        return limit_drops(demand, placement, mass, self.config.max_drop, hard)

    def _unmet(self, placement: Placement, excess: Tensor | None) -> Tensor:
        """For which sources a guard could not be met, bool [S]; excess: which drop more than they may."""
        unmet = placement.room.new_zeros(len(placement.room), dtype=torch.bool) if excess is None else excess
        if not self._bounds_rows:
            return unmet
        left = placement.room if placement.row_room is None else placement.row_room
        return unmet | (left < 0).any(1)

    def _finished(
        self, placed: Tensor, combined: Tensor, tokens: Tokens, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where assignments end and with what combine weights, [T, k'] each: of padding, and of sources that
        do not plan, whose added experts are nobody's."""
        if self.config.drop_padding:
            padding = (active[tokens.source] & ~tokens.valid)[:, None]
            placed, combined = placed.masked_fill(padding, -1), combined.masked_fill(padding, 0)
        if placed.shape[1] > self.top_k:
            added = ~(active[tokens.source][:, None] | self._own(placed))
            placed, combined = placed.masked_fill(added, -1), combined.masked_fill(added, 0)
        return placed, combined

    def _own(self, placed: Tensor) -> Tensor:
        """The router's own columns: bool [k']."""
        return torch.arange(placed.shape[1], device=placed.device) < self.top_k

    def _untouched(self, experts: Tensor, weights: Tensor, tokens: Tokens, statistics: bool) -> Plan:
        """The router's choice as a plan, with its loads counted and every token weighing one."""
        more = self.slots - self.top_k
        placed = functional.pad(experts, (0, more), value=-1)
        rerouted = torch.zeros_like(placed, dtype=torch.bool)
        found = None
        if statistics:
            sources = len(self.topology.sources)
            weight = torch.full_like(tokens.position, UNIT)
            loads = measure(tokens, weight, weight, experts, sources, self.topology.num_experts)
            idle = torch.zeros(sources, dtype=torch.bool, device=experts.device)
            outcome = Outcome(placed, rerouted, idle, idle, torch.ones_like(tokens.valid))
            found = describe(tokens, loads, experts, weights, outcome)
        return Plan(placed, functional.pad(weights, (0, more)), rerouted, found)

    def _extend(
        self, experts: Tensor, weights: Tensor, scores: Tensor, tokens: Tokens, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """The router's assignments and, behind them, those that a policy adds: [T, k'] each."""
        return experts, weights

    # The steps of a plan.

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
        return tokens

    def _constants(self, device: torch.device) -> Constants:
        if device not in self._on_device:
            topology, experts = self.topology, self.topology.num_experts
            rank_of_expert = torch.tensor(topology.expert_rank)
            by_rank = torch.tensor(topology.experts_of_rank())
            reachable = rank_of_expert[:, None] == rank_of_expert
            if self.config.reroute == "group":
                reachable = torch.ones_like(reachable)
            constants = Constants(
                pool_of_expert=torch.arange(experts) if self.config.level == "expert" else rank_of_expert,
                rank_of_expert=rank_of_expert,
                affinity=self._similarity.cpu() * reachable,
                modality_bias=self._bias,
                reachable=reachable,
                bounds=bounds_of(self.config),
                places=torch.tensor(topology.places),
                local_experts=by_rank[torch.tensor(topology.sources)],
            )
            self._on_device[device] = Constants(
                **{name: tensor.to(device) for name, tensor in vars(constants).items()}
            )
        return self._on_device[device]

    def _weights(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """Semantic weights int64 [T], and which tokens' features are finite, bool [T], if they were read."""
        config, sources = self.config, len(self.topology.sources)
        if config.weighting == "constant":
            return constant_weights(tokens.visual, config.visual_weight), None
        if config.normalization == "batch":
            group, groups = tokens.kinds.long(), sources * KINDS
            if sources > 1:
                group = tokens.source * KINDS + group
        else:
            count = max(1, len(tokens.source))
            group, groups = tokens.source * count + tokens.segment, sources * count
        if config.weighting == "distinct":
            return distinct_weights(
                hidden, tokens, sources, (group, groups), config.entropy_sharpness, config.visual_weight
            )
        entropy = feature_entropy(hidden)
        weight = entropy_weights(entropy, tokens.visual, group, groups, config.entropy_sharpness)
        return weight, entropy == entropy

    @property
    def _bounds_rows(self) -> bool:
        """Whether there is a bound on the rows of a rank."""
        return self.config.max_load_factor is not None or self.config.target_straggler is not None

    def _room(self, loads: LoadTable, active: Tensor, constants: Constants) -> tuple[Tensor, Tensor | None]:
        """Capacity of each pool [S, P], and rows of each rank [S, R] where they have a bound of their own;
        unbounded where a source is not active, bool [S]."""
        config, ranks = self.config, self.topology.num_ranks
        row_room = row_bound(loads.tokens, constants.places, constants.bounds, self.top_k, ranks)
        if config.pools_rows:
            room = row_room * UNIT
        else:
            pools = Pools(
                of_expert=constants.pool_of_expert,
                rank_of_expert=constants.rank_of_expert,
                modality_bias=constants.modality_bias,
                count=ranks if config.level == "rank" else self.topology.num_experts,
                ranks=ranks,
            )
            room = pool_capacity(loads, config, self.top_k, pools, row_room)
        idle = ~active[:, None]
        room = room.masked_fill(idle, UNBOUNDED)
        if self._bounds_rows and not config.pools_rows:
            return room, row_room.masked_fill(idle, UNBOUNDED)
        return room, None

    def _demand(
        self,
        experts: Tensor,
        scores: Tensor,
        weight: Tensor,
        cost: Tensor,
        tokens: Tokens,
        constants: Constants,
    ) -> Demand:
        """What the tokens ask for: experts [T, k'], in the order of their priority."""
        order, planned = ask(experts, scores, weight, tokens, self.config.priority, self.top_k)
        return Demand(
            experts=experts,
            scores=scores,
            weight=weight,
            cost=cost,
            same_cost=self.config.cost == "one",
            order=order,
            places=places_of(len(scores), scores.shape[1], experts.shape[1] > self.top_k),
            tokens=tokens,
            planned=planned,
            pool_of_expert=constants.pool_of_expert,
            rank_of_expert=constants.rank_of_expert,
        )


def router_similarity(router_weight: Tensor) -> Tensor:
    """Similarity of experts by their router rows, (1 + cos) / 2: [E, D] -> float32 [E, E] in 0..1, on the
    weight's device.

    Rounded to 1/65536, so that every device and rank has the same numbers.
    """
    expect("router_weight", router_weight, (None, None), FLOATS)
    rows = functional.normalize(router_weight.detach().double(), dim=1)
    similarity = ((1 + rows @ rows.T) / 2).clamp(0, 1)
    return ((similarity * UNIT).round() / UNIT).float()
