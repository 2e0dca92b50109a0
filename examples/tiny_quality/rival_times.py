"""Time of prefills on this machine, in one process, under pruning and under MACS."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from macs_tools.common.answers import read

from .rivals import Comparison, Rival

CHOSEN = (
    Rival(),
    *(Rival("tower attention", keep) for keep in (0.75, 0.5, 0.25)),
    *(Rival(target=target) for target in (1.05, 0.6, 0.4)),
    Rival("tower attention", 0.5, 0.4),
)
"""Pruning after a layer only hides tokens here, and takes the time of all of them."""


def seconds(comparison: Comparison, chosen: Sequence[Rival], turns: int = 15) -> dict[str, list[float]]:
    """Of the first batch, one rival after the other in every turn."""
    inputs = comparison.inputs_of(comparison.scorer.halves["tune"][0].prompts)
    runtime = comparison.scorer.runtime
    found: dict[str, list[float]] = {rival.title: [] for rival in chosen}
    for _ in range(turns):
        for rival in chosen:
            runtime.use(*comparison.use(rival))
            for counted in (False, True):  # the first makes the planners
                started = time.perf_counter()
                with comparison.reading(rival, 0, inputs) as pruned:
                    read(comparison.model, runtime, pruned)
                if counted:
                    found[rival.title].append(time.perf_counter() - started)
    return found


def show_times(comparison: Comparison, console: Console) -> None:
    """Print each over the time of the model as it is, median of the turns."""
    found = seconds(comparison, CHOSEN)
    stock = np.array(found[CHOSEN[0].title])
    for title, each in found.items():
        ratio = np.median(np.array(each) / stock)
        console.print(f"{title}: {ratio:.2f} of the time as it is, {1e3 * np.median(each):.0f} ms")
