"""Fixed-point numbers: what makes a plan the same on every rank, device and engine.

Floating-point sums depend on the order of addition; integer sums do not. So weights, priorities,
capacities and entropies become integers before anything is added or compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 1 << 16
"""One whole token's weight; capacities and loads are counted in 1/65536 of a token."""

PRIORITY_BITS = 24
"""Priorities are integers from 0 to 2 ** 24."""

MASS_UNIT = 1 << 20
"""Combine weights, where shares of them are compared, are counted in 1/1048576."""

ENTROPY_UNIT = 1 << 18
"""Entropies are counted in 1/262144 nat: fine enough to tell a spread of 1e-5 nats from none,
coarse enough that squares of a million of them fit 63 bits."""


def to_fixed(values: Tensor, unit: int) -> Tensor:
    """Nearest integer count of ``1 / unit``, int64; NaN counts as 0."""
    return torch.nan_to_num(values.double() * unit, nan=0.0).round().long()


def apportion(total: Tensor, claims: Tensor) -> Tensor:
    """Divide whole totals among claimants by largest remainder, exactly.

    total [P], claims [S, P], int64 >= 0 -> shares [S, P], int64, that sum to ``total`` over S (to 0
    where nobody claims). Ties go to the lower claimant.
    """
    claimed = claims.sum(0)
    divisor = claimed.clamp(min=1)
    # total * claims / claimed in integers: the product may pass 63 bits, so the quotient comes from
    # float64 (at most one off) and the remainder from wrapping int64 arithmetic, which is exact
    # because the remainder itself is small.
    share = (total.double() * claims.double() / divisor.double()).floor().long()
    remainder = total * claims - share * divisor
    correction = torch.where(remainder < 0, -1, 0) + torch.where(remainder >= divisor, 1, 0)
    share = share + correction
    remainder = remainder - correction * divisor
    left = torch.where(claimed > 0, total - share.sum(0), 0)
    order = torch.sort(remainder, dim=0, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(claims), device=claims.device)[:, None].expand_as(order)
    )
    return torch.where(claimed > 0, share, 0) + (place < left).long()
