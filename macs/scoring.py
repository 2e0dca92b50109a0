"""The router's scores, as every part of MACS means them."""

from __future__ import annotations

import torch
from torch import Tensor


def full_scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores of every expert, without correction bias: logits [T, E] -> float32 [T, E] in 0..1.

    score_function is "softmax" or "sigmoid". An adapter sets the scores of experts a token may not be
    sent to (as under group-limited routing) to 0, so that nothing is rerouted there.
    """
    if score_function == "softmax":
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    if score_function == "sigmoid":
        return torch.sigmoid(logits.float())
    raise ValueError(f"score function: found {score_function!r}, expected softmax or sigmoid")
