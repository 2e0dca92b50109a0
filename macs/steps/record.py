"""Records of plans: a ring of the latest, and sums over all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contracts import LOADS, Field
from .kernels.dispatch import kernels_enabled

TOTALS = "steps", "planned_steps", "rank_before", "rank_after", "expert_before", "expert_after"
"""What ``Totals`` counts before the sums of the records: recorded steps, steps in which a source planned, and
the summed rows of each step's largest rank and largest expert, before and after planning."""


class Totals(NamedTuple):
    """sums int64 [6 + 17 + 3 E], zeros to add to; experts_of_rank int64 [R, G]."""

    sums: Tensor
    experts_of_rank: Tensor


def append(record: Tensor, ring: Tensor, count: Tensor, totals: Totals | None = None) -> None:
    """Write a record int64 [N] into row ``count`` of ring [steps, N], and count it: int64 [1].

    Adds it to the totals as well, if they are given.
    """
    if kernels_enabled(record.device):
        from .kernels import record as kernels

        return kernels.append(record, ring, count, totals)
    ring.index_copy_(0, count % len(ring), record[None])
    count += 1
    if totals is not None:
        loads = record[len(Field) :].view(len(LOADS), -1)[1:]  # before and after planning
        by_rank = loads[:, totals.experts_of_rank].sum(2).amax(1)
        planned = (record[Field.PLANNED] > 0).long()
        totals.sums[: len(TOTALS)] += torch.stack(
            [torch.ones_like(planned), planned, *by_rank, *loads.amax(1)]
        )
        totals.sums[len(TOTALS) :] += record
