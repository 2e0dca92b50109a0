"""Kernels of semantic weights; reference: ``macs.steps.weighting``.

Floats are summed in another order than in torch, so entropy is the reference's to about 1e-6 of its size, and
distinctness the reference's or a neighbour. A weight is the reference's or, where the two sigmoids round
apart, one of 65536 beside it.

    hidden              float   [T, D] by its row stride
    modality            int8    [T]         valid  bool [T]     source  int64 [T]
    value               float32 [T]         entropy or distinctness, written
    norm                float32 [T]         of the features, written
    known               bool    [T]         features are finite, written
    directions          float64 [S, D]      added to
    moments             float64 [3, G]      added to
    weight              int64   [T]         written
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import MODALITIES, TEXT, Tokens
from ..contracts import UNIT, VALUE_UNIT, Counts, TokenWeights
from ..weighting import DIRECTION_UNIT, DISTINCT_UNIT, EPSILON, FLAT_SPREAD, WeightRule
from .shared import finite, power_of_2, rint, visual_of

LOWEST = tl.constexpr(-3.4028234e38)
ROWS = 16
"""Tokens whose features one program reads."""
BLOCK = 128
"""Features of them that it looks at together."""
TOKENS = 256
"""Tokens of a program that reads no features."""


def semantic_weights(
    hidden: Tensor, tokens: Tokens, rule: WeightRule, counts: Counts, finite: bool
) -> TokenWeights:
    """constant: one launch. entropy: two, of which the first reads the features once. distinct: three, for
    the mean must be known before a token is compared with it; the first reads the features twice (mostly from
    cache the second time, and once more for each further source), the second once. Features of text are read
    only for ``finite``."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    (count, size), device = hidden.shape, hidden.device
    weight = torch.empty(count, dtype=torch.int64, device=device)
    known = torch.empty(count, dtype=torch.bool, device=device)
    result = TokenWeights(weight, known if finite else None)
    if not count:
        return result
    flags = tokens.modality.contiguous(), tokens.valid.contiguous(), tokens.source.contiguous()
    sizes = count, size, hidden.stride(0)
    form = {"TEXT": TEXT, "ALL": finite, "ROWS": ROWS, "BLOCK": min(BLOCK, power_of_2(size)), "num_warps": 8}
    # A product is rounded before it is added, as in torch: no fused multiply-add.
    form["enable_fp_fusion"] = False
    grid = (triton.cdiv(count, ROWS),)
    if rule.weighting == "constant":
        visual = max(1, round(rule.visual_weight * UNIT))
        _constant[grid](hidden, *flags, weight, known, *sizes, visual, UNIT=UNIT, **form)
        return result
    value = torch.empty(count, dtype=torch.float32, device=device)
    groups = rule.sources * MODALITIES
    group = {"MODALITIES": MODALITIES, "GROUPS": power_of_2(groups), "SCALE": VALUE_UNIT}
    if rule.weighting == "distinct":
        norm = torch.empty(count, dtype=torch.float32, device=device)
        _directions[(*grid, rule.sources)](hidden, *flags, norm, known, counts.directions, *sizes, **form)
        _distinctness[grid](
            hidden, *flags, counts.directions, norm, value, counts.moments, groups, *sizes, rule.sources,
            UNIT=DISTINCT_UNIT, DIRECTION=DIRECTION_UNIT, SOURCES=power_of_2(rule.sources), **group, **form,
        )  # fmt: skip
    elif rule.weighting == "entropy":
        _entropy[grid](hidden, *flags, value, known, counts.moments, groups, *sizes, **group, **form)
    else:
        raise NotImplementedError(
            f"weighting {rule.weighting}: its row says kernel = True, and there is none"
        )
    _weights[(triton.cdiv(count, TOKENS),)](
        value, *flags, counts.moments, groups, weight, count, *map(float, rule.curve),
        MODALITIES=MODALITIES, SCALE=VALUE_UNIT, UNIT=UNIT, FLAT=FLAT_SPREAD, EPSILON=EPSILON, TEXT=TEXT,
        TOKENS=TOKENS,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["count"])
