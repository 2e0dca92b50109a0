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
