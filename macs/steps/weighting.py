"""Semantic weights: how much a token counts (the paper's entropy-weighted load).

Shapes: T tokens, V visual ones, D features, S sources, G = S K groups of K modalities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..tokens import MODALITIES, Tokens
from .contracts import UNIT, VALUE_UNIT, Counts, TokenWeights
from .kernels.dispatch import indices_of, kernels_enabled

FLAT_SPREAD = 1e-5
"""A standard deviation below this counts as 0 (of entropy, in nats)."""

EPSILON = 1e-6
"""Added to a standard deviation before dividing by it."""

DISTINCT_UNIT = 1 << 12
"""Distinctness is quantised to 1/4096."""

DIRECTION_UNIT = 1 << 16
"""Components of a mean direction are quantised to 1/65536."""

PART_ROWS, PART_SIZE = 4096, 1 << 18
"""Rows worked on at a time, and their features on a CPU, whose cache holds that many."""

Value = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""hidden [T, D], token int64 [V] (all visual tokens, perhaps others), visual bool [T], source int64 [T] in
0..S-1, directions float64 [S, D] zeros to add to (or empty) -> float32 [V], NaN where features are
not finite."""

Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Weighting:
    """A way to weigh visual tokens: w = 2 u sigmoid(sign delta v~).

    value: v, normalised to v~ over the visual tokens of a source and modality; none: every token weighs u.
    average: u, the weight of an average token; none: the setting ``visual_weight``. directions: ``value``
    sums unit feature vectors. kernel: ``kernels/weighting.py`` has it; if not, plain torch on a GPU too.
    """

    purpose: str
    value: Value | None = None
    sign: float = 1.0
    average: float | None = None
    directions: bool = False
    kernel: bool = False


WEIGHTINGS: dict[str, Weighting] = {}
"""By the name that the setting ``weighting`` takes."""


def weighting(name: str, **fields: Any) -> Callable[[Function], Function]:
    """Register a function as the ``value`` of a weighting."""

    def register(value: Function) -> Function:
        WEIGHTINGS[name] = Weighting(value=value, **fields)
        return value

    return register


