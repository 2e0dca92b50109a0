"""Local semantic rerouting: what overflowed goes to the best expert that still has room.

Shapes: T tokens, W of them that have something waiting, k assignments of a token, E experts, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .admission import Queue, bounds_of, longest_prefix, pools_of, subtract_load
from .contracts import Constants, Demand, Placement
from .demand import order_of, priority_of
from .fixed_point import UNIT
from .kernels.dispatch import fused, indices_of

LAST = (1 << 63) - 1
"""After every order."""


@fused
def reroute(demand: Demand, placement: Placement, constants: Constants, rounds: int) -> Placement:
    """In each of ``rounds`` rounds a token proposes its best waiting assignment to its best candidate, by
    score times affinity, among those with room that it does not use and may use; ties go to the lower
    expert. Pools accept proposals in priority order, at the candidate's score, while there is room.
    """
    waiting = demand.planned & (placement.experts < 0)
    token = indices_of(waiting.any(1))  # [W], the only ones looked at from here on
    queue = demand.order.masked_fill(~waiting, LAST).index_select(0, token)  # [W, k]
    experts, scores = (one.index_select(0, token) for one in (demand.choice.experts, demand.choice.scores))
    weight, source, position = (
        demand.weight[token],
        demand.tokens.source[token],
        demand.tokens.position[token],
    )
    placed, room, row_room = placement.experts.index_select(0, token), placement.room, placement.row_room
    some = Demand(demand.choice, demand.tokens, weight, demand.terms, demand.order, demand.planned)
    places = len(demand.order)
    # A token's own experts are out: it has them, or they had no room for it. So is one that it is given.
    nowhere = scores.shape[1]
    open_ = functional.pad(scores, (0, 1)).scatter_(1, experts.masked_fill(experts < 0, nowhere), 0.0)
    open_ = open_[:, :nowhere].nan_to_num_(0.0)  # a score that is NaN is none
    for _ in range(rounds):
        first, column = queue.min(1, keepdim=True)  # [W, 1]: the best waiting assignment
        home = experts.gather(1, column)[:, 0].clamp_(min=0)  # of who waits for none, any
        value = open_ * constants.affinity.index_select(0, home)  # [W, E]
        value.mul_(_has_room(some, room, row_room, source, constants))
        value, expert = value.max(1, keepdim=True)
        found = (value > 0) & (first < LAST)
        score = open_.gather(1, expert)
        order = order_of(priority_of(score, weight, demand.terms.priority), position[:, None], places)
        accepted, rooms = found, []
        for bound in bounds_of(some, room, row_room, constants):
            pool = pools_of(expert, accepted, bound.of_expert, source, bound.room)
            fits = longest_prefix(Queue(pool, order, bound.cost, places), bound.room.flatten())
            accepted = accepted & fits
            rooms.append((bound, pool))
        # No candidate now is none ever: room only shrinks. Let the token's next one have its turn.
        queue = queue.scatter(1, column, first.masked_fill(accepted | ~found, LAST))
        placed = placed.scatter(1, column, torch.where(accepted, expert, placed.gather(1, column)))
        open_ = open_.scatter_(1, expert, score.masked_fill(accepted, 0.0))
        left = [subtract_load(bound.room, pool, accepted, bound.cost) for bound, pool in rooms]
        room, row_room = left[0], left[1] if row_room is not None else None
    return Placement(placement.experts.index_copy(0, token, placed), room, row_room)


def _has_room(
    demand: Demand, room: Tensor, row_room: Tensor | None, source: Tensor, constants: Constants
) -> Tensor:
    """Which experts have room for tokens of source and weight int64 [W]: float32 [1 or W, E]."""

    def at_token(by_source: Tensor) -> Tensor:
        return by_source if len(by_source) == 1 else by_source[source]

    # Room is compared for every expert, not for every token, wherever all assignments cost the same.
    room = room[:, constants.pool_of_expert]  # [S, E]
    by_weight = demand.terms.by_weight
    fits = at_token(room) >= demand.weight[:, None] if by_weight else at_token(room >= UNIT)
    if row_room is not None:
        fits = fits & at_token(row_room[:, constants.rank_of_expert] >= 1)
    return fits.float()
