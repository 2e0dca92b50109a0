"""The kernel of records; reference: ``macs.steps.record``, equal.

record              int64 [N]           ring  int64 [steps, N]      written
count               int64 [1]           written
totals              int64 [6 + N]       added to
experts_of_rank     int64 [R, G]
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..contracts import LOADS, Field
from ..record import TOTALS, Totals
from .dispatch import on_device
from .shared import power_of_2

BLOCK = 1024
"""Numbers that the program copies together."""


def append(record: Tensor, ring: Tensor, count: Tensor, totals: Totals | None = None) -> None:
    """One launch."""
    sums, experts_of_rank = Totals(record, record[None, :1]) if totals is None else totals
    ranks, local = experts_of_rank.shape
    with on_device(record.device):
        _append[(1,)](
            record, ring, count, sums, experts_of_rank, len(ring), ring.shape[1], ranks, local,
            COUNTED=totals is not None, OWN=len(TOTALS), LOADS_AT=len(Field),
            NUM_LOADS=len(LOADS), PLANNED_AT=int(Field.PLANNED), RANKS=power_of_2(ranks),
            LOCAL=power_of_2(local), BLOCK=BLOCK,
        )  # fmt: skip


@triton.jit
def _append(
    record, ring, count, totals, experts_of_rank, steps, width, ranks, local,
    COUNTED: tl.constexpr, OWN: tl.constexpr, LOADS_AT: tl.constexpr, NUM_LOADS: tl.constexpr,
    PLANNED_AT: tl.constexpr, RANKS: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.load(count)
    row = ring + (number % steps) * width
    sums = totals + OWN
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        here = place < width
        numbers = tl.load(record + place, mask=here, other=0)
        tl.store(row + place, numbers, mask=here)
        if COUNTED:
            tl.store(sums + place, tl.load(sums + place, mask=here, other=0) + numbers, mask=here)
    if COUNTED:
        rank, slot = tl.arange(0, RANKS), tl.arange(0, LOCAL)
        inside = (rank < ranks)[:, None] & (slot < local)[None, :]
        expert = tl.load(experts_of_rank + rank[:, None] * local + slot[None, :], mask=inside, other=0)
        for when in tl.static_range(1, NUM_LOADS):  # before and after
            load = tl.load(record + LOADS_AT + when * ranks * local + expert, mask=inside, other=0)
            _add(totals + 1 + when, tl.max(tl.sum(load, 1), 0))
            _add(totals + 3 + when, tl.max(tl.max(load, 1), 0))
        _add(totals, 1)
        _add(totals + 1, (tl.load(record + PLANNED_AT) > 0).to(tl.int64))
    tl.debug_barrier()  # not before all threads have read the row number
    tl.store(count, number + 1)


@triton.jit
def _add(place, amount):
    """Not atomic: there is one program."""
    tl.store(place, tl.load(place) + amount)
