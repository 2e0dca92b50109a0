"""The kernel of a layer's records; reference implementation: ``macs.records.metrics``, equal."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...records.totals import OWN, Row
from ..contracts import LOADS, SCALARS
from .shared import power_of_2

BLOCK = 1024
"""Numbers that the program copies together."""


def append(record: Tensor, ring: Tensor, following: Tensor, totals: Row | None = None) -> None:
    """One launch."""
    sums, experts_of_rank = Row(record, record[None, :1]) if totals is None else totals
    ranks, local = experts_of_rank.shape
    _append[(1,)](
        record, ring, following, sums, experts_of_rank, len(ring), ring.shape[1], ranks, local,
        COUNTED=totals is not None, OWN=len(OWN), LOADS_AT=len(SCALARS),
        KINDS=len(LOADS), PLANNED_AT=list(SCALARS).index("planned"), RANKS=power_of_2(ranks),
        LOCAL=power_of_2(local), BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit
def _append(
    record, ring, following, totals, experts_of_rank, steps, width, ranks, local,
    COUNTED: tl.constexpr, OWN: tl.constexpr, LOADS_AT: tl.constexpr, KINDS: tl.constexpr,
    PLANNED_AT: tl.constexpr, RANKS: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.load(following)
    row = ring + (count % steps) * width
    sums = totals + OWN
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        here = place < width
        found = tl.load(record + place, mask=here, other=0)
        tl.store(row + place, found, mask=here)
        if COUNTED:
            tl.store(sums + place, tl.load(sums + place, mask=here, other=0) + found, mask=here)
    if COUNTED:
        rank, slot = tl.arange(0, RANKS), tl.arange(0, LOCAL)
        inside = (rank < ranks)[:, None] & (slot < local)[None, :]
        expert = tl.load(experts_of_rank + rank[:, None] * local + slot[None, :], mask=inside, other=0)
        for when in tl.static_range(1, KINDS):  # before and after
            load = tl.load(record + LOADS_AT + when * ranks * local + expert, mask=inside, other=0)
            _add(totals + 1 + when, tl.max(tl.sum(load, 1), 0))
            _add(totals + 3 + when, tl.max(tl.max(load, 1), 0))
        _add(totals, 1)
        _add(totals + 1, (tl.load(record + PLANNED_AT) > 0).to(tl.int64))
    tl.debug_barrier()  # nobody counts it before all have read where it goes
    tl.store(following, count + 1)


@triton.jit
def _add(place, amount):
    """To one number, by the only program there is."""
    tl.store(place, tl.load(place) + amount)
