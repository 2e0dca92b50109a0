"""Semantic weights: how much a token counts (the paper's entropy-weighted load).

Shapes: T tokens, V visual ones that are looked at, D features, S sources, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..tokens import KINDS, Tokens
from .contracts import Sums, Weighed
from .fixed_point import ENTROPY_UNIT, UNIT, to_fixed
from .kernels.dispatch import fused, indices_of, may_be_any

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

PART = 1 << 18
"""Features that are worked on at a time on a CPU: what its cache has room for while all of it is done."""


Value = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""hidden [T, D], token int64 [V] (those asked for), visual bool [T], source int64 [T] in 0..S-1, directions
int64 [S, D] zeros to add to (or empty) -> float32 [V], NaN where features are not finite. Values of some tens
at most: their squares are summed in fixed point (``ENTROPY_UNIT``); take the logarithm of a norm."""


Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Rule:
    """A way to weigh visual tokens.

    value: what tells them apart, normalised to v~ within a group; none: all weigh ``visual_weight``. The
    weight is 2 u sigmoid(sign delta v~); u: the weight of a token in the middle, none: ``visual_weight``.
    directions: whether ``value`` needs the sums of directions. kernel: whether ``kernels/weighting.py``
    computes it; one without is computed by plain torch on a GPU too.
    """

    purpose: str
    value: Value | None = None
    sign: float = 1.0
    usual: float | None = None
    directions: bool = False
    kernel: bool = False


WEIGHTINGS: dict[str, Rule] = {}
"""The rules, by the name that the setting ``weighting`` takes."""


def weighting(name: str, **told: Any) -> Callable[[Function], Function]:
    """Register a function as the ``value`` of a rule."""

    def register(value: Function) -> Function:
        WEIGHTINGS[name] = Rule(value=value, **told)
        return value

    return register


@dataclass(frozen=True)
class Weighting:
    """What makes a token's weight: rule: a name of ``WEIGHTINGS``; sharpness: delta; usual: the setting
    ``visual_weight``; by_image: normalised among the tokens of a picture, not of a source's batch; sources:
    S."""

    rule: str
    sharpness: float
    usual: float
    by_image: bool
    sources: int

    @property
    def curve(self) -> tuple[float, float]:
        """Steepness and sign of the weight in v~, and what a token in the middle weighs."""
        rule = WEIGHTINGS[self.rule]
        return rule.sign * self.sharpness, self.usual if rule.usual is None else rule.usual

    def groups(self, tokens: int) -> int:
        """G: in how many groups so many tokens may be normalised."""
        return self.sources * (max(1, tokens) if self.by_image else KINDS)


@fused
def semantic_weights(hidden: Tensor, tokens: Tokens, rule: Weighting, sums: Sums, finite: bool) -> Weighed:
    """w of every token, in fixed point: of text 1; of a visual one what ``WEIGHTINGS`` says of the rule.

    distinct: 2 u sigmoid(delta d~), d~ the normalised ``distinctness``; entropy: sigmoid(-delta H~), H~ the
    normalised ``feature_entropy`` (the paper's equation 2); constant: u.

    Args:
        hidden: [T, D], any float dtype.
        tokens: modality, source and picture of each.
        rule: the rule and its numbers.
        sums: its ``moments`` and ``directions`` are added to.
        finite: whether to say which tokens' features are.

    Returns:
        Weights; a visual token whose features are not finite gets the lowest and is not included in the
        moments.
    """
    visual, measure = tokens.visual, WEIGHTINGS[rule.rule].value
    known = finite_features(hidden) if finite else None
    if measure is None:
        return Weighed(torch.where(visual, max(1, round(rule.usual * UNIT)), UNIT), known)
    token = indices_of(visual)
    value = measure(hidden, token, visual, tokens.source, sums.directions)
    group = _groups_of(tokens, rule)[token]
    weight = relative_weights(value, visual[token], group, rule.curve, sums.moments)
    return Weighed(torch.full_like(tokens.position, UNIT).index_copy_(0, token, weight), known)


