"""The router's scores, as every part of MACS means them."""

from __future__ import annotations

import torch
from torch import Tensor


def full_scores(logits: Tensor, score_function: str, eligible: Tensor | None = None) -> Tensor:
    """Scores of every expert, without correction bias: logits [T, E] -> float32 [T, E] in 0..1.

    score_function is "softmax" or "sigmoid". Experts a token may not be sent to (``eligible`` bool
    [T, E] False, as under group-limited routing) score 0, so that nothing is rerouted there.
    """
    if score_function == "softmax":
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    elif score_function == "sigmoid":
        scores = torch.sigmoid(logits.float())
    else:
        raise ValueError(f"score function: found {score_function!r}, expected softmax or sigmoid")
    return scores if eligible is None else scores.masked_fill(~eligible, 0.0)
