"""The plan: who is admitted, who is rerouted, who is dropped.

Shapes: T tokens, k assignments of a token, N = T k, E experts, R ranks, S sources, P pools, C
candidates of a token. Loads, costs, capacities and priorities are int64 (see ``fixed_point``).
An *assignment* is one (token, expert) pair; a *pool* is what has a capacity: an expert or a rank,
once for each source. Columns of [T, k] tensors ascend by expert id, so an assignment's place in the
flattened [T, k] settles ties by token, then by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .fixed_point import PRIORITY_BITS, UNIT, to_fixed

EXEMPT_PRIORITY = (1 << PRIORITY_BITS) + 1
"""Above every other."""


def priorities(score: Tensor) -> Tensor:
    """Router scores or products of them with weights, 0..1, any shape -> int64, same shape."""
    return to_fixed(score, 1 << PRIORITY_BITS).clamp(0, 1 << PRIORITY_BITS)


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


def admit(pool: Tensor, key: Tensor, cost: Tensor, capacity: Tensor) -> Tensor:
    """The longest prefix of every pool, in key order, whose cost fits the pool's capacity.

    pool int64 [N] in 0..P (P: takes no part), key int64 [N] (``sort_key``), cost int64 [N] > 0,
    capacity int64 [P] -> admitted bool [N]. One sort and one segmented cumulative sum.
    """
    order = torch.sort(key).indices
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
    sources, pools = demand.room.shape
    ranks = demand.row_room.shape[1]
    cost = demand.cost[:, None].expand(demand.experts.shape)
    exempt = demand.exempt[:, None] & demand.planned
    place, places = demand.place.flatten(), demand.experts.numel()

    def longest_prefix(of_expert: Tensor, size: int, who: Tensor, costs: Tensor, room: Tensor) -> Tensor:
        pool = demand.pools(demand.experts, of_expert, size, who).flatten()
        key = sort_key(pool, sources * size, demand.priority.flatten(), place, places)
        fits = admit(pool, key, costs.flatten(), room.flatten()).view(who.shape)
        return fits | (exempt & who)

    kept = longest_prefix(demand.pool_of_expert, pools, demand.planned, cost, demand.room)
    rows = torch.ones_like(cost)
    if bounded_rows:
        kept = longest_prefix(demand.rank_of_expert, ranks, kept, rows, demand.row_room)
    experts = torch.where(kept, demand.experts, -1)
    return Placement(
        experts=experts,
        kept=kept,
        rerouted=torch.zeros_like(kept),
        room=_take(demand, demand.room, demand.pool_of_expert, experts, cost),
        row_room=_take(demand, demand.row_room, demand.rank_of_expert, experts, rows),
    )


def _take(demand: Demand, room: Tensor, of_expert: Tensor, experts: Tensor, cost: Tensor) -> Tensor:
    """Room [S, P] less the cost [T, m] of experts [T, m] (-1: none)."""
    pool = demand.pools(experts, of_expert, room.shape[1], experts >= 0)
    load = room.new_zeros(room.numel() + 1).scatter_add(0, pool.flatten(), cost.flatten())
    return room - load[:-1].view(room.shape)


def reroute(
    demand: Demand,
    placement: Placement,
    candidates: Tensor,
    similarity: Tensor,
    rounds: int,
    priority: str,
    bounded_rows: bool,
) -> Placement:
    """Local semantic rerouting: what overflowed goes to the best expert that still has room.

    candidates int64 [E, C]: the experts an assignment of expert j may go to. similarity float32
    [E, E] in 0..1. In each of ``rounds`` rounds a token proposes its best waiting assignment to its
    best candidate, by score times similarity, among those with room that it does not use and may
    use; pools accept proposals in priority order while there is room. Ties go to the lower expert.
    """
    k = demand.experts.shape[1]
    used = torch.zeros_like(demand.scores, dtype=torch.bool)
    # A token's own experts are out: it has them, or they had no room for it.
    used = used.scatter(1, demand.experts.clamp(min=0), demand.experts >= 0)
    waiting = demand.planned & ~placement.kept
    slots = torch.arange(k, device=waiting.device)
    for _ in range(rounds):
        best = torch.where(waiting, demand.priority, -1).argmax(1, keepdim=True)
        asks = waiting.gather(1, best)
        home = demand.experts.gather(1, best).clamp(min=0)
        expert, score, found = _best_candidate(
            demand, placement, home, candidates, similarity, used, bounded_rows
        )
        # No candidate now is none ever: room only shrinks. Let the token's next one have its turn.
        waiting = waiting & ~((slots == best) & asks & ~found)
        rank = _proposal_priority(demand, score, priority)
        accepted = _accept(demand, placement, expert, asks & found, rank, bounded_rows)
        moved = accepted & (slots == best)
        waiting = waiting & ~moved
        used = used | torch.zeros_like(used).scatter(1, expert, accepted)
        taken = torch.where(accepted, expert, -1)
        placement = Placement(
            experts=torch.where(moved, expert, placement.experts),
            kept=placement.kept,
            rerouted=placement.rerouted | moved,
            room=_take(demand, placement.room, demand.pool_of_expert, taken, demand.cost[:, None]),
            row_room=_take(demand, placement.row_room, demand.rank_of_expert, taken, torch.ones_like(taken)),
        )
    return placement


def _best_candidate(
    demand: Demand,
    placement: Placement,
    home: Tensor,
    candidates: Tensor,
    similarity: Tensor,
    used: Tensor,
    bounded_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidate of most score times similarity, its score, and whether there is one: [T, 1]."""
    options = candidates[home[:, 0]]  # [T, C]
    score = demand.scores.gather(1, options)
    value = score * similarity[home, options]
    source = demand.source[:, None]
    open_ = ~used.gather(1, options) & (value > 0)
    open_ &= placement.room[source, demand.pool_of_expert[options]] >= demand.cost[:, None]
    if bounded_rows:
        open_ &= placement.row_room[source, demand.rank_of_expert[options]] >= 1
    value, index = torch.where(open_, value, -1.0).max(1, keepdim=True)
    return options.gather(1, index), score.gather(1, index), value > 0