def _groups_of(tokens: Tokens, rule: Weighting) -> Tensor:
    """Of which group every token is, int64 [T] in 0..G-1."""
    inner = tokens.kinds.long()
    if rule.by_image:
        assert tokens.segment is not None
        inner = tokens.segment
    if rule.sources == 1:
        return inner
    return tokens.source * (rule.groups(len(inner)) // rule.sources) + inner


def finite_features(hidden: Tensor) -> Tensor:
    """Which tokens' features are all finite, [T, D] -> bool [T]: their sum is, then."""
    return torch.isfinite(hidden.sum(-1, dtype=torch.float32))


def _parts(hidden: Tensor, token: Tensor, most: int) -> Iterator[tuple[slice, Tensor]]:
    """The features float32 [M, D] of some tokens at a time, and which of ``token`` int64 [V] these are; the
    memory is the next part's too."""
    hidden, size = hidden.detach(), max(1, hidden.shape[1])
    rows = max(1, min(most, len(token), PART // size if hidden.device.type == "cpu" else most))
    memory = torch.empty(rows, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    for start in range(0, len(token), rows):
        part = slice(start, start + rows)
        some = memory[: len(token[part])]
        if hidden.dtype == torch.float32:
            torch.index_select(hidden, 0, token[part], out=some)
        else:
            some.copy_(hidden[token[part]])
        yield part, some


WEIGHTINGS["constant"] = Rule("all alike: visual_weight", kernel=True)


@weighting("entropy", purpose="low entropy of the features weighs more", sign=-1.0, usual=0.5, kernel=True)
def feature_entropy(hidden: Tensor, token: Tensor, *_: Tensor) -> Tensor:
    """H = -sum p ln p with p = softmax(z) of features z, in nats, of some tokens.

    hidden [T, D], any float dtype, token int64 [V] -> float32 [V]; NaN where the features are not finite.
    """
    entropy = torch.empty(len(token), dtype=torch.float32, device=hidden.device)
    for part, some in _parts(hidden, token, EXACT_ROWS):
        shifted = some.sub_(some.amax(-1, keepdim=True))
        p = shifted.softmax(-1)
        # With z shifted to a maximum of 0, H = ln sum(e^z) - sum(p z) and the largest p is 1 / sum(e^z):
        # one exponential, half the time of the log-softmax form. No matrix product, which autocast or a
        # lower matmul precision would round.
        entropy[part] = -p.amax(-1).log() - p.mul_(shifted).sum(-1)
    return entropy


@weighting("distinct", purpose="unlike the mean visual token weighs more", directions=True, kernel=True)
def distinctness(hidden: Tensor, token: Tensor, visual: Tensor, source: Tensor, total: Tensor) -> Tensor:
    """How unlike the mean visual token of its source a token is: 1 - cos(z, mean of z / |z|), 0..2.

    hidden [T, D], any float dtype; token int64 [V], the tokens asked for, all visual ones among them; visual
    bool [T], source int64 [T] in 0..S-1; total int64 [S, D] zeros, which the sums of directions are added to
    -> float32 [V], NaN where the features are not finite.

    Directions z / |z| are whole numbers of 1 / ``STEPS``. Their sums, and products with the mean direction
    in the same units, are whole numbers that float32 holds: they are exact in whatever order a matrix
    product adds, so that permuted tokens have the same weights.
    """
    sources, count, device = len(total), len(token), hidden.device
    own = source[token]
    belongs = (own == torch.arange(sources, device=device)[:, None]) & visual[token]
    exact = torch.float64 if device.type == "cuda" else torch.float32  # whatever is allowed of TF32
    belongs = belongs.to(exact)  # [S, V]
    scale = torch.empty(count, 1, dtype=torch.float32, device=device)
    near = torch.empty(count, sources, dtype=exact, device=device)

    def in_whole_steps(some: Tensor, scale: Tensor) -> Tensor:
        some.mul_(scale).round_()
        return (some.nan_to_num_(0.0, 0.0, 0.0) if may_be_any(scale == 0) else some).to(exact)

    # Not in autocast's precision.
    kind = device.type
    precise = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with precise:
        for part, some in _parts(hidden, token, EXACT_ROWS):
            norm = torch.linalg.vector_norm(some, dim=-1, keepdim=True)
            scale[part] = torch.where(torch.isfinite(norm), STEPS / norm.clamp_(min=1e-12), 0.0)
            held = part, in_whole_steps(some, scale[part])
            total += (belongs[:, part] @ held[1]).long()
        mean = in_steps(total.double()).to(exact).T
        # Directions of all tokens would take as much memory as their features: those of the last part are
        # there still, the others are made once more.
        if count:
            torch.mm(held[1], mean, out=near[held[0]])
            for part, some in _parts(hidden, token[: held[0].start], EXACT_ROWS):
                torch.mm(in_whole_steps(some, scale[part]), mean, out=near[part])
    close = (near[:, 0] if sources == 1 else near.gather(1, own[:, None])[:, 0]).float()
    distinct = ((1 - close / STEPS**2) * DISTINCT_UNIT).round() / DISTINCT_UNIT
    return torch.where(scale[:, 0] > 0, distinct, torch.nan)


def in_steps(total: Tensor) -> Tensor:
    """The direction of a sum of directions, float64 [S, D] -> float32 [S, D], whole numbers of 1 /
    ``STEPS``."""
    return (functional.normalize(total, dim=-1, eps=1e-12) * STEPS).round().float()


def normalize(value: Tensor, included: Tensor, group: Tensor, moments: Tensor) -> Tensor:
    """v~ = (v - mu) / (sigma + EPSILON), with mu and population sigma of each group.

    value float32 [V], included bool [V] (in the moments), group int64 [V] in 0..G-1, moments int64 [3, G]
    zeros, which they are added to -> float32 [V]; 0 in a group whose sigma is under ``FLAT_SPREAD``.

    Moments are integer sums, so they do not depend on the order of the tokens.
    """
    fixed = to_fixed(value, ENTROPY_UNIT) * included
    moments.index_add_(1, group, torch.stack([included.long(), fixed, fixed * fixed]))
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


def relative_weights(
    value: Tensor, visual: Tensor, group: Tensor, curve: tuple[float, float], moments: Tensor
) -> Tensor:
    """w = 2 u sigmoid(delta v~) for visual tokens, 1 for the others, in fixed point.

    value float32 [V], normalised to v~ within its group, visual bool [V], group int64 [V]; curve: delta, and
    u, what a token in the middle weighs; moments: as of ``normalize`` -> int64 [V] in 1..UNIT. A visual
    token whose value is NaN gets the lowest weight and is not included in the moments.
    """
    sharpness, usual = curve
    finite = value == value
    normalized = normalize(value, visual & finite, group, moments)
    share = 2 * usual * torch.sigmoid(sharpness * normalized)
    weight = to_fixed(share, UNIT).clamp(1, UNIT)
    return weight.masked_fill(~finite, 1).masked_fill(~visual, UNIT)
