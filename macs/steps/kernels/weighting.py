"""Kernels of semantic weights; reference implementation: ``macs.steps.weighting``.

Sums of floats are taken in another order than torch takes them, so entropy is the reference's to about 1e-6
of its size, and distinctness, whose sums are exact but for that of a token's own norm, the reference's or a
neighbour. Moments are sums of whole numbers, exact in any order; a weight is the reference's or, where the
two sigmoids round apart, one of 65536 beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import KINDS, TEXT, Tokens
from ..contracts import Sums, Weighed
from ..fixed_point import ENTROPY_UNIT, UNIT
from ..weighting import DISTINCT_UNIT, EPSILON, FLAT_SPREAD, STEPS, WEIGHTINGS, Weighting
from ..weighting import semantic_weights as fused_weights
from .shared import finite, power_of_2, rint, visual_of

LOWEST = tl.constexpr(-3.4028234e38)
ROWS = 16
"""Tokens whose features one program reads."""
BLOCK = 128
"""Features of them that it looks at together."""
TOKENS = 256
"""Tokens of a program that reads no features."""
semantic_weights_in_torch = fused_weights.reference  # type: ignore[attr-defined]
"""For a rule that has no kernel."""
FEW = 64
"""So many groups are summed within a program, before memory sees them; with more, hardly two tokens of a
program share one."""


def semantic_weights(hidden: Tensor, tokens: Tokens, rule: Weighting, sums: Sums, finite: bool) -> Weighed:
    """constant: one launch. entropy: two, of which the first reads the features once. distinct: three, for a
    token can be compared with the mean only when that is known; the first reads features twice, the second
    time mostly out of cache, and once more for every further source, the second once. Features of text are
    read only for ``finite``."""
    if not WEIGHTINGS[rule.rule].kernel:
        return semantic_weights_in_torch(hidden, tokens, rule, sums, finite)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    (count, size), device = hidden.shape, hidden.device
    weight = torch.empty(count, dtype=torch.int64, device=device)
    known = torch.empty(count, dtype=torch.bool, device=device)
    told = Weighed(weight, known if finite else None)
    if not count:
        return told
    features = hidden, tokens.kinds.contiguous(), tokens.valid.contiguous()
    source = tokens.source.contiguous()
    sizes = count, size, hidden.stride(0)
    form = {"TEXT": TEXT, "ALL": finite, "ROWS": ROWS, "BLOCK": min(BLOCK, power_of_2(size)), "num_warps": 8}
    # A product is rounded before it is rounded to a whole number, as in torch: no fused multiply-add.
    form["enable_fp_fusion"] = False
    grid = (triton.cdiv(count, ROWS),)
    if rule.rule == "constant":
        heavy = max(1, round(rule.usual * UNIT))
        _constant[grid](*features, weight, known, *sizes, heavy, UNIT=UNIT, **form)
        return told
    groups, value = rule.groups(count), torch.empty(count, dtype=torch.float32, device=device)
    inner = tokens.segment if rule.by_image else tokens.kinds
    assert inner is not None
    inner = inner.contiguous()
    group = source, inner, count if rule.by_image else KINDS, sums.moments, groups
    few = power_of_2(groups) if groups <= FEW else 0
    if rule.rule == "distinct":
        inverse = torch.empty(count, dtype=torch.float32, device=device)
        _directions[(*grid, rule.sources)](
            *features, source, inverse, known, sums.directions, *sizes, STEPS=STEPS, **form
        )
        _unlike[grid](
            *features, sums.directions, inverse, value, *group, *sizes, rule.sources,
            UNIT=DISTINCT_UNIT, SCALE=ENTROPY_UNIT, STEPS=STEPS, GROUPS=few,
            SOURCES=power_of_2(rule.sources), **form,
        )  # fmt: skip
    else:
        _entropy[grid](*features, value, known, *group, *sizes, SCALE=ENTROPY_UNIT, GROUPS=few, **form)
    _weights[(triton.cdiv(count, TOKENS),)](
        value, *features[1:], *group, weight, count, *map(float, rule.curve),
        SCALE=ENTROPY_UNIT, UNIT=UNIT, FLAT=FLAT_SPREAD, EPSILON=EPSILON, TEXT=TEXT, TOKENS=TOKENS,
    )  # fmt: skip
    return told


@triton.jit(do_not_specialize=["count"])
def _constant(
    hidden, kinds, valid, weight, known, count, size, stride, heavy,
    UNIT: tl.constexpr, TEXT: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = token < count
    _, seen = visual_of(kinds, valid, token, here, TEXT)
    tl.store(weight + token, tl.where(seen, heavy, UNIT).to(tl.int64), mask=here)
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
    """A value in fixed point, 0 where it is not included in the moments, and whether it is."""
    included = seen & (value == value)
    return rint(tl.where(included, value, 0.0).to(tl.float64) * SCALE).to(tl.int64), included


@triton.jit
def _group(source, inner, spread, token, here):
    """Of which group a token is."""
    own = tl.load(inner + token, mask=here, other=0).to(tl.int64)
    return tl.load(source + token, mask=here, other=0) * spread + own


@triton.jit
def _add_moments(moments, groups, group, included, fixed, GROUPS: tl.constexpr):
    """Add the tokens' values to the moments of their groups."""
    if GROUPS > 0:
        column = tl.arange(0, GROUPS)
        hit = included[:, None] & (group[:, None] == column[None, :])
        number = tl.sum(hit.to(tl.int64), 0)
        some = number > 0
        total = tl.sum(tl.where(hit, fixed[:, None], 0), 0)
        square = tl.sum(tl.where(hit, (fixed * fixed)[:, None], 0), 0)
        tl.atomic_add(moments + column, number, mask=some, sem="relaxed")
        tl.atomic_add(moments + groups + column, total, mask=some, sem="relaxed")
        tl.atomic_add(moments + 2 * groups + column, square, mask=some, sem="relaxed")
    else:
        tl.atomic_add(moments + group, included.to(tl.int64), mask=included, sem="relaxed")
        tl.atomic_add(moments + groups + group, fixed, mask=included, sem="relaxed")
        tl.atomic_add(moments + 2 * groups + group, fixed * fixed, mask=included, sem="relaxed")