def _constant(
    hidden, modality, valid, source, weight, known, count, size, stride, visual_weight,
    UNIT: tl.constexpr, TEXT: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = token < count
    _, seen = visual_of(modality, valid, token, here, TEXT)
    tl.store(weight + token, tl.where(seen, visual_weight, UNIT).to(tl.int64), mask=here)
    if ALL:
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = here[:, None] & (column < size)[None, :]
            z = tl.load(hidden + token[:, None] * stride + column[None, :], mask=inside, other=0.0)
            total += tl.sum(z.to(tl.float32), 1)
        tl.store(known + token, finite(total), mask=here)


@triton.jit
def _fixed(value, seen, SCALE: tl.constexpr):
    """A value in whole numbers of 1 / SCALE, float64, 0 where it is not in the moments, and whether it is."""
    included = seen & (value == value)
    return rint(tl.where(included, value, 0.0).to(tl.float64) * SCALE), included


@triton.jit
def _group(source, modality, token, here, MODALITIES: tl.constexpr):
    own = tl.load(modality + token, mask=here, other=0).to(tl.int64)
    return tl.load(source + token, mask=here, other=0) * MODALITIES + own


@triton.jit
def _add_moments(moments, groups, group, included, fixed, GROUPS: tl.constexpr):
    """Add the tokens' values to the moments of their groups."""
    column = tl.arange(0, GROUPS)
    hit = included[:, None] & (group[:, None] == column[None, :])
    number = tl.sum(hit.to(tl.float64), 0)
    some = number > 0
    total = tl.sum(tl.where(hit, fixed[:, None], 0.0), 0)
    square = tl.sum(tl.where(hit, (fixed * fixed)[:, None], 0.0), 0)
    tl.atomic_add(moments + column, number, mask=some, sem="relaxed")
    tl.atomic_add(moments + groups + column, total, mask=some, sem="relaxed")
    tl.atomic_add(moments + 2 * groups + column, square, mask=some, sem="relaxed")


@triton.jit(do_not_specialize=["count", "groups"])
def _entropy(
    hidden, modality, valid, source, value, known, moments, groups, count, size, stride,
    MODALITIES: tl.constexpr, GROUPS: tl.constexpr, SCALE: tl.constexpr,
    TEXT: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of e^z and that of z e^z are carried along as the maximum rises."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = token < count
    _, seen = visual_of(modality, valid, token, here, TEXT)
    read = here if ALL else seen
    start_of = hidden + token * stride
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # of e^(z - top)
    weighted = tl.zeros([ROWS], tl.float32)  # of (z - top) e^(z - top)
    plain = tl.zeros([ROWS], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = read[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=LOWEST).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 1))
        shrunk = tl.where(total > 0, tl.exp(top - higher), 0.0)
        weighted = tl.where(total > 0, shrunk * (weighted + total * (top - higher)), weighted)
        shifted = z - higher[:, None]
        share = tl.where(inside, tl.exp(shifted), 0.0)
        total = total * shrunk + tl.sum(share, 1)
        weighted += tl.sum(tl.where(inside, share * shifted, 0.0), 1)
        # An infinite feature makes these NaN, and a maximum must not lose NaN.
        weighted += tl.sum(tl.where(inside & ~finite(z), float("nan"), 0.0), 1)
        plain += tl.sum(tl.where(inside, z, 0.0), 1)
        top = higher
    entropy = tl.log(total) - weighted / total
    tl.store(value + token, entropy, mask=here)
    tl.store(known + token, finite(plain), mask=here)
    fixed, included = _fixed(entropy, seen, SCALE)
    _add_moments(moments, groups, _group(source, modality, token, seen, MODALITIES), included, fixed, GROUPS)


@triton.jit(do_not_specialize=["count"])
def _directions(
    hidden, modality, valid, source, norm_of, known, directions, count, size, stride,
    TEXT: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """|z| of every token, and the sum of z / |z| in float64 over a program's visual tokens of one source."""
    of_source = tl.program_id(1)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = token < count
    _, seen = visual_of(modality, valid, token, here, TEXT)
    read = here if ALL else seen
    start_of = hidden + token * stride
    square = tl.zeros([ROWS], tl.float32)
    plain = tl.zeros([ROWS], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = read[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(z * z, 1)
        plain += tl.sum(z, 1)
    norm = tl.sqrt_rn(square)
    if of_source == 0:
        tl.store(norm_of + token, norm, mask=here)
        tl.store(known + token, finite(plain), mask=here)
    mine = seen & finite(norm) & (tl.load(source + token, mask=here, other=-1) == of_source)
    scale = tl.where(mine, tl.div_rn(1.0, tl.maximum(tl.where(mine, norm, 1.0), 1e-12)), 0.0).to(tl.float64)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = mine[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float64)
        total = tl.sum(z * scale[:, None], 0)
        tl.atomic_add(directions + of_source * size + column, total, mask=column < size, sem="relaxed")


@triton.jit(do_not_specialize=["count", "groups"])
def _distinctness(
    hidden, modality, valid, source, directions, norm_of, value, moments, groups, count, size, stride,
    sources,
    UNIT: tl.constexpr, DIRECTION: tl.constexpr, SOURCES: tl.constexpr,
    MODALITIES: tl.constexpr, GROUPS: tl.constexpr, SCALE: tl.constexpr,
    TEXT: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every program finds the length of the summed directions by itself, in the same order."""
    each = tl.arange(0, SOURCES)
    square = tl.zeros([SOURCES], tl.float64)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (each < sources)[:, None] & (column < size)[None, :]
        total = tl.load(directions + each[:, None] * size + column[None, :], mask=inside, other=0.0)
        square += tl.sum(total * total, 1)
    length = tl.maximum(tl.sqrt(square), 1e-12)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = token < count
    _, seen = visual_of(modality, valid, token, here, TEXT)
    norm = tl.load(norm_of + token, mask=seen, other=1.0)
    known = seen & finite(norm)
    start_of = hidden + token * stride
    of = tl.load(source + token, mask=here, other=0)
    own = tl.sum(tl.where(of[:, None] == each[None, :], length[None, :], 0.0), 1)
    near = tl.zeros([ROWS], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = known[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total = tl.load(directions + of[:, None] * size + column[None, :], mask=inside, other=0.0)
        mean = (rint(total / tl.where(known, own, 1.0)[:, None] * DIRECTION) / DIRECTION).to(tl.float32)
        near += tl.sum(z * mean, 1)
    distinct = 1 - tl.div_rn(near, tl.maximum(tl.where(known, norm, 1.0), 1e-12))
    distinct = rint(distinct * UNIT) / UNIT
    distinct = tl.where(known, distinct, float("nan"))
    tl.store(value + token, distinct, mask=here)
    fixed, included = _fixed(distinct, known, SCALE)
    _add_moments(moments, groups, _group(source, modality, token, known, MODALITIES), included, fixed, GROUPS)


@triton.jit(do_not_specialize=["count", "groups"])
def _weights(
    value, modality, valid, source, moments, groups, weight, count, sharpness, average,
    MODALITIES: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr,
    EPSILON: tl.constexpr, TEXT: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < count
    _, seen = visual_of(modality, valid, token, here, TEXT)
    fixed, included = _fixed(tl.load(value + token, mask=seen, other=float("nan")), seen, SCALE)
    of = _group(source, modality, token, included, MODALITIES)
    number = tl.load(moments + of, mask=included, other=0.0)
    total = tl.load(moments + groups + of, mask=included, other=0.0)
    square = tl.load(moments + 2 * groups + of, mask=included, other=0.0)
    members = tl.maximum(number, 1.0)
    mean = total / members
    sigma = tl.sqrt(tl.maximum(square / members - mean * mean, 0.0)) / SCALE
    scale = tl.where(sigma < FLAT, 0.0, 1 / (sigma + EPSILON)) / SCALE
    normalized = ((fixed - mean) * scale).to(tl.float32)
    share = 2 * average / (1 + tl.exp(-sharpness * normalized))
    result = rint(share.to(tl.float64) * UNIT).to(tl.int64)
    result = tl.minimum(tl.maximum(result, 1), UNIT)
    tl.store(weight + token, tl.where(seen, tl.where(included, result, 1), UNIT), mask=here)
