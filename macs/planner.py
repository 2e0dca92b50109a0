"""The planner: a router's choice in, a plan out.

Shapes: T tokens, D features, E experts, k assignments of a token, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .capacity import LoadTable, measure, pool_capacity, quotas, row_bound
from .checks import FLOATS, expect
from .config import MACSConfig
from .fixed_point import MASS_UNIT, UNIT, to_fixed
from .modality import KINDS, Tokens
from .plan import Plan, describe
from .routing import (
    EXEMPT_PRIORITY,
    Demand,
    Placement,
    combine_weights,
    limit_drops,
    place_admitted,
    priority_of,
    reroute,
)
from .topology import Topology
from .weighting import (
    constant_weights,
    distinctness,
    entropy_weights,
    feature_entropy,
    relative_weights,
)


@dataclass(frozen=True)
class Constants:
    """What does not change from step to step, on one device."""

    pool_of_expert: Tensor  # int64 [E]
    rank_of_expert: Tensor  # int64 [E]
    affinity: Tensor  # float32 [E, E], similarity; 0 where rerouting may not go
    modality_bias: Tensor  # float64 [E]
    reachable: Tensor  # bool [E, E], where rerouting may go
    places: Tensor  # int64 [S], where sources stand among those whose tokens meet
    local_experts: Tensor  # int64 [S, G], the experts on each source's own rank


class Planner:
    """MACS for one MoE layer: ``plan`` turns the router's choice into a ``Plan``.

    config: the settings. topology: where experts live and whose tokens these are. top_k: k.
    modality_bias: m_j in -1..1 for each expert (``Profile.bias``); none is 0 everywhere.
    similarity: [E, E] in 0..1 (``router_similarity`` or a profile's); none is 1 everywhere.
    group: the process group whose members share one capacity, for ``scope = "group"`` with more
    than one process; each member plans ``len(topology.sources)`` sources.

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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        experts = topology.num_experts
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: found {top_k}, expected 1 to {experts}, the number of experts")
        if config.similarity == "profile" and similarity is None:
            raise ValueError("config.similarity: found 'profile', but the profile has no similarity matrix")
        self.config = config
        self.topology = topology
        self.top_k = top_k
        self.group = group if config.scope == "group" else None
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
        """Whether ``count`` tokens are too few to plan, as in decoding, known without looking at them.

        In group scope among several processes the group's total decides, which nobody knows yet.
        """
        return self._gathers == 1 and count < self.config.min_tokens

    def plan(
        self,
        hidden: Tensor,
        experts: Tensor,
        weights: Tensor,
        scores: Tensor,
        tokens: Tokens | None = None,
    ) -> Plan:
        """Plan one layer.

        hidden [T, D] what enters the layer; experts int64 [T, k] the router's choice (-1: none);
        weights [T, k] its combine weights; scores [T, E] the router's scores of every expert, 0..1,
        without correction bias; tokens: which token is which (none: all are text).

        In group scope every member of the group must call this, with T = 0 if it has no tokens.
        """
        tokens = self._check(hidden, experts, weights, scores, tokens)
        if not self.plans or self.leaves_alone(len(hidden)):
            return self._untouched(experts, weights, tokens)
        constants = self._constants(hidden.device)
        # Columns ascend by expert within the plan, whatever order the engine's router gave.
        experts_in, column = experts.sort(1)
        weights_in = weights.gather(1, column)
        experts_in, weights_in = self._extend(experts_in, weights_in, scores, tokens, constants)
        placement, table, nonfinite, active, unmet = self._place(
            hidden, experts_in, weights_in, scores, tokens, constants
        )

        planned = tokens.valid[:, None] & (experts_in >= 0)
        placed = torch.where(planned, placement.experts, experts_in)
        own = torch.arange(experts_in.shape[1], device=hidden.device) < self.top_k
        placed_weights = combine_weights(
            placement, experts_in, weights_in, scores, planned, own, self.config.renormalize
        )
        if self.config.drop_padding:
            padding = ~tokens.valid[:, None]
            placed = torch.where(padding, -1, placed)
            placed_weights = torch.where(padding, torch.zeros_like(placed_weights), placed_weights)
        on = active[tokens.source][:, None]
        left_alone, left_weights = self._left_alone(experts_in, weights_in)
        placed = torch.where(on, placed, left_alone)
        placed_weights = torch.where(on, placed_weights, left_weights)
        rerouted = placement.rerouted & on

        statistics = describe(
            tokens, table, experts_in, weights_in, placed, rerouted, own, nonfinite, active, unmet
        )
        # Back to the columns the router used; added ones stay behind them.
        back = torch.argsort(column, 1)
        if experts_in.shape[1] > self.top_k:
            extra = torch.arange(self.top_k, experts_in.shape[1], device=hidden.device)
            back = torch.cat([back, extra.expand(len(back), -1)], 1)
        return Plan(
            placed.gather(1, back), placed_weights.gather(1, back), rerouted.gather(1, back), statistics
        )

    def _untouched(self, experts: Tensor, weights: Tensor, tokens: Tokens) -> Plan:
        """The router's choice as a plan, with its loads counted and every token weighing one."""
        sources = len(self.topology.sources)
        weight = torch.full_like(tokens.position, UNIT)
        table = measure(
            tokens.source,
            tokens.valid,
            tokens.visual,
            weight,
            weight,
            experts,
            sources,
            self.topology.num_experts,
        )
        nowhere, nobody = torch.zeros_like(experts, dtype=torch.bool), torch.zeros_like(tokens.valid)
        idle = torch.zeros(sources, dtype=torch.bool, device=experts.device)
        own = torch.ones(self.top_k, dtype=torch.bool, device=experts.device)
        statistics = describe(tokens, table, experts, weights, experts, nowhere, own, nobody, idle, idle)
        more = self.slots - self.top_k
        return Plan(
            functional.pad(experts, (0, more), value=-1),
            functional.pad(weights, (0, more)),
            functional.pad(nowhere, (0, more)),
            statistics,
        )

    # What a policy may do differently.

    def _extend(
        self, experts: Tensor, weights: Tensor, scores: Tensor, tokens: Tokens, constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """Assignments beyond the router's own, if the policy adds any: [T, k'] each."""
        return experts, weights

    def _left_alone(self, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The plan [T, k'] of a source that does not plan: the router's choice."""
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
                places=torch.tensor(topology.places),
                local_experts=by_rank[torch.tensor(topology.sources)],
            )
            self._on_device[device] = Constants(
                **{name: tensor.to(device) for name, tensor in vars(constants).items()}
            )
        return self._on_device[device]

    def _weights(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Semantic weights int64 [T], and which tokens' features are not finite, bool [T]."""
        sources = len(self.topology.sources)
        if self.config.weighting == "constant":
            finite = torch.isfinite(hidden.sum(-1, dtype=torch.float32))
            return constant_weights(tokens.visual, self.config.visual_weight), ~finite
        if self.config.normalization == "batch":
            group, groups = tokens.source * KINDS + tokens.kinds, sources * KINDS
        else:
            count = max(1, len(tokens.source))
            group, groups = tokens.source * count + tokens.segment, sources * count
        sharpness = self.config.entropy_sharpness
        if self.config.weighting == "distinct":
            distinct = distinctness(hidden, tokens.visual, tokens.source, sources)
            usual = self.config.visual_weight
            weight = relative_weights(distinct, tokens.visual, group, groups, sharpness, usual)
            return weight, ~torch.isfinite(distinct)
        entropy = feature_entropy(hidden)
        weight = entropy_weights(entropy, tokens.visual, group, groups, sharpness)
        return weight, ~torch.isfinite(entropy)

    @property
    def _bounds_rows(self) -> bool:
        """Whether there is a bound on the rows of a rank."""
        return self.config.max_load_factor is not None or self.config.target_straggler is not None

    @property
    def _gathers(self) -> int:
        """How many processes share the capacities."""
        return 1 if self.group is None else self.group.size()

    def _gather(self, table: LoadTable) -> tuple[LoadTable, slice]:
        """Everyone's loads, and which rows are this process's."""
        mine = slice(0, len(self.topology.sources))
        if self.group is None or self._gathers == 1:
            return table, mine
        packed = table.pack()
        everyone = packed.new_empty(self.group.size() * len(packed), packed.shape[1])
        dist.all_gather_into_tensor(everyone, packed.contiguous(), group=self.group)
        first = self.group.rank() * len(packed)
        return LoadTable.unpack(everyone), slice(first, first + len(packed))

    def _room(self, table: LoadTable, mine: slice, constants: Constants) -> tuple[Tensor, Tensor, Tensor]:
        """Room of each pool [S, P] and rank [S, R] for this process's sources; who plans, bool [S]."""
        config, ranks = self.config, self.topology.num_ranks
        shared = config.scope == "group"
        scope = table.total() if shared else table
        active = scope.tokens >= config.min_tokens
        pools = ranks if config.level == "rank" else self.topology.num_experts

        def pooled(by_expert: Tensor, of_expert: Tensor, size: int) -> Tensor:
            return by_expert.new_zeros(len(by_expert), size).index_add(1, of_expert, by_expert)

        row_room = row_bound(scope, config, self.top_k, ranks, None if shared else constants.places)
        if config.pools_rows:
            room = row_room * UNIT
        else:
            room = pool_capacity(
                scope,
                config,
                self.top_k,
                constants.modality_bias,
                constants.pool_of_expert,
                constants.rank_of_expert,
                pools,
                ranks,
                row_room,
            )
        if shared:
            cost = pooled(table.cost, constants.pool_of_expert, pools)
            rows = pooled(table.rows, constants.rank_of_expert, ranks)
            room = quotas(room[0], cost, UNIT if config.cost == "one" else 1)[mine]
            row_room = quotas(row_room[0], rows)[mine]
            active = active.expand(len(table.tokens))[mine]
        return room, row_room, active

    def _place(
        self,
        hidden: Tensor,
        experts: Tensor,
        weights: Tensor,
        scores: Tensor,
        tokens: Tokens,
        constants: Constants,
    ) -> tuple[Placement, LoadTable, Tensor, Tensor, Tensor]:
        """The placement; this process's loads; features not finite, bool [T]; which sources plan
        and which of those had a guard that could not be met, bool [S]."""
        config, topology = self.config, self.topology
        weight, nonfinite = self._weights(hidden, tokens)
        cost = weight if config.cost == "weight" else torch.full_like(weight, UNIT)
        table = measure(
            tokens.source,
            tokens.valid,
            tokens.visual,
            weight,
            cost,
            experts,
            len(topology.sources),
            topology.num_experts,
        )
        everyone, mine = self._gather(table)
        room, row_room, active = self._room(everyone, mine, constants)

        real = experts >= 0
        planned = tokens.valid[:, None] & real
        own_scores = torch.where(real, scores.gather(1, experts.clamp(min=0)), 0)
        priority = priority_of(own_scores, weight, config.priority)
        demand = Demand(
            experts=experts,
            scores=scores,
            weight=weight,
            cost=cost,
            same_cost=config.cost == "one",
            priority=torch.where(tokens.exempt[:, None], EXEMPT_PRIORITY, priority),
            position=tokens.position,
            source=tokens.source,
            exempt=tokens.exempt,
            planned=planned,
            pool_of_expert=constants.pool_of_expert,
            rank_of_expert=constants.rank_of_expert,
            room=room,
            row_room=row_room,
        )
        bounded = self._bounds_rows and not config.pools_rows
        placement = place_admitted(demand, bounded)
        if config.reroute != "none":
            placement = reroute(
                demand,
                placement,
                constants.affinity,
                config.reroute_rounds,
                config.priority,
                bounded,
            )
        unmet = torch.zeros_like(active)
        if config.max_drop is not None:
            own = torch.arange(experts.shape[1], device=experts.device) < self.top_k
            mass = torch.where(real & own, to_fixed(weights, MASS_UNIT), 0)
            # The bound on drops goes before a target, but not before the hard bound on rows.
            hard = config.max_load_factor is not None
            placement, too_many = limit_drops(demand, placement, mass, config.max_drop, hard)
            unmet = unmet | too_many
        if self._bounds_rows:
            unmet = unmet | (placement.row_room < 0).any(1)
        return placement, table, nonfinite, active, unmet & active


def router_similarity(router_weight: Tensor) -> Tensor:
    """Similarity of experts by their router rows, (1 + cos) / 2: [E, D] -> float32 [E, E] in 0..1, on the
    weight's device.

    Rounded to 1/65536, so that every device and rank has the same numbers.
    """
    expect("router_weight", router_weight, (None, None), FLOATS)
    rows = torch.nn.functional.normalize(router_weight.detach().double(), dim=1)
    similarity = ((1 + rows @ rows.T) / 2).clamp(0, 1)
    return ((similarity * UNIT).round() / UNIT).float()
