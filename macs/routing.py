"""The plan: who is admitted, who is rerouted, who is dropped.

Shapes: T tokens, k assignments of a token, N = T k, E experts, R ranks, S sources, P pools. Loads,
costs, capacities and priorities are int64 (see ``fixed_point``). An *assignment* is one (token, expert)
pair; a *pool* is what has a capacity: an expert or a rank, once for each source. Columns of [T, k]
tensors ascend by expert id, so an assignment's place in the flattened [T, k] settles ties by token, then
by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .fixed_point import PRIORITY_BITS, UNIT, to_fixed
from .ops import fused

EXEMPT_PRIORITY = (1 << PRIORITY_BITS) + 1
"""Above every other."""


@fused("rerouting")
def priority_of(score: Tensor, weight: Tensor, rule: str) -> Tensor:
    """Admission priority by rule "score", "weight" or "product".

    score [T, m] in 0..1, weight int64 [T] in fixed point -> int64 [T, m] in 0..2 ** PRIORITY_BITS.
    """
    value = score.double()
    if rule != "score":
        share = weight.double()[:, None] / UNIT
        value = share * value if rule == "product" else share.expand_as(value)
    return to_fixed(value.clamp(0, 1), 1 << PRIORITY_BITS)


def sort_key(pool: Tensor, pools: int, priority: Tensor, place: Tensor, places: int) -> Tensor:
    """One unique integer per assignment that sorts by pool, priority (falling), place. int64 [N]

    pool [N] in 0..pools (the last is no pool), priority [N] in 0..EXEMPT_PRIORITY, place [N] in
    0..places-1, all different.
    """
    place_bits = max(1, (places - 1).bit_length())
    bits = (pools + 1).bit_length() + PRIORITY_BITS + 1 + place_bits
    if bits > 63:
        raise ValueError(
            f"plan: {pools} pools and {places} assignments need {bits}-bit keys, 63 is the most; "
            "plan fewer tokens or sources at once"
        )
    return (((pool << (PRIORITY_BITS + 1)) | (EXEMPT_PRIORITY - priority)) << place_bits) | place


@fused("admission")
def admit(pool: Tensor, priority: Tensor, place: Tensor, cost: Tensor, capacity: Tensor) -> Tensor:
    """The longest prefix of every pool, by falling priority and then place, whose cost fits its capacity.

    pool int64 [N] in 0..P (P: takes no part), priority int64 [N] in 0..EXEMPT_PRIORITY, place int64 [N] a
    permutation of 0..N-1, cost int64 [N] > 0, capacity int64 [P] -> admitted bool [N]. One sort and one
    segmented cumulative sum.
    """
    order = torch.sort(sort_key(pool, len(capacity), priority, place, len(place))).indices
    sorted_pool, sorted_cost = pool[order], cost[order]
    load = capacity.new_zeros(len(capacity) + 1).scatter_add(0, pool, cost)
    before = load.cumsum(0) - load
    limit = torch.cat([capacity, capacity.new_full((1,), -1)])
    # Costs are positive, so the running sum rises and what fits is a prefix by itself.
    fits = sorted_cost.cumsum(0) - before[sorted_pool] <= limit[sorted_pool]
    return torch.empty_like(fits).scatter_(0, order, fits)


@dataclass(frozen=True)
class Demand:
    """The assignments to be planned and the room there is.

    experts int64 [T, k]    -1: no assignment; ascending along k
    scores float [T, E]     the router's scores, 0..1; 0 where it may not send the token
    weight int64 [T]        semantic weights, what a score is multiplied by (priority = product)
    cost int64 [T]          what one assignment of the token takes from a capacity
    same_cost               whether that is one (``UNIT``) for every token
    priority int64 [T, k]
    position, source int64 [T]; exempt bool [T]
    planned bool [T, k]     False: stays as it is and counts nowhere (padding)
    pool_of_expert int64 [E], rank_of_expert int64 [E]
    room int64 [S, P]       capacity of each pool for each source
    row_room int64 [S, R]   rows each rank may take from each source
    """

    experts: Tensor
    scores: Tensor
    weight: Tensor
    cost: Tensor
    same_cost: bool
    priority: Tensor
    position: Tensor
    source: Tensor
    exempt: Tensor
    planned: Tensor
    pool_of_expert: Tensor
    rank_of_expert: Tensor
    room: Tensor
    row_room: Tensor

    @property
    def device(self) -> torch.device:
        return self.experts.device

    @property
    def place(self) -> Tensor:
        """Place of every assignment in batch-major order, int64 [T, k]."""
        k = self.experts.shape[1]
        return self.position[:, None] * k + torch.arange(k, device=self.position.device)

    def pools(self, experts: Tensor, of_expert: Tensor, pools: int, takes_part: Tensor) -> Tensor:
        """Index of (source, pool) for experts [T, m]; S x pools where it takes no part."""
        index = self.source[:, None] * pools + of_expert[experts.clamp(min=0)]
        return torch.where(takes_part, index, self.room.shape[0] * pools)


@dataclass(frozen=True)
class Placement:
    """Where assignments stand so far: experts int64 [T, k] (-1: nowhere yet), kept and rerouted
    bool [T, k], and what room is left: room int64 [S, P], row_room int64 [S, R]."""

    experts: Tensor
    kept: Tensor
    rerouted: Tensor
    room: Tensor
    row_room: Tensor


def place_admitted(demand: Demand, bounded_rows: bool) -> Placement:
    """Admission: each pool's longest prefix, then, if rows are bounded, each rank's."""
    pools, ranks = demand.room.shape[1], demand.row_room.shape[1]
    cost = demand.cost[:, None].expand(demand.experts.shape)
    exempt = demand.exempt[:, None] & demand.planned
    place = demand.place.flatten()

    def longest_prefix(of_expert: Tensor, size: int, who: Tensor, costs: Tensor, room: Tensor) -> Tensor:
        pool = demand.pools(demand.experts, of_expert, size, who).flatten()
        fits = admit(pool, demand.priority.flatten(), place, costs.flatten(), room.flatten()).view(who.shape)
        return fits | (exempt & who)

    kept = longest_prefix(demand.pool_of_expert, pools, demand.planned, cost, demand.room)
    if bounded_rows:
        rows = torch.ones_like(cost)
        kept = longest_prefix(demand.rank_of_expert, ranks, kept, rows, demand.row_room)
    experts = torch.where(kept, demand.experts, -1)
    room, row_room = _room_left(demand, demand, experts)
    return Placement(experts, kept, torch.zeros_like(kept), room, row_room)


@fused("loads")
def less(room: Tensor, source: Tensor, of_expert: Tensor, experts: Tensor, cost: Tensor) -> Tensor:
    """Room int64 [S, P] less the cost int64 [T] of every expert in experts [T, m] (-1: none).

    source int64 [T], of_expert int64 [E] in 0..P-1.
    """
    pool = source[:, None] * room.shape[1] + of_expert[experts.clamp(min=0)]
    pool = torch.where(experts >= 0, pool, room.numel())
    load = room.new_zeros(room.numel() + 1)
    load = load.scatter_add(0, pool.flatten(), cost[:, None].expand(pool.shape).flatten())
    return room - load[:-1].view(room.shape)


def _room_left(demand: Demand, before: Demand | Placement, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Room of the pools and of the ranks, once experts [T, m] (-1: none) are taken."""
    one = torch.ones_like(demand.cost)
    return (
        less(before.room, demand.source, demand.pool_of_expert, taken, demand.cost),
        less(before.row_room, demand.source, demand.rank_of_expert, taken, one),
    )


