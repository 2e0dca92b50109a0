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
        counts.by_source, constants.target_load, counts.rows,
        constants.rank_of_expert, group, top_k, num_experts, sources, ranks, constants.min_tokens,
        RANKS=power_of_2(ranks),
    )  # fmt: skip
    return group


@triton.jit
def own_bound(tokens, target, top_k, ranks):
    """A source's part of the group's bound on each rank's rows."""
    even = (tokens * top_k).to(tl.float64) / tl.full((), ranks, tl.float64)
    return tl.floor(even * target).to(tl.int64)


@triton.jit
def row_bound(tokens, target, top_k, ranks):
    """The bound of a source, or of a group, by itself."""
    bound = own_bound(tokens, target, top_k, ranks)
    return tl.where(target >= 1, tl.maximum(bound, (tokens * top_k + ranks - 1) // ranks), bound)


@triton.jit
def rows_of_ranks(rows, rank_of_expert, rank, num_experts):
    """Assignments of one source, whose rows [E] are given, to each of these ranks."""
    found = rank.to(tl.int64) * 0
    for expert in range(num_experts):
        mine = rank == tl.load(rank_of_expert + expert)
        found += tl.where(mine, tl.load(rows + expert), 0)
    return found


@triton.jit
def shared_bound(valid, sent, group, target, rank, top_k, ranks):
    """Rows of a source at each of these ranks, whose valid tokens and assignments there are given."""
    here = rank < ranks
    rows = tl.load(group + rank, mask=here, other=0)
    over = tl.load(group + ranks + rank, mask=here, other=0)
    under = tl.load(group + 2 * ranks + rank, mask=here, other=0)
    whole = row_bound(tl.load(group + 3 * ranks), target, top_k, ranks)
    own = own_bound(valid, target, top_k, ranks)
    need, free = tl.maximum(sent - own, 0), tl.maximum(own - sent, 0)
    borrowed = tl.minimum(need, need * tl.maximum(whole + over - rows, under) // tl.maximum(over, 1))
    lent = (free * tl.minimum(over, under) + tl.maximum(under - 1, 0)) // tl.maximum(under, 1)
    return tl.where(target >= 1, own + borrowed - lent, own)


@triton.jit
def _group_rows(
    by_source, target, rows, rank_of_expert, group,
    top_k, num_experts, sources, ranks, min_tokens, RANKS: tl.constexpr,
):  # fmt: skip
    rank = tl.arange(0, RANKS)
    target = tl.load(target)
    total, over = tl.zeros([RANKS], tl.int64), tl.zeros([RANKS], tl.int64)
    under, tokens = tl.zeros([RANKS], tl.int64), tl.zeros([RANKS], tl.int64)
    for source in range(sources):
        valid = tl.load(by_source + source)
        sent = rows_of_ranks(rows + source * num_experts, rank_of_expert, rank, num_experts)
        left = own_bound(valid, target, top_k, ranks) - sent
        plans = valid >= min_tokens
        total += tl.where(plans, sent, 0)
        over += tl.where(plans, tl.maximum(-left, 0), 0)
        under += tl.where(plans, tl.maximum(left, 0), 0)
        tokens += tl.where(plans, valid, 0)
    here = rank < ranks
    tl.store(group + rank, total, mask=here)
    tl.store(group + ranks + rank, over, mask=here)
    tl.store(group + 2 * ranks + rank, under, mask=here)
    tl.store(group + 3 * ranks + rank, tokens, mask=here)