@dataclass(frozen=True)
class WeightRule:
    """weighting: a name of ``WEIGHTINGS``; sharpness: delta; visual_weight: the setting; sources: S."""

    weighting: str
    sharpness: float
    visual_weight: float
    sources: int

    @property
    def curve(self) -> tuple[float, float]:
        """sign delta, and u."""
        chosen = WEIGHTINGS[self.weighting]
        average = self.visual_weight if chosen.average is None else chosen.average
        return chosen.sign * self.sharpness, average

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the ``Counts`` that ``semantic_weights`` of features of this size adds to."""
        chosen = WEIGHTINGS[self.weighting]
        shapes: dict[str, tuple[int, ...]] = {}
        if chosen.value is not None:
            shapes["moments"] = 3, self.sources * MODALITIES
        if chosen.directions:
            shapes["directions"] = self.sources, size
        return shapes


def semantic_weights(
    hidden: Tensor, tokens: Tokens, rule: WeightRule, counts: Counts, finite: bool
) -> TokenWeights:
    """The weight w of every token in fixed point: 1 for text, ``Weighting`` for visual tokens.

    entropy: w = sigmoid(-delta H~), H~ the normalised ``feature_entropy`` (the paper's equation 2).
    distinct: w = 2 u sigmoid(delta d~), d~ the normalised ``distinctness``. constant: w = u.

    Args:
        hidden: features that enter the layer, [T, D], any float dtype.
        tokens: modality and source of each.
        rule: the weighting and its parameters.
        counts: its ``moments`` and ``directions`` are added to.
        finite: whether to return which tokens have finite features.

    Returns:
        The weights. A visual token whose features are not finite gets the lowest, and is not in the moments.
    """
    value = WEIGHTINGS[rule.weighting]
    if value.kernel and kernels_enabled(hidden.device):
        from .kernels import weighting as kernels

        return kernels.semantic_weights(hidden, tokens, rule, counts, finite)
    known = finite_features(hidden) if finite else None
    if value.value is None:
        least = max(1, round(rule.visual_weight * UNIT))
        return TokenWeights(torch.where(tokens.visual, least, UNIT), known)
    hidden, visual = hidden.detach(), tokens.visual
    token = indices_of(visual)
    values = value.value(hidden, token, visual, tokens.source, counts.directions)
    group = tokens.modality.long() if rule.sources == 1 else tokens.source * MODALITIES + tokens.modality
    weight = relative_weights(values, visual[token], group[token], rule.curve, counts.moments)
    return TokenWeights(torch.full_like(tokens.position, UNIT).index_copy_(0, token, weight), known)


def finite_features(hidden: Tensor) -> Tensor:
    """Tokens of hidden [T, D] whose features are all finite, bool [T]."""
    return hidden.sum(-1, dtype=torch.float32).abs() < torch.inf


def _rows(hidden: Tensor) -> int:
    """Tokens worked on at a time."""
    rows = PART_SIZE // max(1, hidden.shape[1]) if hidden.device.type == "cpu" else PART_ROWS
    return max(1, min(PART_ROWS, rows))


WEIGHTINGS["constant"] = Weighting("all alike: visual_weight", kernel=True)


@weighting("entropy", purpose="low entropy of the features weighs more", sign=-1.0, average=0.5, kernel=True)
def feature_entropy(hidden: Tensor, token: Tensor, *rest: Tensor) -> Tensor:
    """H = -sum p ln p with p = softmax(z) of features z, in nats.

    hidden [T, D], any float dtype, token int64 [V] -> float32 [V]; NaN where the features are not finite.
    """
    entropy = []
    for part in token.split(_rows(hidden)):
        z = hidden[part].float()
        shifted = z.sub_(z.amax(-1, keepdim=True))
        p = shifted.softmax(-1)
        # With z shifted to a maximum of 0, H = ln sum(e^z) - sum(p z), and the largest p is 1 / sum(e^z):
        # one exponential, half the time of the log-softmax form. No matrix product, which autocast or a
        # lower matmul precision would round.
        entropy.append(-p.amax(-1).log() - p.mul_(shifted).sum(-1))
    return torch.cat(entropy)


@weighting("distinct", purpose="unlike the mean visual token weighs more", directions=True, kernel=True)
def distinctness(hidden: Tensor, token: Tensor, visual: Tensor, source: Tensor, directions: Tensor) -> Tensor:
    """How unlike the mean visual token of its source a token is: 1 - cos(z, mean of z / |z|), 0..2.

    hidden [T, D], any float dtype; token int64 [V]; visual bool [T]; source int64 [T] in 0..S-1; directions
    float64 [S, D] zeros, which the unit vectors of visual tokens are added to -> float32 [V], NaN where the
    features are not finite.

    The mean direction is summed in float64 and quantised, and so is the result: the order of the
    tokens does not matter.
    """
    sources, norms, near = len(directions), [], []
    whole = 2 * len(token) >= len(hidden)  # then reading all is faster than gathering some
    if not whole:
        hidden, visual, source = hidden[token], visual[token], source[token]
    rows = _rows(hidden)
    parts = list(zip(hidden.split(rows), visual.split(rows), source.split(rows), strict=True))
    for z, seen, group in parts:
        z = z.float()
        norm = torch.linalg.vector_norm(z, dim=-1)
        features = z.nan_to_num(0.0, 0.0, 0.0).double()
        inverse = norm.double().clamp(min=1e-12).reciprocal().where((norm < torch.inf) & seen, 0.0)
        if sources == 1:
            directions.add_(torch.mv(features.t(), inverse))
        else:
            directions.index_add_(0, group, features * inverse[:, None])
        norms.append(norm)
    unit = functional.normalize(directions, dim=-1, eps=1e-12)
    mean = ((unit * DIRECTION_UNIT).round() / DIRECTION_UNIT).float()
    for z, _, group in parts:
        # Elementwise and summed, not a matrix product, which autocast or TF32 would round.
        near.append((z.float() * (mean if sources == 1 else mean[group])).sum(-1))
    norm = torch.cat(norms)
    distinct = 1 - torch.cat(near) / norm.clamp(min=1e-12)
    distinct = distinct.mul_(DISTINCT_UNIT).round_().div_(DISTINCT_UNIT)
    distinct = distinct.where(norm < torch.inf, torch.nan)
    return distinct[token] if whole else distinct


def relative_weights(
    value: Tensor, visual: Tensor, group: Tensor, curve: tuple[float, float], moments: Tensor
) -> Tensor:
    """w = 2 u sigmoid(delta v~) for visual tokens, 1 for the others, in fixed point.

    v~ = (v - mu) / (sigma + EPSILON), with mu and population sigma of each group; 0 in a group whose sigma is
    below ``FLAT_SPREAD``. value float32 [V], visual bool [V], group int64 [V] in 0..G-1; curve: delta and u;
    moments float64 [3, G] zeros, which they are added to -> int64 [V] in 1..UNIT. A visual token whose value
    is NaN gets the lowest weight and is not included.
    """
    (sharpness, average), finite = curve, value == value
    included = visual & finite
    # Values are quantised, so that their float64 sums are of whole numbers and exact in any order.
    value = (value.double() * VALUE_UNIT).round_().where(included, 0.0)
    number, total, square = moments.index_add_(1, group, torch.stack([included, value, value * value]))
    number = number.clamp(min=1)
    mean = total / number
    sigma = (square / number - mean * mean).clamp_(min=0).sqrt_() / VALUE_UNIT
    scale = (sigma + EPSILON).reciprocal_().masked_fill_(sigma < FLAT_SPREAD, 0.0) / VALUE_UNIT
    normalized = ((value - mean[group]) * scale[group]).float()
    weight = torch.sigmoid(sharpness * normalized).mul_(2 * average * UNIT)
    weight = weight.double().round_().long().clamp_(1, UNIT)
    return weight.where(finite, 1).where(visual, UNIT)