@triton.jit(do_not_specialize=["count", "spread", "groups"])
def _entropy(
    hidden, kinds, valid, entropy, known, source, inner, spread, moments, groups, count, size, stride,
    SCALE: tl.constexpr, GROUPS: tl.constexpr,
    TEXT: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of e^z and that of z e^z are carried along as the maximum rises."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = token < count
    _, seen = visual_of(kinds, valid, token, here, TEXT)
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
        # An infinite feature makes these NaN, and NaN may not be lost by a maximum that ignores it.
        weighted += tl.sum(tl.where(inside & ~finite(z), float("nan"), 0.0), 1)
        plain += tl.sum(tl.where(inside, z, 0.0), 1)
        top = higher
    found = tl.log(total) - weighted / total
    tl.store(entropy + token, found, mask=here)
    tl.store(known + token, finite(plain), mask=here)
    fixed, included = _fixed(found, seen, SCALE)
    _add_moments(moments, groups, _group(source, inner, spread, token, seen), included, fixed, GROUPS)


@triton.jit(do_not_specialize=["count"])
def _directions(
    hidden, kinds, valid, source, inverse, known, total, count, size, stride,
    STEPS: tl.constexpr, TEXT: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STEPS / |z| of every token, and the sum of z STEPS / |z|, in whole numbers, over a program's visual
    ones of one source: exact in float32."""
    of_source = tl.program_id(1)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = token < count
    _, seen = visual_of(kinds, valid, token, here, TEXT)
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
    over = tl.where(finite(norm), tl.div_rn(STEPS * 1.0, tl.maximum(norm, 1e-12)), float("nan"))
    if of_source == 0:
        tl.store(inverse + token, over, mask=here)
        tl.store(known + token, finite(plain), mask=here)
    mine = seen & finite(norm) & (tl.load(source + token, mask=here, other=-1) == of_source)
    share = tl.where(mine, over, 0.0)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = mine[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        steps = tl.sum(rint(z * share[:, None]), 0).to(tl.int64)
        tl.atomic_add(total + of_source * size + column, steps, mask=column < size, sem="relaxed")


@triton.jit(do_not_specialize=["count", "spread", "groups"])
def _unlike(
    hidden, kinds, valid, total, inverse, distinct, source, inner, spread, moments, groups,
    count, size, stride, sources,
    UNIT: tl.constexpr, SCALE: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr,
    SOURCES: tl.constexpr, TEXT: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = token < count
    _, seen = visual_of(kinds, valid, token, here, TEXT)
    over = tl.load(inverse + token, mask=seen, other=0.0)
    told = seen & finite(over)
    start_of = hidden + token * stride
    of = tl.load(source + token, mask=here, other=0)
    own = tl.sum(tl.where(of[:, None] == each[None, :], length[None, :], 0.0), 1)
    near = tl.zeros([ROWS], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = told[:, None] & (column < size)[None, :]
        z = tl.load(start_of[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        steps = rint(z * over[:, None])
        sums = tl.load(total + of[:, None] * size + column[None, :], mask=inside, other=0).to(tl.float64)
        mean = rint(sums / tl.where(told, own, 1.0)[:, None] * STEPS).to(tl.float32)
        near += tl.sum(steps * mean, 1)
    value = rint((1 - tl.div_rn(near, STEPS * STEPS * 1.0)) * UNIT) / UNIT
    value = tl.where(told, value, float("nan"))
    tl.store(distinct + token, value, mask=here)
    fixed, included = _fixed(value, told, SCALE)
    _add_moments(moments, groups, _group(source, inner, spread, token, told), included, fixed, GROUPS)


@triton.jit(do_not_specialize=["count", "spread", "groups"])
def _weights(
    value, kinds, valid, source, inner, spread, moments, groups, weight, count, sharpness, usual,
    SCALE: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr, EPSILON: tl.constexpr, TEXT: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < count
    _, seen = visual_of(kinds, valid, token, here, TEXT)
    fixed, included = _fixed(tl.load(value + token, mask=seen, other=float("nan")), seen, SCALE)
    of = _group(source, inner, spread, token, included)
    number = tl.load(moments + of, mask=included, other=0)
    total = tl.load(moments + groups + of, mask=included, other=0)
    square = tl.load(moments + 2 * groups + of, mask=included, other=0)
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
    tl.store(weight + token, tl.where(seen, tl.where(included, told, 1), UNIT), mask=here)