def _proposal_priority(demand: Demand, score: Tensor, priority: str) -> Tensor:
    """Priority of a proposal, by the rule of admission but at the candidate's score: int64 [T, 1]."""
    return priority_of(score, demand.weight[:, None], priority)


def priority_of(score: Tensor, weight: Tensor, rule: str) -> Tensor:
    """Admission priority by rule "score", "weight" or "product": score 0..1, weight fixed point."""
    if rule == "score":
        return priorities(score)
    share = weight.double() / UNIT
    return priorities((share * score if rule == "product" else share).expand_as(score))


def _accept(
    demand: Demand, placement: Placement, expert: Tensor, proposed: Tensor, rank: Tensor, bounded_rows: bool
) -> Tensor:
    """Which proposals [T, 1] find room, in priority order."""
    accepted = proposed
    bounds = [(demand.pool_of_expert, placement.room, demand.cost)]
    if bounded_rows:
        bounds.append((demand.rank_of_expert, placement.row_room, torch.ones_like(demand.cost)))
    for of_expert, room, cost in bounds:
        pool = demand.pools(expert, of_expert, room.shape[1], accepted).flatten()
        key = sort_key(pool, room.numel(), rank.flatten(), demand.position, len(demand.position))
        accepted = admit(pool, key, cost, room.flatten())[:, None]
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
        key = sort_key(pool, sources * ranks, demand.priority.flatten(), place, places)
        open_ = admit(pool, key, torch.ones_like(pool), placement.row_room.flatten()).view(dropped.shape)

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
    cost = demand.cost[:, None].expand(taken.shape)
    limited = replace(
        placement,
        experts=torch.where(back, demand.experts, placement.experts),
        kept=placement.kept | back,
        room=_take(demand, placement.room, demand.pool_of_expert, taken, cost),
        row_room=_take(demand, placement.row_room, demand.rank_of_expert, taken, torch.ones_like(taken)),
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
