"""Local semantic rerouting: an assignment that did not fit goes to the best expert with capacity left.

Shapes: T tokens, W of them with an assignment that waits, k assignments of a token, E experts, S sources.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from .admission import fill, limits_of
from .contracts import Demand, LayerConstants, Placement
from .demand import admission_key, priority_of
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
    if kernels_enabled(demand.weight.device):
        from .kernels import rerouting as kernels

        return kernels.reroute(demand, placement, constants, rounds)
    waiting = demand.planned & (placement.experts < 0)
    token = indices_of(waiting.any(1))  # [W]: only these are looked at from here on
    keys = demand.admission_key.masked_fill(~waiting, LAST).index_select(0, token)  # [W, k]
    tokens, ties = demand.tokens, len(demand.admission_key)
    experts, scores, placed = (
        one.index_select(0, token)
        for one in (demand.routing.experts, demand.routing.scores, placement.experts)
    )
    weight, source, position = demand.weight[token], tokens.source[token], tokens.position[token]
    limits = limits_of(demand.cost[token], placement.remaining, placement.remaining_rows, constants)
    # A token's chosen experts are closed: it has them, or they were full. So is each one it is given.
    num_experts = scores.shape[1]
    open_ = functional.pad(scores, (0, 1)).scatter_(1, experts.masked_fill(experts < 0, num_experts), 0.0)
    open_ = open_[:, :num_experts].nan_to_num_(0.0)  # a NaN score is no candidate
    for _ in range(rounds):
        first, column = keys.min(1, keepdim=True)  # [W, 1]: the best waiting assignment
        home = experts.gather(1, column)[:, 0].clamp_(min=0)
        value = open_ * constants.affinity.index_select(0, home)  # [W, E]
        for limit in limits:
            spare = limit.capacity[:, limit.of_expert]  # [S, E]
            value.mul_((spare if len(spare) == 1 else spare[source]) >= limit.cost)
        value, expert = value.max(1, keepdim=True)
        proposed = (value > 0) & (first < LAST)
        score = open_.gather(1, expert)
        key = admission_key(priority_of(score, weight, demand.rule.priority), position[:, None], ties)
        accepted, left = fill(limits, expert, proposed, source, key, ties)
        # An assignment without a candidate now never has one, for capacity only shrinks: the next one waits.
        keys = keys.scatter(1, column, first.masked_fill(accepted | ~proposed, LAST))
        placed = placed.scatter(1, column, torch.where(accepted, expert, placed.gather(1, column)))
        open_ = open_.scatter_(1, expert, score.masked_fill(accepted, 0.0))
        limits = [replace(limit, capacity=one) for limit, one in zip(limits, left, strict=True)]
    placed = placement.experts.index_copy(0, token, placed)
    return Placement(placed, *(limit.capacity for limit in limits), moved=True)
