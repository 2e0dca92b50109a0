"""Scores of all experts, as every engine's adapter hands them to the planner.

Shapes: T tokens, E experts, k experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def candidate_scores(
    logits: Tensor,
    experts: Tensor,
    score_function: str,
    bias: Tensor | None = None,
    num_groups: int | None = None,
    groups_used: int | None = None,
) -> Tensor:
    """Scores of the experts that the router could have chosen for a token, 0 for the others.

    The one score pipeline of all adapters: scores without correction bias, less the experts that the bias
    disables (``enabled_experts``), less those outside the groups that the token's own experts are in.
    Group-limited routing divides the experts into equal groups to bound where a token travels.

    Args:
        logits: the router's, [T, E], any float dtype.
        experts: the router's choice, int64 [T, k]; -1: none.
        score_function: "softmax" or "sigmoid".
        bias: correction bias [E]; none: there is none.
        num_groups: groups of experts; none: routing is not limited.
        groups_used: groups that a token may use.

    Returns:
        float32 [T, E] in 0..1.

    Raises:
        ValueError: another score function.
    """
    if score_function == "softmax":
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    elif score_function == "sigmoid":
        scores = torch.sigmoid(logits.float())
    else:
        raise ValueError(f"score function: found {score_function!r}, expected softmax or sigmoid")
    if bias is not None:
        enabled = enabled_experts(bias, experts.shape[1], num_groups, groups_used)
        scores = scores * enabled.to(scores.dtype)
    if num_groups is None:
        return scores
    size = scores.shape[1] // num_groups
    group = torch.where(experts < 0, num_groups, experts // size)
    used = torch.zeros(len(scores), num_groups + 1, dtype=torch.bool, device=scores.device)
    used = used.scatter_(1, group, True)[:, :-1]
    return scores.masked_fill(~used.repeat_interleave(size, 1), 0.0)


def enabled_experts(
    bias: Tensor, top_k: int, num_groups: int | None = None, groups_used: int | None = None
) -> Tensor:
    """Which experts a router with these correction biases can choose at all.

    The bias is added to scores in 0..1 before the top-k. So expert j is never chosen if k others always come
    before it, b_j + 1 < b_i, as where a pruned or broken expert is disabled by a bias of -inf or -1e4. Under
    group-limited routing the others are those of its own group and of the ``groups_used - 1`` other groups
    with the fewest of them.

    Args:
        bias: [E], any float dtype.
        top_k: k.
        num_groups: groups of experts; none: routing is not limited.
        groups_used: groups that a token may use.

    Returns:
        bool [E].
    """
    above = bias[None, :] > bias[:, None] + 1  # [E, E]
    if num_groups is None:
        return above.sum(1) < top_k
    experts = len(bias)
    by_group = above.view(experts, num_groups, -1).sum(2)  # [E, groups]
    group = torch.arange(experts, device=bias.device)[:, None] * num_groups // experts
    before = by_group.gather(1, group)[:, 0]
    others = by_group.scatter(1, group, experts).sort(1).values
    return before + others[:, : (groups_used or 1) - 1].sum(1) < top_k
