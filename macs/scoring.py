"""The router's scores, as every part of MACS means them."""

from __future__ import annotations

import torch
from torch import Tensor


def full_scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores of every expert, without correction bias: logits [T, E] -> float32 [T, E] in 0..1.

    score_function is "softmax" or "sigmoid".
    """
    if score_function == "softmax":
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    if score_function == "sigmoid":
        return torch.sigmoid(logits.float())
    raise ValueError(f"score function: found {score_function!r}, expected softmax or sigmoid")


def within_groups(scores: Tensor, experts: Tensor, num_groups: int | None) -> Tensor:
    """Scores [T, E], 0 for experts outside the groups that a token's own experts [T, k] are in.

    Group-limited routing divides the experts into so many equal groups (none: it does not) to bound
    where a token travels; a score of 0 keeps rerouting within that bound. experts int64, -1: none.
    """
    if num_groups is None:
        return scores
    size = scores.shape[1] // num_groups
    group = torch.where(experts < 0, num_groups, experts // size)
    used = torch.zeros(len(scores), num_groups + 1, dtype=torch.bool, device=scores.device)
    used = used.scatter_(1, group, True)[:, :-1]
    return scores.masked_fill(~used.repeat_interleave(size, 1), 0.0)
