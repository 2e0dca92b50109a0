"""The kernels of compensation; reference: ``macs.steps.compensation``, equal but for rounding.

Three launches: weighted features of every expert, their product with the coefficients (cuBLAS), and the sum.
With E experts and M tables of rank r they write and read 2 T M E (1 + r) + 8 T D bytes in bfloat16.

    hidden float [T, D]     experts int64 [T, k]      weights float [T, k]     planned int64 [T, k']
    modality int8 [T]       valid bool [T]            table_of int64 [2]
    basis bfloat16 [M, D, r]                          offset float32 [M, r]
    columns bfloat16 [T, M, E, 1 + r], lost bool [T]  written by the first
    output, result float [T, D]                       estimate bfloat16 [T, D]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import TEXT
from ..compensation import CompensationTables, Dropped
from .shared import assignments, power_of_2, visual_of

TOKENS = 16
"""Tokens of a program that makes features, and of one that adds."""

FEATURES = 128
"""Features of the hidden states that a program looks at together."""

TILE = 8192
"""Numbers of a basis that it does at most."""


def compensate(output: Tensor, dropped: Dropped, tables: CompensationTables) -> Tensor:
    """Three launches."""
    count, features = output.shape
    many, experts, width, _ = tables.coefficients.shape
    k, planned = dropped.experts.shape[1], dropped.planned.shape[1]
    result = torch.empty_like(output, memory_format=torch.contiguous_format)
    if not count:
        return result
    dtype = tables.coefficients.dtype
    columns = torch.empty(count, many * experts * width, dtype=dtype, device=output.device)
    lost = torch.empty(count, dtype=torch.bool, device=output.device)
    grid, rank = (triton.cdiv(count, TOKENS),), max(16, power_of_2(width - 1))
    tensors = dropped.hidden, dropped.experts, dropped.weights, dropped.planned
    _columns[grid](
        *(one.contiguous() for one in tensors), dropped.tokens.modality, dropped.tokens.valid,
        tables.table_of, tables.basis, tables.offset, columns, lost,
        count, features, k, planned, experts, width - 1,
        TABLES=many, TOKENS=TOKENS, FEATURES=max(16, min(FEATURES, TILE // rank)), K=power_of_2(k), RANK=rank,
        TEXT=TEXT,
    )  # fmt: skip
    estimate = columns @ tables.coefficients.view(-1, features)
    _add[grid](output.contiguous(), estimate, lost, result, count, features, TOKENS=TOKENS, FEATURES=FEATURES)
    return result


@triton.jit(do_not_specialize=["count"])
def _columns(
    hidden, experts, weights, planned, modality, valid, table_of, basis, offset, columns, lost,
    count, features, k, slots, num_experts, rank,
    TABLES: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
    TEXT: tl.constexpr,
):  # fmt: skip
    token, at, inside = assignments(count, k, TOKENS, K)
    here, dim = token < count, tl.arange(0, RANK)
    expert = tl.load(experts + at, mask=inside, other=-1)
    planned_at = token[:, None] * slots + tl.arange(0, K)[None, :]
    target = tl.load(planned + planned_at, mask=inside, other=0)
    gone = (target < 0) & (expert >= 0)
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    _, visual = visual_of(modality, valid, token, here, TEXT)
    table = tl.load(table_of + visual.to(tl.int64))
    touched = (tl.sum(gone.to(tl.int32), 1) > 0) & (table >= 0)
    tl.store(lost + token, touched, mask=here)
    weight, width = tl.where(gone & touched[:, None], weight, 0.0), rank + 1
    for one in tl.static_range(TABLES):
        mine = touched & (table == one)
        start = tl.load(offset + one * rank + dim, mask=dim < rank, other=0.0)
        projected = tl.zeros([TOKENS, RANK], tl.float32) + start[None, :]
        for first in range(0, features, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            x = tl.load(
                hidden + token[:, None] * features + feature[None, :],
                mask=mine[:, None] & (feature < features)[None, :], other=0.0,
            )  # fmt: skip
            a = tl.load(
                basis + one * features * rank + feature[:, None] * rank + dim[None, :],
                mask=(feature < features)[:, None] & (dim < rank)[None, :], other=0.0,
            )  # fmt: skip
            projected += tl.dot(x.to(a.dtype), a, out_dtype=tl.float32)
        for e in range(num_experts):
            share = tl.sum(tl.where((expert == e) & mine[:, None], weight, 0.0), 1)
            row = columns + (token * TABLES + one) * num_experts * width + e * width
            kind = columns.dtype.element_ty
            tl.store(row, share.to(kind), mask=here)
            value = share[:, None] * projected
            # A token that lost nothing has zeros, also where its features are not finite.
            value = tl.where(share[:, None] == 0, 0.0, value)
            tl.store(
                row[:, None] + 1 + dim[None, :],
                value.to(kind),
                mask=here[:, None] & (dim < rank)[None, :],
            )


@triton.jit(do_not_specialize=["count"])
def _add(output, estimate, lost, result, count, features, TOKENS: tl.constexpr, FEATURES: tl.constexpr):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < count
    changes = tl.load(lost + token, mask=here, other=0).to(tl.int1)
    for first in range(0, features, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        inside = here[:, None] & (feature < features)[None, :]
        at = token[:, None] * features + feature[None, :]
        row = tl.load(output + at, mask=inside, other=0.0)
        more = tl.load(estimate + at, mask=inside & changes[:, None], other=0.0)
        total = (row.to(tl.float32) + more.to(tl.float32)).to(row.dtype)
        tl.store(result + at, tl.where(changes[:, None], total, row), mask=inside)
