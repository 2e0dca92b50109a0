"""Fixed-point numbers, so that a plan is the same on every rank, device and engine.

Floating-point sums depend on the order of addition. Weights, priorities and capacities are therefore
quantised to integers before they are added or compared. Where floats have to be summed first, they are
summed in float64 and the result is quantised.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 1 << 16
"""The weight of one whole token; capacities and costs are counted in 1/65536 of a token."""

PRIORITY_BITS = 24
"""Priorities are integers from 0 to 2 ** 24."""

MASS_UNIT = 1 << 20
"""Combine weights are counted in 1/1048576 where shares of them are compared."""

VALUE_UNIT = 1 << 18
"""Moments of entropy and distinctness are quantised to 1/262144."""


def to_fixed(values: Tensor, unit: int) -> Tensor:
    """Nearest integer count of ``1 / unit``, int64; NaN counts as 0."""
    return torch.nan_to_num(values.double() * unit, nan=0.0).round().long()
