"""The kernel of the bound on rows: exactly its twin in ``macs.capacity``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..capacity import MOST_ROWS
from .shared import power_of_2


def row_bound(tokens: Tensor, places: Tensor, bounds: Tensor, top_k: int, ranks: int) -> Tensor:
    """One launch."""
    room = torch.empty(len(tokens), ranks, dtype=torch.int64, device=tokens.device)
    tensors = tokens.contiguous(), places.contiguous(), bounds.contiguous()
    _row_bound[(len(tokens),)](*tensors, room, top_k, ranks, MOST=int(MOST_ROWS), RANKS=power_of_2(ranks))
    return room


@triton.jit
def _times(share, bound, MOST: tl.constexpr):
    """The whole part of a product; no bound times nothing is nothing."""
    product = share * bound
    product = tl.where(product == product, product, 0.0)
    return tl.floor(tl.minimum(product, tl.full((), MOST, tl.float64)))


@triton.jit
def _row_bound(tokens, places, bounds, room, top_k, ranks, MOST: tl.constexpr, RANKS: tl.constexpr):
    source = tl.program_id(0)
    rank = tl.arange(0, RANKS)
    target, hard = tl.load(bounds), tl.load(bounds + 1)
    rows = tl.load(tokens + source) * top_k
    total = rows.to(tl.float64)
    even = total / tl.full((), ranks, tl.float64)
    least = rows // ranks
    whole = (rows + ranks - 1) // ranks
    bound = _times(even, target, MOST).to(tl.int64)
    extra = _times(total, target, MOST).to(tl.int64) - ranks * least
    turn = (rank - tl.load(places + source) * extra) % ranks
    turn = tl.where(turn < 0, turn + ranks, turn)
    rounded = least + (turn < extra).to(tl.int64)
    bound = tl.where((bound < whole) & (target >= 1), rounded, bound)
    bound = tl.minimum(bound, _times(even, hard, MOST).to(tl.int64))
    tl.store(room + source * ranks + rank, bound, mask=rank < ranks)
