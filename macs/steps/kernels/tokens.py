"""The kernel of the tokens' layout; reference implementation: ``macs.modality``, equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ...tokens import Modality

TOKENS = 1024
"""Tokens of one program."""


def ordered(modality: Modality, sequence_major: bool, sources: int) -> tuple[Tensor, ...]:
    """One launch."""
    (rows, columns), device = modality.kinds.shape, modality.device
    told = modality.kinds, modality.valid, modality.exempt
    count = rows * columns
    found = [torch.empty(count, dtype=one.dtype, device=device) for one in told]
    position, source = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    if count:
        strides = [stride for one in told for stride in one.stride()]
        _ordered[(triton.cdiv(count, TOKENS),)](
            *told, *found, position, source, *strides, rows, columns, sources,
            SEQUENCE=sequence_major, TOKENS=TOKENS,
        )  # fmt: skip
    return *found, position, source


# Numbers that follow the batch are no part of what is compiled.
@triton.jit(
    do_not_specialize=[
        "rows", "columns", "sources", "kinds_b", "kinds_s", "valid_b", "valid_s", "exempt_b", "exempt_s",
    ],
    do_not_specialize_on_alignment=["kinds", "valid", "exempt"],
)  # fmt: skip
def _ordered(
    kinds, valid, exempt, out_kinds, out_valid, out_exempt, position, source,
    kinds_b, kinds_s, valid_b, valid_s, exempt_b, exempt_s, rows, columns, sources,
    SEQUENCE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < rows * columns
    if SEQUENCE:
        b, s = token % rows, token // rows
    else:
        b, s = token // columns, token % columns
    tl.store(out_kinds + token, tl.load(kinds + b * kinds_b + s * kinds_s, mask=here, other=0), mask=here)
    tl.store(out_valid + token, tl.load(valid + b * valid_b + s * valid_s, mask=here, other=0), mask=here)
    tl.store(out_exempt + token, tl.load(exempt + b * exempt_b + s * exempt_s, mask=here, other=0), mask=here)
    tl.store(position + token, b * columns + s, mask=here)
    tl.store(source + token, b * sources // rows, mask=here)
