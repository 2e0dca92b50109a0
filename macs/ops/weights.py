"""Kernels for semantic weights: twin in ``macs.weighting``.

Moments are sums of integers, exact in any order; a weight is the twin's or, where the two sigmoids round
apart, one of 65536 beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fixed_point import ENTROPY_UNIT, UNIT
from ..weighting import EPSILON, FLAT_SPREAD
from .shared import finite, power_of_2, rint

TOKENS = 256
"""Tokens of one program."""
FEW = 64
"""So many groups are summed within a program, before memory sees them; with more, hardly two tokens of a
program share one."""


def relative_weights(
    value: Tensor, visual: Tensor, group: Tensor, groups: int, sharpness: float, usual: float
) -> Tensor:
    """Two launches, and the memory that the first adds to: moments, weights."""
    count = len(value)
    weight = torch.empty(count, dtype=torch.int64, device=value.device)
    if not count:
        return weight
    tensors = value.contiguous(), visual.contiguous(), group.contiguous()
    moments = torch.zeros(3, groups, dtype=torch.int64, device=value.device)  # count, sum, sum of squares
    grid = (triton.cdiv(count, TOKENS),)
    form = {"SCALE": ENTROPY_UNIT, "TOKENS": TOKENS, "GROUPS": power_of_2(groups) if groups <= FEW else 0}
    _moments[grid](*tensors, moments, count, groups, **form)
    _weights[grid](
        *tensors, moments, weight, count, groups, float(sharpness), float(usual),
        SCALE=ENTROPY_UNIT, UNIT=UNIT, FLAT=FLAT_SPREAD, EPSILON=EPSILON, TOKENS=TOKENS,
    )  # fmt: skip
    return weight


@triton.jit
def _read(value, visual, group, count, SCALE: tl.constexpr, TOKENS: tl.constexpr):
    """A program's tokens: index, value in fixed point (0 where it has no say), say, group."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < count
    raw = tl.load(value + token, mask=here, other=float("nan")).to(tl.float64)
    says = here & finite(raw) & tl.load(visual + token, mask=here, other=0).to(tl.int1)
    fixed = rint(tl.where(says, raw, 0.0) * SCALE).to(tl.int64)
    return token, fixed, says, tl.load(group + token, mask=here, other=0)


@triton.jit
def _add(totals, group, groups, says, amount, GROUPS: tl.constexpr):
    """Add every token's amount to its group's total."""
    if GROUPS > 0:
        column = tl.arange(0, GROUPS)
        hit = says[:, None] & (group[:, None] == column[None, :])
        tl.atomic_add(
            totals + column, tl.sum(tl.where(hit, amount[:, None], 0), 0), mask=column < groups, sem="relaxed"
        )
    else:
        tl.atomic_add(totals + group, amount, mask=says, sem="relaxed")


@triton.jit(do_not_specialize=["count", "groups"])
def _moments(
    value, visual, group, moments, count, groups,
    SCALE: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    _, fixed, says, of = _read(value, visual, group, count, SCALE, TOKENS)
    _add(moments, of, groups, says, says.to(tl.int64), GROUPS)
    _add(moments + groups, of, groups, says, fixed, GROUPS)
    _add(moments + 2 * groups, of, groups, says, fixed * fixed, GROUPS)


@triton.jit(do_not_specialize=["count", "groups"])
def _weights(
    value, visual, group, moments, weight, count, groups, sharpness, usual,
    SCALE: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr, EPSILON: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token, fixed, says, of = _read(value, visual, group, count, SCALE, TOKENS)
    number = tl.load(moments + of, mask=says, other=0)
    total = tl.load(moments + groups + of, mask=says, other=0)
    square = tl.load(moments + 2 * groups + of, mask=says, other=0)
    members = tl.maximum(number, 1).to(tl.float64)
    mean = total.to(tl.float64) / members
    # Deviations from the rounded mean are whole numbers, and so is the sum of their squares.
    center = rint(mean)
    whole = center.to(tl.int64)
    off = mean - center
    square = (square - whole * (2 * total - whole * number)).to(tl.float64) / members
    sigma = tl.sqrt(tl.maximum(square - off * off, 0.0)) / SCALE
    scale = tl.where(sigma < FLAT, 0.0, 1 / (sigma + EPSILON))
    normalized = ((fixed.to(tl.float64) - mean) / SCALE * scale).to(tl.float32)
    share = 2 * usual / (1 + tl.exp(-sharpness * normalized))
    told = rint(share.to(tl.float64) * UNIT).to(tl.int64)
    told = tl.minimum(tl.maximum(told, 1), UNIT)
    here = token < count
    seen = tl.load(visual + token, mask=here, other=0).to(tl.int1)
    tl.store(weight + token, tl.where(seen, tl.where(says, told, 1), UNIT), mask=here)
