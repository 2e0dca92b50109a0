"""Means and their intervals, by bootstrap over questions."""

from __future__ import annotations

import numpy as np


def bootstrap(values: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """Mean of values [N], and the bounds of its 95 % interval."""
    return bootstrap_ratio(values, np.ones(len(values)), draws)


def bootstrap_ratio(values: np.ndarray, others: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """Mean of values [N] over the mean of others [N] of the same questions, and its 95 % interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(values), size=(draws, len(values)))
    ratios = values[drawn].mean(1) / np.maximum(others[drawn].mean(1), 1e-300)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(values.mean() / max(others.mean(), 1e-300)), float(low), float(high)
