"""The plan: who is admitted, who is rerouted, who is dropped.

Shapes: T tokens, k assignments of a token, N = T k, E experts, R ranks, S sources, P pools. Loads,
costs, capacities and priorities are int64 (see ``fixed_point``). An *assignment* is one (token, expert)
pair; a *pool* is what has a capacity: an expert or a rank, once for each source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .fixed_point import PRIORITY_BITS, UNIT, to_fixed
from .modality import Tokens
from .ops import fused, numbers_of

EXEMPT_PRIORITY = (1 << PRIORITY_BITS) + 1
"""Above every other."""

UNBOUNDED = 1 << 62
"""The room of a source that does not plan."""


@fused("rerouting")
def priority_of(score: Tensor, weight: Tensor, rule: str) -> Tensor:
    """Admission priority by rule "score" or "product" (with the weight).

    score [T, m] in 0..1, weight int64 [T] in fixed point -> int64 [T, m] in 0..2 ** PRIORITY_BITS.
    """
    value = score.double()
    if rule == "product":
        value = (weight.double() / UNIT)[:, None] * value
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
            f"plan: {pools} pools and {places} places need {bits}-bit keys, 63 is the most; "
            "plan fewer tokens or sources at once"
        )
    return (((pool << (PRIORITY_BITS + 1)) | (EXEMPT_PRIORITY - priority)) << place_bits) | place


@dataclass(frozen=True)
class Queue:
    """Assignments that wait for admission.

    pool int64 [N] in 0..P (P: takes no part), priority int64 [N] in 0..EXEMPT_PRIORITY, place int64 [N], all
    different, in 0..places-1, cost int64 [N] > 0.
    """

    pool: Tensor
    priority: Tensor
    place: Tensor
    cost: Tensor
    places: int

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def only(self, chosen: Tensor) -> Queue:
        """Those numbered in ``chosen`` int64 [M]."""
        return Queue(
            self.pool[chosen], self.priority[chosen], self.place[chosen], self.cost[chosen], self.places
        )


@fused("admission")
def admit(queue: Queue, capacity: Tensor) -> Tensor:
    """The longest prefix of every pool, by falling priority and then place, whose cost fits its capacity.

    capacity int64 [P] -> admitted bool [N]. One sort and one segmented cumulative sum.
    """
    pools = len(capacity)
    load = capacity.new_zeros(pools + 1).scatter_add(0, queue.pool, queue.cost)[:pools]
    over = load > capacity
    # Where all fits nobody needs to be put in order: room, and over, are told for "no pool" too.
    fits = torch.cat([~over, over.new_zeros(1)])[queue.pool]
    competing = numbers_of(torch.cat([over, over.new_zeros(1)])[queue.pool])
    queue = queue.only(competing)
    order = torch.sort(sort_key(queue.pool, pools, queue.priority, queue.place, queue.places)).indices
    pool = queue.pool[order]
    load = torch.where(over, load, 0) if queue.device.type == "cpu" else load
    before = torch.cat([load.cumsum(0) - load, load.sum(0, keepdim=True)])
    limit = torch.cat([capacity, capacity.new_full((1,), -1)])
    # Costs are positive, so the running sum rises and what fits is a prefix by itself.
    prefix = queue.cost[order].cumsum(0) - before[pool] <= limit[pool]
    return fits.index_put((competing[order],), prefix)


@dataclass(frozen=True)
class Demand:
    """The assignments to be planned.

    experts int64 [T, k]    -1: no assignment
    scores float [T, E]     the router's scores, 0..1; 0 where it may not send the token
    weight int64 [T]        semantic weights, what a score is multiplied by (priority = product)
    cost int64 [T]          what one assignment of the token takes from a capacity
    same_cost               whether that is one (``UNIT``) for every token
    priority int64 [T, k]
    place int64 [T, k]      settles ties of priority; different, in 0..places-1
    tokens                  which token is which
    planned bool [T, k]     False: stays as it is and counts nowhere (padding)
    pool_of_expert int64 [E], rank_of_expert int64 [E]
    """

    experts: Tensor
    scores: Tensor
    weight: Tensor
    cost: Tensor
    same_cost: bool
    priority: Tensor
    place: Tensor
    places: int
    tokens: Tokens
    planned: Tensor
    pool_of_expert: Tensor
    rank_of_expert: Tensor

    @property
    def device(self) -> torch.device:
        return self.experts.device

    def queue(self, takes_part: Tensor, of_expert: Tensor, room: Tensor, cost: Tensor) -> Queue:
        """The assignments in ``takes_part`` bool [T, k], for admission to pools of room [S, P].

        of_expert int64 [E] in 0..P-1; cost int64 [T].
        """
        pool = of_expert[self.experts.clamp(min=0)]
        if room.shape[0] > 1:
            pool = pool + self.tokens.source[:, None] * room.shape[1]
        pool = torch.where(takes_part, pool, room.numel())
        each = cost[:, None].expand(pool.shape).flatten()
        return Queue(pool.flatten(), self.priority.flatten(), self.place.flatten(), each, self.places)


@dataclass(frozen=True)
class Placement:
    """Where assignments stand so far: experts int64 [T, k] (-1: nowhere yet), and what room is left:
    room int64 [S, P], row_room int64 [S, R], none where rows have no bound of their own."""

    experts: Tensor
    room: Tensor
    row_room: Tensor | None


def place_admitted(demand: Demand, start: Placement) -> Placement:
    """Admission: each pool's longest prefix, then, if rows are bounded, each rank's.

    start: everybody where the router wants them, and all room there is.
    """
    exempt = demand.tokens.exempt[:, None]
    kept = demand.planned
    one = torch.ones_like(demand.cost)
    for of_expert, room, cost in (
        (demand.pool_of_expert, start.room, demand.cost),
        (demand.rank_of_expert, start.row_room, one),
    ):
        if room is not None:
            fits = admit(demand.queue(kept, of_expert, room, cost), room.flatten()).view(kept.shape)
            kept = kept & (fits | exempt)
    experts = torch.where(demand.planned & ~kept, -1, demand.experts)
    return _taken(demand, replace(start, experts=experts), torch.where(kept, experts, -1))


@fused("loads")
def less(room: Tensor, source: Tensor, of_expert: Tensor, experts: Tensor, cost: Tensor) -> Tensor:
    """Room int64 [S, P] less the cost int64 [T] of every expert in experts [T, m] (-1: none).

    source int64 [T], of_expert int64 [E] in 0..P-1.
    """
    pool = of_expert[experts.clamp(min=0)]
    if room.shape[0] > 1:
        pool = pool + source[:, None] * room.shape[1]
    pool = torch.where(experts >= 0, pool, room.numel())
    load = room.new_zeros(room.numel() + 1)
    load = load.scatter_add(0, pool.flatten(), cost[:, None].expand(pool.shape).flatten())
    return room - load[:-1].view(room.shape)


def _taken(demand: Demand, before: Placement, taken: Tensor) -> Placement:
    """The placement with less room, once experts [T, m] (-1: none) are taken."""
    source, row_room = demand.tokens.source, before.row_room
    room = less(before.room, source, demand.pool_of_expert, taken, demand.cost)
    if row_room is not None:
        row_room = less(row_room, source, demand.rank_of_expert, taken, torch.ones_like(demand.cost))
    return replace(before, room=room, row_room=row_room)


def reroute(demand: Demand, placement: Placement, affinity: Tensor, rounds: int, rule: str) -> Placement:
    """Local semantic rerouting: what overflowed goes to the best expert that still has room.

    affinity float32 [E, E] in 0..1: how alike two experts are; 0 where an assignment of the first may not
    go to the second. In each of ``rounds`` rounds a token proposes its best waiting assignment to its
    best candidate, by score times affinity, among those with room that it does not use and may use;
    pools accept proposals in priority order (``priority_of`` by ``rule``, at the candidate's score)
    while there is room.
    """
    waiting = demand.planned & (placement.experts < 0)
    for _ in range(rounds):
        asking = numbers_of(waiting.any(1))
        proposed = propose(demand, placement, waiting, asking, affinity, rule)
        accepted = _accept(demand, placement, proposed, asking)
        cell = asking * waiting.shape[1] + proposed.column
        # No candidate now is none ever: room only shrinks. Let the token's next one have its turn.
        done = accepted | (proposed.expert < 0)
        waiting = waiting.flatten().index_put((cell,), ~done & waiting.flatten()[cell]).view(waiting.shape)
        taken = torch.where(accepted, proposed.expert, -1)
        held = placement.experts.flatten()
        experts = held.index_put((cell,), torch.where(accepted, taken, held[cell])).view(waiting.shape)
        row_room = placement.row_room
        source, cost = demand.tokens.source[asking], demand.cost[asking]
        room = less(placement.room, source, demand.pool_of_expert, taken[:, None], cost)
        if row_room is not None:
            one = torch.ones_like(cost)
            row_room = less(row_room, source, demand.rank_of_expert, taken[:, None], one)
        placement = Placement(experts, room, row_room)
    return placement


@dataclass(frozen=True)
class Proposals:
    """What tokens ask for in a round of rerouting, int64 [W] each: an expert (-1: none), for their
    assignment in this column, with this priority."""

    expert: Tensor
    column: Tensor
    priority: Tensor


@fused("rerouting")
def propose(
    demand: Demand, placement: Placement, waiting: Tensor, asking: Tensor, affinity: Tensor, rule: str
) -> Proposals:
    """The best candidate of every token's best waiting assignment; ties go to the lower expert.

    waiting bool [T, k], asking int64 [W]: the tokens to look at, affinity float32 [E, E].
    """
    experts, waits = demand.experts[asking], waiting[asking]  # [W, k]
    size = demand.scores.shape[1]
    first = torch.where(waits, demand.priority[asking] * size + (size - 1 - experts), -1)
    first, column = first.max(1, keepdim=True)  # [W, 1]
    home = experts.gather(1, column)
    score = demand.scores[asking]  # [W, E]
    value = score * affinity[home[:, 0].clamp(min=0)]

    def at_token(by_source: Tensor) -> Tensor:
        return by_source if len(by_source) == 1 else by_source[demand.tokens.source[asking]]  # [1 or W, E]

    # Whether there is room is told for every expert, not for every token, wherever that will do.
    room = placement.room[:, demand.pool_of_expert]  # [S, E]
    if demand.same_cost:
        value.mul_(at_token((room >= UNIT).to(value.dtype)))
    else:
        value.mul_(at_token(room) >= demand.cost[asking, None])
    if placement.row_room is not None:
        value.mul_(at_token((placement.row_room[:, demand.rank_of_expert] >= 1).to(value.dtype)))
    value = torch.fmax(value, value.new_zeros(()))  # a score that is NaN is none
    # A token's own experts are out, it has them, or they had no room for it; so are those it was given.
    own = torch.cat([experts, placement.experts[asking]], 1)
    value.scatter_(1, torch.where(own >= 0, own, home).clamp(min=0), 0.0)
    value, expert = value.max(1, keepdim=True)
    found = (first >= 0) & (value > 0)
    score = torch.where(found, score.gather(1, expert), 0)
    priority = torch.where(found, priority_of(score, demand.weight[asking], rule), 0)
    return Proposals(torch.where(found, expert, -1)[:, 0], column[:, 0], priority[:, 0])


def _accept(demand: Demand, placement: Placement, proposed: Proposals, asking: Tensor) -> Tensor:
    """Which proposals of the tokens in ``asking`` find room, in priority order: bool [W]."""
    accepted, expert = proposed.expert >= 0, proposed.expert.clamp(min=0)
    cost, place = demand.cost[asking], demand.tokens.position[asking]
    for of_expert, room, price in (
        (demand.pool_of_expert, placement.room, cost),
        (demand.rank_of_expert, placement.row_room, torch.ones_like(cost)),
    ):
        if room is not None:
            pool = of_expert[expert]
            if room.shape[0] > 1:
                pool = pool + demand.tokens.source[asking] * room.shape[1]
            pool = torch.where(accepted, pool, room.numel())
            queue = Queue(pool, proposed.priority, place, price, len(demand.experts))
            accepted = admit(queue, room.flatten())
    return accepted


def limit_drops(
    demand: Demand, placement: Placement, mass: Tensor, max_drop: float, hard: bool
) -> tuple[Placement, Tensor]:
    """Re-admit the best of the dropped, to their own experts, until few enough are dropped.

    mass int64 [T, k] is every assignment's combine weight. For each source: the fewest of the
    dropped, in priority order, are taken back so that the rest holds at most ``max_drop`` of its
    mass. A ``hard`` bound on rows takes precedence: what it shuts out stays out. Also returns for which
    sources more than that stays dropped, bool [S].
    """
    sources = placement.room.shape[0]
    dropped = demand.planned & (placement.experts < 0) & (mass > 0)
    open_ = dropped
    if hard:
        of_expert, room, cost = demand.pool_of_expert, placement.room, demand.cost  # rows, if nothing else is
        if placement.row_room is not None:
            of_expert, room, cost = demand.rank_of_expert, placement.row_room, torch.ones_like(cost)
        queue = demand.queue(dropped, of_expert, room, cost)
        open_ = admit(queue, room.flatten()).view(dropped.shape)

    source = demand.tokens.source[:, None].expand_as(dropped)

    def by_source(who: Tensor) -> Tensor:
        flat = torch.where(who, mass, 0).flatten()
        return flat.new_zeros(sources).scatter_add(0, source.flatten(), flat)

    excess = by_source(dropped) - (by_source(demand.planned).double() * max_drop).floor().long()
    # Taken back: everyone before whom the mass taken back is still short of the excess.
    pool = torch.where(open_, source, sources).flatten()
    key = sort_key(pool, sources, demand.priority.flatten(), demand.place.flatten(), demand.places)
    order = torch.sort(key).indices
    sorted_pool, sorted_mass = pool[order], mass.flatten()[order]
    load = mass.new_zeros(sources + 1).scatter_add(0, pool, mass.flatten())
    start = load.cumsum(0) - load
    before = sorted_mass.cumsum(0) - sorted_mass - start[sorted_pool]
    short = before < torch.cat([excess, excess.new_full((1,), -1)])[sorted_pool]
    back = torch.empty_like(short).scatter_(0, order, short).view(dropped.shape) & open_
    limited = replace(placement, experts=torch.where(back, demand.experts, placement.experts))
    return _taken(demand, limited, torch.where(back, demand.experts, -1)), excess > by_source(back)


def combine_weights(demand: Demand, placed: Tensor, weights: Tensor, top_k: int) -> Tensor:
    """Combine weights of the placed assignments, float [T, k'], 0 where dropped.

    Kept ones pass through untouched. A rerouted one gets ``weight_of_score`` of its new expert. The
    router's own columns are the first ``top_k``.
    """
    changed = demand.planned & (placed != demand.experts)
    candidate = demand.scores.gather(1, placed.clamp(min=0))
    moved = weight_of_score(candidate, demand.experts[:, :top_k], weights[:, :top_k], demand.scores)
    return torch.where(changed, torch.where(placed >= 0, moved, 0), weights)


def weight_of_score(score: Tensor, experts: Tensor, weights: Tensor, scores: Tensor) -> Tensor:
    """Combine weight of an expert that joins a token with ``score`` [T, m]: s_c sum(w) / sum(s).

    experts [T, k] (-1: none), weights [T, k], scores [T, E]: the sums are over the token's own k, so scores
    and weights keep their proportion; they are taken in float64, so that the order in which a router
    names its experts does not matter. Never more than sum(w), as a correction bias or scores that vanish
    could have it.
    """
    real = experts >= 0
    total = torch.where(real, weights, 0).sum(1, keepdim=True, dtype=torch.float64).to(weights.dtype)
    own = torch.where(real, scores.gather(1, experts.clamp(min=0)), 0)
    score_sum = own.sum(1, keepdim=True, dtype=torch.float64).to(scores.dtype)
    share = (score / score_sum.clamp(min=torch.finfo(score_sum.dtype).tiny)).clamp(max=1.0)
    return share.to(weights.dtype) * total
