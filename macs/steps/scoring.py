"""The router's scores, as every part of MACS means them."""

from __future__ import annotations

import torch
from torch import Tensor


def full_scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores of every expert, without correction bias.

    Args:
        logits: [T, E], any float dtype.
        score_function: "softmax" or "sigmoid".

    Returns:
        float32 [T, E] in 0..1.

    Raises:
        ValueError: another score function.
    """
    if score_function == "softmax":
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    if score_function == "sigmoid":
        return torch.sigmoid(logits.float())
    raise ValueError(f"score function: found {score_function!r}, expected softmax or sigmoid")


def within_groups(scores: Tensor, experts: Tensor, num_groups: int | None) -> Tensor:
    """Scores, 0 for experts outside the groups that a token's own experts are in.

    Group-limited routing divides the experts into equal groups to bound where a token travels; a score of 0
    keeps rerouting within that bound.

    Args:
        scores: [T, E].
        experts: the router's choice, int64 [T, k]; -1: none.
        num_groups: of experts; none: routing is not limited.

    Returns:
        [T, E], in the dtype of ``scores``.
    """
    if num_groups is None:
        return scores
    size = scores.shape[1] // num_groups
    group = torch.where(experts < 0, num_groups, experts // size)
    used = torch.zeros(len(scores), num_groups + 1, dtype=torch.bool, device=scores.device)
    used = used.scatter_(1, group, True)[:, :-1]
    return scores.masked_fill(~used.repeat_interleave(size, 1), 0.0)


def in_service(
    bias: Tensor, top_k: int, num_groups: int | None = None, groups_used: int | None = None
) -> Tensor:
    """Which experts a router with these correction biases can choose at all.

    For scores in 0..1, which the bias is added to before the top-k are taken: expert j can never be
    chosen if k others always come before it, b_j + 1 < b_i, as where a pruned or broken expert is taken
    out by a bias of -inf or -1e4. Under group-limited routing the others are those of its own group and of
    the ``groups_used - 1`` further groups that have the fewest of them.

    Args:
        bias: [E], any float dtype.
        top_k: k.
        num_groups: of experts; none: routing is not limited.
        groups_used: of them by a token.

    Returns:
        bool [E].
    """
    above = bias[None, :] > bias[:, None] + 1  # [E, E]: who always comes before whom
    if num_groups is None:
        return above.sum(1) < top_k
    experts = len(bias)
    by_group = above.view(experts, num_groups, -1).sum(2)  # [E, groups]
    own = torch.arange(experts, device=bias.device)[:, None] * num_groups // experts
    before = by_group.gather(1, own)[:, 0]
    others = by_group.scatter(1, own, experts).sort(1).values
    return before + others[:, : (groups_used or 1) - 1].sum(1) < top_k


def without_outcasts(
    scores: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int | None = None,
    groups_used: int | None = None,
) -> Tensor:
    """Scores, 0 for the experts that correction biases take out of service.

    Args:
        scores: [T, E].
        bias: [E]; none: there are none. The rest as of ``in_service``.

    Returns:
        [T, E], in the dtype of ``scores``.
    """
    if bias is None:
        return scores
    return scores * in_service(bias, top_k, num_groups, groups_used).to(scores.dtype)