def reroute(
    demand: Demand, placement: Placement, affinity: Tensor, rounds: int, rule: str, bounded_rows: bool
) -> Placement:
    """Local semantic rerouting: what overflowed goes to the best expert that still has room.

    affinity float32 [E, E] in 0..1: how alike two experts are; 0 where an assignment of the first may not
    go to the second. In each of ``rounds`` rounds a token proposes its best waiting assignment to its
    best candidate, by score times affinity, among those with room that it does not use and may use;
    pools accept proposals in priority order (``priority_of`` by ``rule``, at the candidate's score)
    while there is room.
    """
    waiting = demand.planned & ~placement.kept
    columns = torch.arange(waiting.shape[1], device=waiting.device)
    for _ in range(rounds):
        proposed = propose(demand, placement, waiting, affinity, rule, bounded_rows)
        found = proposed.expert >= 0
        accepted = _accept(demand, placement, proposed, bounded_rows)
        chosen = columns == proposed.column
        moved = accepted & chosen
        # No candidate now is none ever: room only shrinks. Let the token's next one have its turn.
        waiting = waiting & ~(chosen & (accepted | ~found))
        taken = torch.where(accepted, proposed.expert, -1)
        room, row_room = _room_left(demand, placement, taken)
        placement = Placement(
            experts=torch.where(moved, proposed.expert, placement.experts),
            kept=placement.kept,
            rerouted=placement.rerouted | moved,
            room=room,
            row_room=row_room,
        )
    return placement


