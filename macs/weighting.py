"""Semantic weights: how much a token counts (the paper's entropy-weighted load).

Shapes: T tokens, D features.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from .fixed_point import ENTROPY_UNIT, UNIT, to_fixed
from .ops import fused

FLAT_SPREAD = 1e-5
"""A standard deviation of entropy below this (nats) is no spread at all."""

EPSILON = 1e-6
"""Added to a standard deviation before something is divided by it."""


DISTINCT_UNIT = 1 << 12
"""Distinctness is told in 1/4096."""


@fused("features")
def feature_entropy(hidden: Tensor) -> Tensor:
    """H = -sum p ln p with p = softmax(z) of each token's features z, in nats.

    hidden [T, D], any float dtype -> float32 [T]; NaN where the features are not finite.
    """
    shifted = hidden.float() - hidden.amax(-1, keepdim=True).float()
    p = shifted.softmax(-1)
    # With z shifted to a maximum of 0, H = ln sum(e^z) - sum(p z) and the largest p is 1 / sum(e^z):
    # one exponential, half the time of the log-softmax form. No matrix product, which autocast or a
    # lower matmul precision would round.
    partition = -p.amax(-1).log()
    return partition - p.mul_(shifted).sum(-1)


def normalize_entropy(entropy: Tensor, included: Tensor, group: Tensor, groups: int) -> Tensor:
    """H~ = (H - mu) / (sigma + EPSILON), with mu and population sigma of each group.

    entropy float32 [T], included bool [T] (tokens that have a say), group int64 [T] in
    0..groups-1 -> float32 [T]; 0 in a group whose sigma is under ``FLAT_SPREAD``.

    Moments are integer sums, so they do not depend on the order of the tokens.
    """
    fixed = torch.where(included, to_fixed(entropy, ENTROPY_UNIT), 0)
    zeros = torch.zeros(groups, dtype=torch.int64, device=entropy.device)
    count = zeros.scatter_add(0, group, included.long()).clamp(min=1)
    mean = zeros.scatter_add(0, group, fixed).double() / count
    # Deviations from the *rounded* mean are integers; the remainder is put right afterwards.
    center = mean.round()
    deviation = torch.where(included, fixed - center.long()[group], 0)
    square = zeros.scatter_add(0, group, deviation * deviation).double() / count
    sigma = (square - (mean - center) ** 2).clamp(min=0).sqrt() / ENTROPY_UNIT
    scale = torch.where(sigma < FLAT_SPREAD, 0.0, 1 / (sigma + EPSILON))
    return ((fixed.double() - mean[group]) / ENTROPY_UNIT * scale[group]).float()


def entropy_weights(entropy: Tensor, visual: Tensor, group: Tensor, groups: int, sharpness: float) -> Tensor:
    """w = sigmoid(-delta H~) for visual tokens, 1 for the others, in fixed point.

    entropy float32 [T], visual bool [T], group int64 [T] -> int64 [T] in 1..UNIT. A visual token
    whose features are not finite gets the lowest weight and has no say in the moments.
    """
    return relative_weights(entropy, visual, group, groups, -sharpness, 0.5)


@fused("weights")
def relative_weights(
    value: Tensor, visual: Tensor, group: Tensor, groups: int, sharpness: float, usual: float
) -> Tensor:
    """w = 2 u sigmoid(delta v~) for visual tokens, 1 for the others, in fixed point.

    value float32 [T], normalised to v~ within its group as entropy is, visual bool [T], group int64 [T];
    usual: what a token in the middle weighs -> int64 [T] in 1..UNIT. A visual token whose value is not
    finite gets the lowest weight and has no say in the moments.
    """
    finite = torch.isfinite(value)
    normalized = normalize_entropy(value, visual & finite, group, groups)
    share = 2 * usual * torch.sigmoid(sharpness * normalized)
    weight = to_fixed(share, UNIT).clamp(1, UNIT)
    return torch.where(visual, torch.where(finite, weight, 1), UNIT)


@fused("features")
def distinctness(hidden: Tensor, visual: Tensor, source: Tensor, sources: int) -> Tensor:
    """How unlike the mean visual token of its source a token is: 1 - cos(z, mean of z / |z|), 0..2.

    hidden [T, D], any float dtype, visual bool [T] (whose mean it is), source int64 [T] in 0..S-1
    -> float32 [T]; NaN where the features are not finite.
    """
    features = hidden.float()
    norm = torch.linalg.vector_norm(features, dim=-1)
    inverse = torch.where(torch.isfinite(norm), 1 / norm.clamp(min=1e-12), torch.nan)
    share = torch.where(visual & torch.isfinite(norm), inverse, 0.0)
    belongs = source == torch.arange(sources, device=source.device)[:, None]
    finite = torch.nan_to_num(features, 0.0, 0.0, 0.0)  # 0 times NaN would be NaN
    # Matrix products leave no further copy of the features behind; not in autocast's precision.
    kind = hidden.device.type
    precise = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with precise:
        mean = functional.normalize((share * belongs) @ finite, dim=-1, eps=1e-12)
        near = finite @ mean.T
    distinct = 1 - near.gather(1, source[:, None])[:, 0] * inverse
    # Coarser than what the order of a sum can do to it: permuted tokens have the same weights.
    return (distinct * DISTINCT_UNIT).round() / DISTINCT_UNIT


def constant_weights(visual: Tensor, visual_weight: float) -> Tensor:
    """The same weight for every visual token: visual bool [T] -> int64 [T], fixed point."""
    return torch.where(visual, max(1, round(visual_weight * UNIT)), UNIT)
