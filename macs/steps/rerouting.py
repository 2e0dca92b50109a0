"""Local semantic rerouting: an assignment that did not fit goes to the best expert with capacity left.

Shapes: T tokens, W of them with an assignment that waits, k assignments of a token, E experts, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .admission import Queue, limits_of, longest_prefix, pools_of, subtract_load
from .contracts import Demand, LayerConstants, Placement
from .demand import admission_key, priority_of
from .fixed_point import UNIT
from .kernels.dispatch import indices_of, kernels_enabled

LAST = (1 << 63) - 1
"""After every key."""


def reroute(demand: Demand, placement: Placement, constants: LayerConstants, rounds: int) -> Placement:
    """Place waiting assignments in ``rounds`` rounds.

    In a round each token proposes its best waiting assignment to its best candidate, by score times
    affinity, among the experts with capacity left that it does not use and may use; ties go to the lower
    expert. Pools accept proposals in order of the candidate's priority while capacity remains.

    Args:
        demand: the assignments in their order.
        placement: what admission placed and left.
        constants: affinity, pools and ranks of the experts.
        rounds: proposals that a token may make.

    Returns:
        The placement with the rerouted assignments.
    """
    if kernels_enabled(demand.device):
        from .kernels import rerouting as kernels

        return kernels.reroute(demand, placement, constants, rounds)
    waiting = demand.planned & (placement.experts < 0)
    token = indices_of(waiting.any(1))  # [W]: only these are looked at from here on
    keys = demand.admission_key.masked_fill(~waiting, LAST).index_select(0, token)  # [W, k]
    routing = demand.routing
    experts, scores = (value.index_select(0, token) for value in (routing.experts, routing.scores))
    weight, source = demand.weight[token], demand.tokens.source[token]
    position = demand.tokens.position[token]
    placed, remaining, rows = (
        placement.experts.index_select(0, token),
        placement.remaining,
        placement.remaining_rows,
    )
    waiters = Demand(routing, demand.tokens, weight, demand.rule, demand.admission_key, demand.planned)
    ties = len(demand.admission_key)
    # A token's chosen experts are closed: it has them, or they were full. So is each one it is given.
    num_experts = scores.shape[1]
    open_ = functional.pad(scores, (0, 1)).scatter_(1, experts.masked_fill(experts < 0, num_experts), 0.0)
    open_ = open_[:, :num_experts].nan_to_num_(0.0)  # a NaN score is no candidate
    for _ in range(rounds):
        first, column = keys.min(1, keepdim=True)  # [W, 1]: the best waiting assignment
        home = experts.gather(1, column)[:, 0].clamp_(min=0)
        value = open_ * constants.affinity.index_select(0, home)  # [W, E]
        value.mul_(_has_capacity(waiters, remaining, rows, source, constants))
        value, expert = value.max(1, keepdim=True)
        proposed = (value > 0) & (first < LAST)
        score = open_.gather(1, expert)
        key = admission_key(priority_of(score, weight, demand.rule.priority), position[:, None], ties)
        accepted, pools = proposed, []
        for limit in limits_of(waiters, remaining, rows, constants):
            pool = pools_of(expert, accepted, limit.of_expert, source, limit.capacity)
            fits = longest_prefix(Queue(pool, key, limit.cost, ties), limit.capacity.flatten())
            accepted = accepted & fits
            pools.append((limit, pool))
        # An assignment without a candidate now never has one, for capacity only shrinks: the next one waits.
        keys = keys.scatter(1, column, first.masked_fill(accepted | ~proposed, LAST))
        placed = placed.scatter(1, column, torch.where(accepted, expert, placed.gather(1, column)))
        open_ = open_.scatter_(1, expert, score.masked_fill(accepted, 0.0))
        left = [subtract_load(limit.capacity, pool, accepted, limit.cost) for limit, pool in pools]
        remaining, rows = left[0], left[1] if rows is not None else None
    return Placement(placement.experts.index_copy(0, token, placed), remaining, rows, moved=True)


def _has_capacity(
    demand: Demand, remaining: Tensor, rows: Tensor | None, source: Tensor, constants: LayerConstants
) -> Tensor:
    """Experts with capacity for tokens of source and weight int64 [W]: float32 [1 or W, E]."""

    def at_token(by_source: Tensor) -> Tensor:
        return by_source if len(by_source) == 1 else by_source[source]

    # Compared for every expert, not for every token, where all assignments cost the same.
    remaining = remaining[:, constants.pool_of_expert]  # [S, E]
    if demand.rule.by_weight:
        fits = at_token(remaining) >= demand.weight[:, None]
    else:
        fits = at_token(remaining >= UNIT)
    if rows is not None:
        fits = fits & at_token(rows[:, constants.rank_of_expert] >= 1)
    return fits.float()
