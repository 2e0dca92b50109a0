"""Bounds on the rows of a rank: each source's own, and the group's.

A source with rows to spare at a rank lends them to sources that are over their bound there. Otherwise a
source would drop rows although the rank is within ``target_load`` over all sources, as where one source has
pictures and another has text. Below a target of 1 nothing is lent: every source keeps to its own bound.

Shapes: S sources, E experts, R ranks.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from .contracts import Counts, LayerConstants
from .kernels.dispatch import kernels_enabled


def row_bound(tokens: Tensor, constants: LayerConstants, top_k: int) -> Tensor:
    """Rows that a source may send to a rank by itself, floor(target T k / R): int64 [S, R].

    tokens int64 [S]: valid tokens of each source. With a target of 1 or more it covers the even share
    T k / R rounded up, so that an even routing loses nothing.
    """
    bound = own_bound(tokens, constants, top_k)
    even = (tokens[:, None] * top_k + constants.ranks - 1) // constants.ranks
    return torch.where(constants.target_load >= 1, torch.maximum(bound, even), bound)


def own_bound(tokens: Tensor, constants: LayerConstants, top_k: int) -> Tensor:
    """``row_bound`` before rounding up: a source's part of the group's bound, int64 [S, R]."""
    even = (tokens * top_k).double() / constants.ranks
    return (even * constants.target_load).floor().long()[:, None].expand(-1, constants.ranks)


class GroupField(IntEnum):
    """Rows of ``group_rows``, each a sum over the sources that plan."""

    ROWS = 0  # assignments to the rank
    OVER = 1  # those beyond the sources' own bounds
    UNDER = 2  # rows that the sources' own bounds leave
    TOKENS = 3  # valid tokens, the same for every rank


def group_rows(counts: Counts, constants: LayerConstants, top_k: int) -> Tensor:
    """Sums over this process's sources, ``GroupField`` by rank, to be summed over the group.

    Args:
        counts: tokens by source, rows by source and expert.
        constants: ``target_load``, and the rank of each expert.
        top_k: k.

    Returns:
        int64 [4, R]; a source that does not plan is not in it.
    """
    if kernels_enabled(counts.device):
        from .kernels import bounds as kernels

        return kernels.group_rows(counts, constants, top_k)
    active = (counts.tokens >= constants.min_tokens).long()[:, None]
    rows = rows_of_ranks(counts, constants)
    left = own_bound(counts.tokens, constants, top_k) - rows
    tokens = counts.tokens[:, None].expand_as(rows)
    each = torch.stack([rows, (-left).clamp(min=0), left.clamp(min=0), tokens])
    return (each * active).sum(1)


def rows_of_ranks(counts: Counts, constants: LayerConstants) -> Tensor:
    """Assignments of each source to each rank, int64 [S, R]."""
    rows = counts.rows
    return rows.new_zeros(len(rows), constants.ranks).index_add_(1, constants.rank_of_expert, rows)


def shared_bound(counts: Counts, constants: LayerConstants, group: Tensor, top_k: int) -> Tensor:
    """Rows of each source at each rank, int64 [S, R], under the group's bound; for a target below 1, the
    source's own.

    group int64 [4, R]: ``group_rows`` of all sources. The group's bound is the ``row_bound`` of all their
    tokens. What it leaves is divided among the sources that are over, in proportion, rounded down; and taken
    from those that are under, in proportion, rounded up. So a rank within the group's bound drops nothing,
    and the sources together stay within it, or within the sum of their own bounds where rounding makes that
    one row more.
    """
    own = own_bound(counts.tokens, constants, top_k)
    left = own - rows_of_ranks(counts, constants)
    rows, over, under, tokens = group.unbind()
    whole = row_bound(tokens[:1], constants, top_k)[0]
    spare = torch.maximum(whole + over - rows, under)
    borrowed = torch.minimum(-left, -left * spare // over.clamp(min=1))
    lent = (left * torch.minimum(over, under) + under - 1) // under.clamp(min=1)
    shared = own + torch.where(left < 0, borrowed, -lent.clamp(min=0))
    return torch.where(constants.target_load >= 1, shared, own)
