"""Semantic weights: how much a token counts (the paper's entropy-weighted load).

Shapes: T tokens, D features.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from .fixed_point import ENTROPY_UNIT, UNIT, to_fixed
from .modality import Tokens
from .ops import fused, numbers_of

FLAT_SPREAD = 1e-5
"""A standard deviation of entropy below this (nats) is no spread at all."""

EPSILON = 1e-6
"""Added to a standard deviation before something is divided by it."""


DISTINCT_UNIT = 1 << 12
"""Distinctness is quantized to 1/4096."""

STEPS = 4000
"""Directions are counted in 1/4000: the product of two of them, at most (4000 + sqrt(D) / 2)^2, stays below
2^24, up to which float32 holds whole numbers, for all D up to 36 000."""

EXACT_ROWS = 4096
"""So many directions add up to less than 2^24 in each component."""

PART = 1 << 20
"""Features that are worked on at a time."""


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
    fixed = to_fixed(entropy, ENTROPY_UNIT) * included
    moments = torch.zeros(3, groups, dtype=torch.int64, device=entropy.device)
    moments = moments.index_add_(1, group, torch.stack([included.long(), fixed, fixed * fixed]))
    number, total, square = moments.unbind()
    count = number.clamp(min=1)
    mean = total.double() / count
    # Deviations from the *rounded* mean are whole numbers, and the sum of their squares follows from the
    # moments exactly; the remainder is put right afterwards.
    center = mean.round()
    whole = center.long()
    square = (square - whole * (2 * total - whole * number)).double() / count
    sigma = (square - (mean - center) ** 2).clamp(min=0).sqrt() / ENTROPY_UNIT
    scale = (1 / (sigma + EPSILON)).masked_fill(sigma < FLAT_SPREAD, 0.0)
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
    usual: what a token in the middle weighs -> int64 [T] in 1..UNIT. A visual token whose value is NaN
    gets the lowest weight and has no say in the moments.
    """
    finite = value == value
    normalized = normalize_entropy(value, visual & finite, group, groups)
    share = 2 * usual * torch.sigmoid(sharpness * normalized)
    weight = to_fixed(share, UNIT).clamp(1, UNIT)
    return weight.masked_fill(~finite, 1).masked_fill(~visual, UNIT)


def distinct_weights(
    hidden: Tensor,
    tokens: Tokens,
    sources: int,
    group: tuple[Tensor, int],
    sharpness: float,
    usual: float,
) -> tuple[Tensor, Tensor]:
    """``relative_weights`` by ``distinctness``, int64 [T], and which tokens' features are finite, bool [T].

    hidden [T, D]; group: of each token, int64 [T], and how many there are.
    """
    distinct = distinctness(hidden, tokens.visual, tokens.source, sources)
    weight = relative_weights(distinct, tokens.visual, *group, sharpness, usual)
    return weight, distinct == distinct


@fused("features")
def distinctness(hidden: Tensor, visual: Tensor, source: Tensor, sources: int) -> Tensor:
    """How unlike the mean visual token of its source a token is: 1 - cos(z, mean of z / |z|), 0..2.

    hidden [T, D], any float dtype, visual bool [T], source int64 [T] in 0..S-1 -> float32 [T]; 0 for tokens
    that are not visual, NaN where the features are not finite.

    Directions z / |z| are whole numbers of 1 / ``STEPS``. Their sums, and products with the mean direction
    in the same units, are whole numbers that float32 holds: they are exact in whatever order a matrix
    product adds, so that permuted tokens have the same weights.
    """
    count, size = hidden.shape
    rows = max(1, min(EXACT_ROWS, PART // max(1, size)))
    parts = [torch.linalg.vector_norm(part.float(), dim=-1) for part in hidden.split(rows)]
    norm = torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
    finite = torch.isfinite(norm)
    token = numbers_of(visual & finite)  # [V]
    scale = torch.where(finite, STEPS / norm.clamp(min=1e-12), 0.0)[token, None]
    own = source[token]
    belongs = own == torch.arange(sources, device=own.device)[:, None]  # [S, V]
    everyone = len(token) == count  # as on a GPU: those who are not visual, or not finite, are among them
    if everyone:
        belongs = belongs & visual & finite
    belongs = belongs.float()
    steps = torch.empty(len(token), size, dtype=torch.float32, device=hidden.device)
    total = torch.zeros(sources, size, dtype=torch.float64, device=hidden.device)
    # Not in autocast's precision.
    kind = hidden.device.type
    precise = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with precise:
        # So many rows at a time as a CPU's cache has room for while all of this is done to them.
        for start in range(0, len(token), rows):
            part = slice(start, start + rows)
            some = steps[part].copy_(hidden[token[part]])
            some.mul_(scale[part]).round_()
            if everyone:
                some.nan_to_num_(0.0, 0.0, 0.0)
            total += belongs[:, part] @ some
        near = steps @ in_steps(total).T  # [V, S]
    near = near[:, 0] if sources == 1 else near.gather(1, own[:, None])[:, 0]
    distinct = ((1 - near / STEPS**2) * DISTINCT_UNIT).round() / DISTINCT_UNIT
    told = torch.zeros_like(norm).index_put((token,), distinct)
    return torch.where(finite, torch.where(visual, told, 0.0), torch.nan)


def in_steps(total: Tensor) -> Tensor:
    """The direction of a sum of directions, float64 [S, D] -> float32 [S, D], whole numbers of 1 /
    ``STEPS``."""
    return (functional.normalize(total, dim=-1, eps=1e-12) * STEPS).round().float()


def constant_weights(visual: Tensor, visual_weight: float) -> Tensor:
    """The same weight for every visual token: visual bool [T] -> int64 [T], fixed point."""
    return torch.where(visual, max(1, round(visual_weight * UNIT)), UNIT)