@dataclass(frozen=True)
class Proposals:
    """What every token asks for in a round of rerouting, int64 [T, 1] each: an expert (-1: none), for its
    assignment in this column, with this priority."""

    expert: Tensor
    column: Tensor
    priority: Tensor


@fused("rerouting")
def propose(
    demand: Demand, placement: Placement, waiting: Tensor, affinity: Tensor, rule: str, bounded_rows: bool
) -> Proposals:
    """The best candidate of every token's best waiting assignment; ties go to the lower column and expert.

    waiting bool [T, k], affinity float32 [E, E].
    """
    column = torch.where(waiting, demand.priority, -1).argmax(1, keepdim=True)
    token = _worth_a_look(waiting.any(1))  # [W]
    home = demand.experts[token].gather(1, column[token])  # [W, 1]
    score = demand.scores.index_select(0, token)  # [W, E]
    value = score * affinity.index_select(0, home[:, 0].clamp(min=0))

    def at_token(by_source: Tensor) -> Tensor:
        return by_source if len(by_source) == 1 else by_source[demand.source[token]]  # [1 or W, E]

    # Whether there is room is told for every expert, not for every token, wherever that will do.
    room = placement.room[:, demand.pool_of_expert]  # [S, E]
    if demand.same_cost:
        value.mul_(at_token((room >= UNIT).to(value.dtype)))
    else:
        value.mul_(at_token(room) >= demand.cost[token, None])
    if bounded_rows:
        value.mul_(at_token((placement.row_room[:, demand.rank_of_expert] >= 1).to(value.dtype)))
    value = torch.fmax(value, value.new_zeros(()))  # a score that is NaN is none
    # A token's own experts are out, it has them, or they had no room for it; so are those it was given.
    own = torch.cat([demand.experts[token], placement.experts[token]], 1)
    value.scatter_(1, torch.where(own >= 0, own, home).clamp(min=0), 0.0)
    value, expert = value.max(1, keepdim=True)
    found = waiting[token].any(1, keepdim=True) & (value > 0)
    score = torch.where(found, score.gather(1, expert), 0)
    everyone = torch.full_like(column, -1), torch.zeros_like(column)
    priority = torch.where(found, priority_of(score, demand.weight[token], rule), 0)
    return Proposals(
        expert=everyone[0].index_copy(0, token, torch.where(found, expert, -1)),
        column=column,
        priority=everyone[1].index_copy(0, token, priority),
    )


def _worth_a_look(asks: Tensor) -> Tensor:
    """Numbers of the tokens to look at, bool [T] -> int64 [W]: those that ask on a CPU; all on a GPU, which
    would have to tell the host how many they are."""
    return asks.nonzero()[:, 0] if asks.device.type == "cpu" else torch.arange(len(asks), device=asks.device)


def _accept(demand: Demand, placement: Placement, proposed: Proposals, bounded_rows: bool) -> Tensor:
    """Which proposals find room, in priority order: bool [T, 1]."""
    accepted = proposed.expert >= 0
    bounds = [(demand.pool_of_expert, placement.room, demand.cost)]
    if bounded_rows:
        bounds.append((demand.rank_of_expert, placement.row_room, torch.ones_like(demand.cost)))
    for of_expert, room, cost in bounds:
        pool = demand.pools(proposed.expert, of_expert, room.shape[1], accepted).flatten()
        fits = admit(pool, proposed.priority.flatten(), demand.position, cost, room.flatten())
        accepted = fits[:, None]
    return accepted


