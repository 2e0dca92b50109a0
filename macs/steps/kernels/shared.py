"""What several kernels need."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rint(value):
    """The nearest whole number of a float64, halves to the even one, as ``torch.round``."""
    low = tl.floor(value)
    rest = value - low
    odd = low - 2 * tl.floor(low / 2) != 0
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1, low)


@triton.jit
def finite(value):
    """False for inf and NaN."""
    return tl.abs(value) < float("inf")


@triton.jit
def visual_of(modality, valid, token, here, TEXT: tl.constexpr):
    """Which tokens are valid, and which of these are visual."""
    counts = here & tl.load(valid + token, mask=here, other=0).to(tl.int1)
    return counts, counts & (tl.load(modality + token, mask=here, other=TEXT) != TEXT)


@triton.jit
def assignments(count, slots, TOKENS: tl.constexpr, K: tl.constexpr):
    """A program's tokens [TOKENS], where their assignments lie [TOKENS, K], and which of these there are."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    slot = tl.arange(0, K)
    here = (token < count)[:, None] & (slot < slots)[None, :]
    return token, token[:, None] * slots + slot[None, :], here


@triton.jit
def priority_of(score, weight, RULE: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr):
    """Priority by rule of a score and a weight in fixed point."""
    value = score.to(tl.float64)
    if RULE == 1:
        value = weight.to(tl.float64) / UNIT * value
    value = tl.where(value == value, value, 0.0)
    value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    return rint(value * SCALE).to(tl.int64)


RULES = {"score": 0, "product": 1}


def power_of_2(count: int) -> int:
    """The least power of two that is not below ``count``: the sides of tiles."""
    return triton.next_power_of_2(max(1, count))
