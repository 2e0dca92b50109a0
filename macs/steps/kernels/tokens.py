"""The kernel of the tokens' layout; reference: ``macs.tokens.ordered``, equal.

ids                 int8  [B, S] by strides    valid, exempt  bool [B, S] by strides
out_ids, out_valid, out_exempt   [T]           written
position, source    int64 [T]                  written
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device

if TYPE_CHECKING:
    from ...tokens import Modality

TOKENS = 1024
"""Tokens of one program."""


def ordered(modality: Modality, sequence_major: bool, sources: int) -> tuple[Tensor, ...]:
    """One launch."""
    (rows, columns), device = modality.ids.shape, modality.device
    flags = modality.ids, modality.valid, modality.exempt
    count = rows * columns
    ordered_flags = [torch.empty(count, dtype=flag.dtype, device=device) for flag in flags]
    position, source = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    if count:
        strides = [stride for flag in flags for stride in flag.stride()]
        with on_device(device):
            _ordered[(triton.cdiv(count, TOKENS),)](
                *flags, *ordered_flags, position, source, *strides, rows, columns, sources,
                SEQUENCE=sequence_major, TOKENS=TOKENS,
            )  # fmt: skip
    return *ordered_flags, position, source


# Numbers that follow the batch are no part of what is compiled.
@triton.jit(
    do_not_specialize=[
        "rows", "columns", "sources", "ids_b", "ids_s", "valid_b", "valid_s", "exempt_b", "exempt_s",
    ],
    do_not_specialize_on_alignment=["ids", "valid", "exempt"],
)  # fmt: skip
def _ordered(
    ids, valid, exempt, out_ids, out_valid, out_exempt, position, source,
    ids_b, ids_s, valid_b, valid_s, exempt_b, exempt_s, rows, columns, sources,
    SEQUENCE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < rows * columns
    if SEQUENCE:
        b, s = token % rows, token // rows
    else:
        b, s = token // columns, token % columns
    tl.store(out_ids + token, tl.load(ids + b * ids_b + s * ids_s, mask=here, other=0), mask=here)
    tl.store(out_valid + token, tl.load(valid + b * valid_b + s * valid_s, mask=here, other=0), mask=here)
    tl.store(out_exempt + token, tl.load(exempt + b * exempt_b + s * exempt_s, mask=here, other=0), mask=here)
    tl.store(position + token, b * columns + s, mask=here)
    tl.store(source + token, b * sources // rows, mask=here)