def limit_drops(
    demand: Demand, placement: Placement, mass: Tensor, max_drop: float, bounded_rows: bool
) -> tuple[Placement, Tensor]:
    """Re-admit the best of the dropped, to their own experts, until few enough are dropped.

    mass int64 [T, k] is every assignment's combine weight. For each source: the fewest of the
    dropped, in priority order, are taken back so that the rest holds at most ``max_drop`` of its
    mass. A bound on rows comes first: what it shuts out stays out. Also returns for which sources
    more than that stays dropped, bool [S].
    """
    sources = demand.room.shape[0]
    dropped = demand.planned & (placement.experts < 0) & (mass > 0)
    place, places = demand.place.flatten(), demand.experts.numel()
    open_ = dropped
    if bounded_rows:
        ranks = demand.row_room.shape[1]
        pool = demand.pools(demand.experts, demand.rank_of_expert, ranks, dropped).flatten()
        one, room = torch.ones_like(pool), placement.row_room.flatten()
        open_ = admit(pool, demand.priority.flatten(), place, one, room).view(dropped.shape)

    source = demand.source[:, None].expand_as(dropped)

    def by_source(who: Tensor) -> Tensor:
        flat = torch.where(who, mass, 0).flatten()
        return flat.new_zeros(sources).scatter_add(0, source.flatten(), flat)

    excess = by_source(dropped) - (by_source(demand.planned).double() * max_drop).floor().long()
    # Taken back: everyone before whom the mass taken back is still short of the excess.
    pool = torch.where(open_, source, sources).flatten()
    key = sort_key(pool, sources, demand.priority.flatten(), place, places)
    order = torch.sort(key).indices
    sorted_pool, sorted_mass = pool[order], mass.flatten()[order]
    load = mass.new_zeros(sources + 1).scatter_add(0, pool, mass.flatten())
    start = load.cumsum(0) - load
    before = sorted_mass.cumsum(0) - sorted_mass - start[sorted_pool]
    short = before < torch.cat([excess, excess.new_full((1,), -1)])[sorted_pool]
    back = torch.empty_like(short).scatter_(0, order, short).view(dropped.shape) & open_
    taken = torch.where(back, demand.experts, -1)
    room, row_room = _room_left(demand, placement, taken)
    limited = replace(
        placement,
        experts=torch.where(back, demand.experts, placement.experts),
        kept=placement.kept | back,
        room=room,
        row_room=row_room,
    )
    return limited, excess > by_source(back)


def combine_weights(
    placement: Placement,
    experts: Tensor,
    weights: Tensor,
    scores: Tensor,
    planned: Tensor,
    own: Tensor,
    renormalize: bool,
) -> Tensor:
    """Combine weights of the placed assignments, float [T, k], 0 where dropped.

    Kept ones pass through untouched. A rerouted one gets ``weight_of_score`` of its new expert.
    ``renormalize`` scales what a changed token holds back to its former sum. own bool [k] marks the
    router's own columns.
    """
    candidate = scores.gather(1, placement.experts.clamp(min=0))
    result = torch.where(
        placement.rerouted, weight_of_score(candidate, experts, weights, scores, own), weights
    )
    lost = planned & (placement.experts < 0)
    result = torch.where(lost, torch.zeros_like(result), result)
    if renormalize:
        real = experts >= 0
        total = torch.where(real & own, weights, 0).sum(1, keepdim=True)
        left = torch.where(real, result, 0).sum(1, keepdim=True)
        factor = torch.where(left > 0, total / left.clamp(min=torch.finfo(left.dtype).tiny), 0.0)
        changed = (planned & ((placement.experts != experts) | ~own)).any(1, keepdim=True)
        result = torch.where(changed, result * factor.to(result.dtype), result)
    return result


def weight_of_score(score: Tensor, experts: Tensor, weights: Tensor, scores: Tensor, own: Tensor) -> Tensor:
    """Combine weight of an expert that joins a token with ``score`` [T, m]: s_c sum(w) / sum(s).

    The sums are over the token's own k, so scores and weights keep their proportion. Never more
    than sum(w), as a correction bias or scores that vanish could have it.
    """
    real = (experts >= 0) & own
    total = torch.where(real, weights, 0).sum(1, keepdim=True)
    score_sum = torch.where(real, scores.gather(1, experts.clamp(min=0)), 0).sum(1, keepdim=True)
    share = (score / score_sum.clamp(min=torch.finfo(score_sum.dtype).tiny)).clamp(max=1.0)
    return share.to(weights.dtype) * total
