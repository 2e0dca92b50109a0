"""The search for a split: from measurements of one layer at a time, refined and verified by measuring it.

Shapes: L layers, Q requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

UNBOUNDED = 1e3
"""A bound that nothing reaches."""

GRID = (1.05, 0.8, 0.6, 0.45, 0.3)
"""Bounds at which every layer is measured by itself."""

STEP = 0.05
"""A split is made in steps of this load of a layer."""

CAP = 98.0
"""Percentile of the uniform split's kls at which kls are capped while splits are compared: the tail
is a matter of few requests, and would decide otherwise."""


@dataclass(frozen=True)
class Measured:
    """loads [L], one a layer; kl [Q]: KL in nats; same
    bool [Q]: whether the answer is the one that the model gives without a bound."""

    loads: np.ndarray
    kl: np.ndarray
    same: np.ndarray


Measure = Callable[[Sequence[float]], Measured]
"""Bounds of the layers -> what they do to the requests."""


def singles(measure: Measure, natural: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every layer bounded alone: its loads, rising, and the mean kl at each; 0 at its natural load."""
    found = []
    for layer in range(len(natural)):
        points = [(float(natural[layer]), 0.0)]
        for bound in GRID:
            if bound < natural[layer]:
                bounds = [UNBOUNDED] * len(natural)
                bounds[layer] = bound
                one = measure(bounds)
                points.append((float(one.loads[layer]), float(one.kl.mean())))
        points.sort()
        loads, kls = np.array(points).T
        # Less load is never less kl; where it was measured so, that is noise.
        found.append((loads, np.maximum.accumulate(kls[::-1])[::-1]))
    return found


def split_by(curves: Sequence[tuple[np.ndarray, np.ndarray]], target: float) -> list[float]:
    """Bounds of mean load ``target`` of least KL if those of single layers add up: the load is taken
    away step by step, where the next step costs least."""
    loads = [float(curve[0][-1]) for curve in curves]
    least = [float(curve[0][0]) for curve in curves]

    def more(layer: int) -> float:
        """What a step of this layer costs, over what it saves."""
        known, kls = curves[layer]
        here, there = np.interp((loads[layer], loads[layer] - STEP), known, kls)
        return float(there - here)

    while np.mean(loads) > target:
        open_to = [layer for layer in range(len(loads)) if loads[layer] - STEP >= min(least[layer], target)]
        if not open_to:
            return [target] * len(loads)
        layer = min(open_to, key=lambda one: (more(one), -loads[one]))
        loads[layer] -= min(STEP, len(loads) * (np.mean(loads) - target) + 1e-12)
    return loads


def cap_of(one: Measured) -> float:
    """The kl at which those of other splits are capped."""
    return max(float(np.percentile(one.kl, CAP)), 1e-9)


def objective(one: Measured, cap: float) -> float:
    """What splits are compared by: mean kl, each request's at most ``cap``."""
    return float(np.minimum(one.kl, cap).mean())


def refined(measure: Measure, bounds: list[float], cap: float, tries: int) -> tuple[list[float], Measured]:
    """The best of ``bounds`` and of what moves of load between two layers make of it, as measured."""
    best, held = list(bounds), measure(bounds)
    size, count = 4 * STEP, 0
    while size >= STEP and count < tries:
        moved = False
        pairs = [(i, j) for i in range(len(best)) for j in range(len(best)) if i != j]
        for giver, taker in pairs:
            if count >= tries or best[giver] - size < STEP or best[taker] >= held.loads[taker] + size:
                continue
            trial = list(best)
            trial[giver] -= size
            trial[taker] = min(best[taker], float(held.loads[taker])) + size
            found, count = measure(trial), count + 1
            if found.loads.mean() <= held.loads.mean() + 1e-3 and objective(found, cap) < objective(
                held, cap
            ):
                best, held, moved = trial, found, True
        if not moved:
            size /= 2
    return best, held
