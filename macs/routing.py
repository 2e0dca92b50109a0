"""The plan: who is admitted, who is rerouted, who is dropped.

Shapes: T tokens, k assignments of a token, N = T k, E experts, R ranks, S sources, P pools. Loads,
costs, capacities and priorities are int64 (see ``fixed_point``). An *assignment* is one (token, expert)
pair; a *pool* is what has a capacity: an expert or a rank, once for each source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .fixed_point import PRIORITY_BITS, UNIT, to_fixed
from .modality import Tokens
from .ops import fused, numbers_of

EXEMPT_PRIORITY = (1 << PRIORITY_BITS) + 1
"""Above every other."""

UNBOUNDED = 1 << 62
"""The room of a source that does not plan."""

LAST = (1 << 63) - 1
"""After every order."""


def priority_of(score: Tensor, weight: Tensor, rule: str) -> Tensor:
    """Admission priority by rule "score" or "product" (with the weight).

    score [T, m] in 0..1, weight int64 [T] in fixed point -> int64 [T, m] in 0..2 ** PRIORITY_BITS.
    """
    value = score.double()
    if rule == "product":
        value = (weight.double() / UNIT)[:, None] * value
    return to_fixed(value.clamp(0, 1), 1 << PRIORITY_BITS)


def order_of(priority: Tensor, place: Tensor, places: int) -> Tensor:
    """One number for each assignment that rises as its priority falls, then with its place. int64

    priority in 0..EXEMPT_PRIORITY, place in 0..places-1, of the same shape.
    """
    return ((EXEMPT_PRIORITY - priority) << place_bits(places)) | place


@fused("order")
def ask(
    experts: Tensor, scores: Tensor, weight: Tensor, tokens: Tokens, rule: str, top_k: int
) -> tuple[Tensor, Tensor]:
    """In which order assignments are admitted, int64 [T, k'], and which are planned at all, bool [T, k'].

    experts int64 [T, k'] (-1: none), scores [T, E], weight int64 [T]. By falling ``priority_of``, exempt
    tokens first; then by the token's position, a token's own ``top_k`` before those a policy adds, then by
    the expert: ``order_of`` with ``places_of`` places.
    """
    own, count = experts.clamp(min=0), scores.shape[1]
    priority = priority_of(scores.gather(1, own), weight, rule)
    priority = priority.masked_fill(tokens.exempt[:, None], EXEMPT_PRIORITY)
    place = own
    if experts.shape[1] > top_k:
        place = own + count * (torch.arange(experts.shape[1], device=own.device) >= top_k)
    spread = places_of(1, count, experts.shape[1] > top_k)
    order = order_of(
        priority, tokens.position[:, None] * spread + place, places_of(len(scores), count, spread > count)
    )
    return order, (experts >= 0) & tokens.valid[:, None]


def places_of(tokens: int, experts: int, adds: bool) -> int:
    """How many places there are for a policy that adds assignments, or does not."""
    return tokens * experts * (2 if adds else 1)


def place_bits(places: int) -> int:
    """Bits that a place takes."""
    return max(1, (places - 1).bit_length())


def order_bits(places: int, pools: int) -> int:
    """Bits that an order takes; a ``ValueError`` where a sort by pool and order has none left."""
    bits = PRIORITY_BITS + 1 + place_bits(places)
    if (pools + 1).bit_length() + bits > 63:
        raise ValueError(
            f"plan: {pools} pools and {places} places need {(pools + 1).bit_length() + bits}-bit keys, 63 is "
            "the most; plan fewer tokens or sources at once"
        )
    return bits


@dataclass(frozen=True)
class Queue:
    """Assignments that wait for admission.

    pool int64 [T, m] in 0..P (P: takes no part), order int64 [T, m] (``order_of``, different for all that
    take part), cost int64 [T] > 0, of each; places: as of the order.
    """

    pool: Tensor
    order: Tensor
    cost: Tensor
    places: int

    @property
    def device(self) -> torch.device:
        return self.pool.device


@fused("admission")
def admit(queue: Queue, capacity: Tensor) -> Tensor:
    """The longest prefix of every pool, in ascending order, whose cost fits its capacity.

    capacity int64 [P] -> admitted bool [T, m]; True for what takes no part. One sort, of the pools that
    overflow, and one segmented cumulative sum.
    """
    bits = order_bits(queue.places, len(capacity))
    every, cost = queue.pool.flatten(), queue.cost[:, None].expand(queue.pool.shape).flatten()
    limit = torch.cat([capacity, capacity.new_full((1,), UNBOUNDED)])
    load = torch.zeros_like(limit).scatter_add_(0, every, cost)
    over = load > limit
    contested = over[every]
    index = numbers_of(contested)  # [M]
    pool = every[index]
    index = index[((pool << bits) | queue.order.flatten()[index]).sort().indices]
    pool = every[index]
    load = load * over
    # Costs are positive, so the running sum rises and what fits is a prefix by itself.
    running = (cost * contested)[index].cumsum(0) - (load.cumsum(0) - load)[pool]
    fits = (~contested).index_put_((index,), running <= limit[pool]) | ~contested
    return fits.view(queue.pool.shape)


@dataclass(frozen=True)
class Demand:
    """The assignments to be planned.

    experts int64 [T, k]    -1: no assignment
    scores float [T, E]     the router's scores, 0..1; 0 where it may not send the token
    weight int64 [T]        semantic weights, what a score is multiplied by (priority = product)
    cost int64 [T]          what one assignment of the token takes from a capacity
    same_cost               whether that is one (``UNIT``) for every token
    order int64 [T, k]      by falling priority, then place; different, of so many places
    tokens                  which token is which
    planned bool [T, k]     False: stays as it is and counts nowhere (padding)
    pool_of_expert int64 [E], rank_of_expert int64 [E]
    """

    experts: Tensor
    scores: Tensor
    weight: Tensor
    cost: Tensor
    same_cost: bool
    order: Tensor
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
        pool = pools_of(self.experts, takes_part, of_expert, self.tokens.source, room)
        return Queue(pool, self.order, cost, self.places)


def pools_of(experts: Tensor, takes_part: Tensor, of_expert: Tensor, source: Tensor, room: Tensor) -> Tensor:
    """The pool of room [S, P] that each expert in experts [T, m] is in, int64; S P where it takes no part."""
    pool = of_expert[experts.clamp(min=0)]
    if room.shape[0] > 1:
        pool = pool + source[:, None] * room.shape[1]
    return pool.masked_fill(~takes_part, room.numel())


@dataclass(frozen=True)
class Placement:
    """Where assignments stand so far: experts int64 [T, k] (-1: nowhere yet), and what room is left:
    room int64 [S, P], row_room int64 [S, R], none where rows have no bound of their own."""

    experts: Tensor
    room: Tensor
    row_room: Tensor | None


@fused("admission")
def place_admitted(demand: Demand, start: Placement) -> Placement:
    """Admission: each pool's longest prefix, then, if rows are bounded, each rank's.

    start: everybody where the router wants them, and all room there is.
    """
    kept, spared = demand.planned, demand.tokens.exempt[:, None]
    bounds = [(demand.pool_of_expert, start.room, demand.cost)]
    if start.row_room is not None:
        bounds.append((demand.rank_of_expert, start.row_room, torch.ones_like(demand.cost)))
    for of_expert, room, cost in bounds:
        fits = admit(demand.queue(kept, of_expert, room, cost), room.flatten())
        kept = kept & (fits | spared)
    experts = demand.experts.masked_fill(demand.planned & ~kept, -1)
    return take(demand, replace(start, experts=experts), experts.masked_fill(~kept, -1))


@fused("loads")
def less(room: Tensor, source: Tensor, of_expert: Tensor, experts: Tensor, cost: Tensor) -> Tensor:
    """Room int64 [S, P] less the cost int64 [T] of every expert in experts [T, m] (-1: none).

    source int64 [T], of_expert int64 [E] in 0..P-1.
    """
    pool = pools_of(experts, experts >= 0, of_expert, source, room).flatten()
    load = room.new_zeros(room.numel() + 1)
    load = load.scatter_add_(0, pool, cost[:, None].expand(experts.shape).flatten())
    return room - load[:-1].view(room.shape)


def take(demand: Demand, before: Placement, taken: Tensor) -> Placement:
    """A placement with less room, once experts [T, m] (-1: none) are taken."""
    source, row_room = demand.tokens.source, before.row_room
    room = less(before.room, source, demand.pool_of_expert, taken, demand.cost)
    if row_room is not None:
        row_room = less(row_room, source, demand.rank_of_expert, taken, torch.ones_like(demand.cost))
    return replace(before, room=room, row_room=row_room)


@fused("rerouting")
def reroute(demand: Demand, placement: Placement, affinity: Tensor, rounds: int, rule: str) -> Placement:
    """Local semantic rerouting: what overflowed goes to the best expert that still has room.

    affinity float32 [E, E] in 0..1: how alike two experts are; 0 where an assignment of the first may not
    go to the second. In each of ``rounds`` rounds a token proposes its best waiting assignment to its
    best candidate, by score times affinity, among those with room that it does not use and may use; ties
    go to the lower expert. Pools accept proposals in priority order (``priority_of`` by ``rule``, at the
    candidate's score) while there is room.
    """
    waiting = demand.planned & (placement.experts < 0)
    token = numbers_of(waiting.any(1))  # [W], the only ones looked at from here on
    queue = demand.order.masked_fill(~waiting, LAST)[token]  # [W, k]
    experts, scores, cost = demand.experts[token], demand.scores[token], demand.cost[token]
    weight, source, position = (
        demand.weight[token],
        demand.tokens.source[token],
        demand.tokens.position[token],
    )
    placed = placement.experts[token]
    # A token's own experts are out: it has them, or they had no room for it. So is one that it is given.
    nowhere = scores.shape[1]
    open_ = functional.pad(scores, (0, 1)).scatter_(1, experts.masked_fill(experts < 0, nowhere), 0.0)
    open_ = open_[:, :nowhere].nan_to_num_(0.0)  # a score that is NaN is none
    room, row_room = placement.room, placement.row_room
    for _ in range(rounds):
        first, column = queue.min(1, keepdim=True)  # [W, 1]: the best waiting assignment
        home = experts.gather(1, column)
        value = open_ * affinity[home[:, 0].clamp(min=0)]  # [W, E]
        value = value.mul_(_has_room(demand, room, row_room, source, cost))
        value, expert = value.max(1, keepdim=True)
        found = (value > 0) & (first < LAST)
        score = open_.gather(1, expert)
        order = order_of(priority_of(score, weight, rule), position[:, None], len(demand.experts))
        accepted = found
        bounds = [(demand.pool_of_expert, room, cost)]
        if row_room is not None:
            bounds.append((demand.rank_of_expert, row_room, torch.ones_like(cost)))
        for of_expert, left, price in bounds:
            pool = pools_of(expert, accepted, of_expert, source, left)
            accepted = accepted & admit(Queue(pool, order, price, len(demand.experts)), left.flatten())
        # No candidate now is none ever: room only shrinks. Let the token's next one have its turn.
        queue = queue.scatter(1, column, first.masked_fill(accepted | ~found, LAST))
        placed = placed.scatter(1, column, torch.where(accepted, expert, placed.gather(1, column)))
        open_ = open_.scatter_(1, expert, score.masked_fill(accepted, 0.0))
        taken = expert.masked_fill(~accepted, -1)
        room = less(room, source, demand.pool_of_expert, taken, cost)
        if row_room is not None:
            row_room = less(row_room, source, demand.rank_of_expert, taken, torch.ones_like(cost))
    return Placement(placement.experts.index_put((token,), placed), room, row_room)


def _has_room(demand: Demand, room: Tensor, row_room: Tensor | None, source: Tensor, cost: Tensor) -> Tensor:
    """Which experts have room for tokens of source and cost int64 [W]: float32 [1 or W, E]."""

    def at_token(by_source: Tensor) -> Tensor:
        return by_source if len(by_source) == 1 else by_source[source]

    # Whether there is room is told for every expert, not for every token, wherever that will do.
    room = room[:, demand.pool_of_expert]  # [S, E]
    fits = at_token(room >= UNIT) if demand.same_cost else at_token(room) >= cost[:, None]
    if row_room is not None:
        fits = fits & at_token(row_room[:, demand.rank_of_expert] >= 1)
    return fits.float()


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
        open_ = dropped & admit(queue, room.flatten())

    source = demand.tokens.source[:, None].expand_as(dropped)

    def by_source(who: Tensor) -> Tensor:
        flat = torch.where(who, mass, 0).flatten()
        return flat.new_zeros(sources).scatter_add(0, source.flatten(), flat)

    excess = by_source(dropped) - (by_source(demand.planned).double() * max_drop).floor().long()
    # Taken back: everyone before whom the mass taken back is still short of the excess.
    pool = torch.where(open_, source, sources).flatten()
    bits = order_bits(demand.places, sources)
    order = torch.sort((pool << bits) | demand.order.flatten()).indices
    sorted_pool, sorted_mass = pool[order], mass.flatten()[order]
    load = mass.new_zeros(sources + 1).scatter_add(0, pool, mass.flatten())
    start = load.cumsum(0) - load
    before = sorted_mass.cumsum(0) - sorted_mass - start[sorted_pool]
    short = before < torch.cat([excess, excess.new_full((1,), -1)])[sorted_pool]
    back = torch.empty_like(short).scatter_(0, order, short).view(dropped.shape) & open_
    limited = replace(placement, experts=torch.where(back, demand.experts, placement.experts))
    return take(demand, limited, torch.where(back, demand.experts, -1)), excess > by_source(back)


@fused("combine")
def combine_weights(demand: Demand, placed: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Combine weights of the placed assignments, float [T, k'], 0 where dropped, and which of them were
    rerouted, bool [T, k'].

    Kept ones pass through untouched. A rerouted one gets ``weight_of_score`` of its new expert. The
    router's own columns are the first ``top_k``.
    """
    changed = demand.planned & (placed != demand.experts)
    candidate = demand.scores.gather(1, placed.clamp(min=0))
    moved = weight_of_score(candidate, demand.experts[:, :top_k], weights[:, :top_k], demand.scores)
    rerouted = changed & (placed >= 0)
    return torch.where(changed, moved.masked_fill(~rerouted, 0.0), weights), rerouted


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
