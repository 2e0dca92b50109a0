"""Kernels over the features hidden [T, D]: twins in ``macs.weighting``.

Sums of floats are taken in another order than torch takes them, so entropy is the twin's to about 1e-6 of
its size, and distinctness, whose sums are exact but for that of a token's own norm, the twin's or a
neighbour.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weighting import DISTINCT_UNIT, STEPS
from .shared import finite, power_of_2, rint

LOWEST = tl.constexpr(-3.4028234e38)
PARTIAL_ROWS = 32
"""Tokens whose features one program sums."""


def feature_entropy(hidden: Tensor) -> Tensor:
    """One read of the features: the sum of e^z and that of z e^z are carried along as the maximum rises."""
    hidden = _by_rows(hidden)
    count, size = hidden.shape
    entropy = torch.empty(count, dtype=torch.float32, device=hidden.device)
    if count:
        block = min(1024, power_of_2(size))
        rows = max(1, 2048 // block)
        _entropy[(triton.cdiv(count, rows),)](
            hidden, entropy, count, size, hidden.stride(0), ROWS=rows, BLOCK=block
        )
    return entropy


@triton.jit(do_not_specialize=["count"])
def _entropy(hidden, entropy, count, size, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < count
    start_of = hidden + row.to(tl.int64) * stride
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # of e^(z - top)
    weighted = tl.zeros([ROWS], tl.float32)  # of (z - top) e^(z - top)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = here[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=LOWEST).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 1))
        shrunk = tl.where(total > 0, tl.exp(top - higher), 0.0)
        weighted = tl.where(total > 0, shrunk * (weighted + total * (top - higher)), weighted)
        shifted = z - higher[:, None]
        share = tl.where(inside, tl.exp(shifted), 0.0)
        total = total * shrunk + tl.sum(share, 1)
        weighted += tl.sum(tl.where(inside, share * shifted, 0.0), 1)
        # An infinite feature makes these NaN, and NaN may not be lost by a maximum that ignores it.
        weighted += tl.sum(tl.where(inside & ~finite(z), float("nan"), 0.0), 1)
        top = higher
    tl.store(entropy + row, tl.log(total) - weighted / total, mask=here)


def distinctness(hidden: Tensor, visual: Tensor, source: Tensor, sources: int) -> Tensor:
    """Two launches that read features, for a token can be compared with the mean only when that is known; the
    first reads them twice, the second time mostly out of cache, and once more for every further source."""
    hidden = _by_rows(hidden)
    count, size = hidden.shape
    device = hidden.device
    distinct = torch.empty(count, dtype=torch.float32, device=device)
    if not count:
        return distinct
    block, parts = min(512, power_of_2(size)), triton.cdiv(count, PARTIAL_ROWS)
    inverse = torch.empty(count, dtype=torch.float32, device=device)
    total = torch.zeros(sources, size, dtype=torch.int64, device=device)
    _directions[(parts, sources)](
        hidden, visual.contiguous(), source.contiguous(), inverse, total,
        count, size, hidden.stride(0), STEPS=STEPS, ROWS=PARTIAL_ROWS, BLOCK=block,
    )  # fmt: skip
    rows = max(1, 2048 // block)
    _unlike[(triton.cdiv(count, rows),)](
        hidden, total, visual.contiguous(), source.contiguous(), inverse, distinct,
        count, size, hidden.stride(0), sources,
        UNIT=DISTINCT_UNIT, STEPS=STEPS, ROWS=rows, BLOCK=block, SOURCES=power_of_2(sources),
    )  # fmt: skip
    return distinct


@triton.jit(do_not_specialize=["count"])
def _directions(
    hidden, visual, source, inverse, total, count, size, stride,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STEPS / |z| of every token, and the sum of z STEPS / |z|, in whole numbers, over a program's visual
    ones of one source: exact in float32."""
    part, of_source = tl.program_id(0), tl.program_id(1)
    row = part * ROWS + tl.arange(0, ROWS)
    here = row < count
    start_of = hidden + row.to(tl.int64) * stride
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = here[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(z * z, 1)
    norm = tl.sqrt_rn(square)
    known = finite(norm)
    over = tl.where(known, tl.div_rn(STEPS * 1.0, tl.maximum(norm, 1e-12)), float("nan"))
    if of_source == 0:
        tl.store(inverse + row, over, mask=here)
    mine = tl.load(source + row, mask=here, other=-1) == of_source
    mine = mine & tl.load(visual + row, mask=here, other=0).to(tl.int1) & known
    share = tl.where(mine, over, 0.0)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = mine[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        steps = tl.sum(rint(z * share[:, None]), 0).to(tl.int64)
        tl.atomic_add(total + of_source * size + column, steps, mask=column < size, sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def _unlike(
    hidden, total, visual, source, inverse, distinct, count, size, stride, sources,
    UNIT: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """The mean direction of a source is that of its total, in steps; its length every program finds by
    itself, in the same order."""
    each = tl.arange(0, SOURCES)
    square = tl.zeros([SOURCES], tl.float64)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (each < sources)[:, None] & (column < size)[None, :]
        sums = tl.load(total + each[:, None] * size + column[None, :], mask=inside, other=0).to(tl.float64)
        square += tl.sum(sums * sums, 1)
    length = tl.maximum(tl.sqrt(square), 1e-12)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < count
    over = tl.load(inverse + row, mask=here, other=0.0)
    known = here & finite(over)
    seen = known & tl.load(visual + row, mask=here, other=0).to(tl.int1)
    start_of = hidden + row.to(tl.int64) * stride
    of = tl.load(source + row, mask=here, other=0)
    own = tl.sum(tl.where(of[:, None] == each[None, :], length[None, :], 0.0), 1)
    total_of = total + of * size
    near = tl.zeros([ROWS], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = seen[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        steps = rint(z * over[:, None])
        sums = tl.load(total_of[:, None] + column[None, :], mask=inside, other=0).to(tl.float64)
        mean = rint(sums / tl.where(seen, own, 1.0)[:, None] * STEPS).to(tl.float32)
        near += tl.sum(steps * mean, 1)
    told = rint((1 - tl.div_rn(near, STEPS * STEPS * 1.0)) * UNIT) / UNIT
    told = tl.where(seen, told, 0.0)
    tl.store(distinct + row, tl.where(known, told, float("nan")), mask=here)


def _by_rows(hidden: Tensor) -> Tensor:
    """Features one after the other within a token, wherever the tokens are."""
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()
