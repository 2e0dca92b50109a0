"""Kernels of the bounds on rows; reference: ``macs.steps.bounds``.

by_source       int64   [3, S]  tokens, weights, visual weights
source_index    int64   [S]
target          float64 [1]     target_load
rows            int64   [S, E]
rank_of_expert  int64   [E]
group           int64   [4, R]  ``GroupField``, written
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bounds import GroupField
from ..contracts import Counts, LayerConstants
from .shared import power_of_2


def group_rows(counts: Counts, constants: LayerConstants, top_k: int) -> Tensor:
    """One launch of one program."""
    sources, num_experts = counts.rows.shape
    ranks = constants.ranks
    group = torch.empty(len(GroupField), ranks, dtype=torch.int64, device=counts.device)
    _group_rows[(1,)](
        counts.by_source, constants.source_index, constants.target_load, counts.rows,
        constants.rank_of_expert, group, top_k, num_experts, sources, ranks, constants.min_tokens,
        RANKS=power_of_2(ranks),
    )  # fmt: skip
    return group


@triton.jit
def row_bound(valid, index, target, rank, top_k, ranks):
    """Rows of a source at each of these ranks by itself, for its valid tokens and its ``source_index``."""
    rows = valid * top_k
    total = rows.to(tl.float64)
    even = total / tl.full((), ranks, tl.float64)
    least = rows // ranks
    whole = (rows + ranks - 1) // ranks
    extra = tl.floor(total * target).to(tl.int64) - ranks * least
    turn = (rank - index * extra) % ranks
    turn = tl.where(turn < 0, turn + ranks, turn)
    rounded = least + (turn < extra).to(tl.int64)
    bound = tl.floor(even * target).to(tl.int64)
    return tl.where((bound < whole) & (target >= 1), rounded, bound)


@triton.jit
def rows_of_ranks(rows, rank_of_expert, rank, num_experts):
    """Assignments of one source, whose rows [E] are given, to each of these ranks."""
    found = rank.to(tl.int64) * 0
    for expert in range(num_experts):
        mine = rank == tl.load(rank_of_expert + expert)
        found += tl.where(mine, tl.load(rows + expert), 0)
    return found


@triton.jit
def shared_bound(bound, asked, group, target, rank, top_k, ranks):
    """Rows of a source at each of these ranks, whose own bound and assignments there are given."""
    here = rank < ranks
    rows = tl.load(group + rank, mask=here, other=0)
    over = tl.load(group + ranks + rank, mask=here, other=0)
    under = tl.load(group + 2 * ranks + rank, mask=here, other=0)
    total = tl.load(group + 3 * ranks + rank, mask=here, other=0) * top_k
    even = total.to(tl.float64) / tl.full((), ranks, tl.float64)
    whole = tl.maximum(tl.floor(even * target).to(tl.int64), (total + ranks - 1) // ranks)
    spare = tl.maximum(whole + over - rows, under)
    left = bound - asked
    need, free = tl.maximum(-left, 0), tl.maximum(left, 0)
    borrowed = tl.minimum(need, need * spare // tl.maximum(over, 1))
    lent = (free * tl.minimum(over, under) + under - 1) // tl.maximum(under, 1)
    return tl.where(target >= 1, bound + tl.where(left < 0, borrowed, -tl.maximum(lent, 0)), bound)


@triton.jit
def _group_rows(
    by_source, source_index, target, rows, rank_of_expert, group,
    top_k, num_experts, sources, ranks, min_tokens, RANKS: tl.constexpr,
):  # fmt: skip
    rank = tl.arange(0, RANKS)
    target = tl.load(target)
    total, over = tl.zeros([RANKS], tl.int64), tl.zeros([RANKS], tl.int64)
    under, tokens = tl.zeros([RANKS], tl.int64), tl.zeros([RANKS], tl.int64)
    for source in range(sources):
        valid = tl.load(by_source + source)
        asked = rows_of_ranks(rows + source * num_experts, rank_of_expert, rank, num_experts)
        left = row_bound(valid, tl.load(source_index + source), target, rank, top_k, ranks) - asked
        plans = valid >= min_tokens
        total += tl.where(plans, asked, 0)
        over += tl.where(plans, tl.maximum(-left, 0), 0)
        under += tl.where(plans, tl.maximum(left, 0), 0)
        tokens += tl.where(plans, valid, 0)
    here = rank < ranks
    tl.store(group + rank, total, mask=here)
    tl.store(group + ranks + rank, over, mask=here)
    tl.store(group + 2 * ranks + rank, under, mask=here)
    tl.store(group + 3 * ranks + rank, tokens, mask=here)
