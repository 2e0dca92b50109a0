"""What recorded traffic is like: loads by layer, expert, modality, rank and time.

Shapes: S steps, L layers, E experts, R ranks, M records, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from macs import TEXT, Recording

from .simulation import LEAST_TOKENS

PERCENTILES = 50, 95, 99


@dataclass(frozen=True)
class Traffic:
    """loads [2, L, E]: assignments of text and of visual tokens. by_rank [L, R]: rows of each rank, all steps
    together. load [S, L], NaN where a layer has no record. tokens
    [S]: of a source rank in a step. small: steps of fewer than ``LEAST_TOKENS``, as in decoding, left out
    where there are larger ones."""

    experts: int
    top_k: int
    ranks: int
    sources: int
    loads: np.ndarray
    by_rank: np.ndarray
    load: np.ndarray
    tokens: np.ndarray
    small: int

    @property
    def layers(self) -> int:
        return self.loads.shape[1]

    @property
    def steps(self) -> int:
        return len(self.load)

    @property
    def visual_share(self) -> float:
        """Of all assignments."""
        return float(self.loads[1].sum() / self.loads.sum())

    def percentiles(self) -> np.ndarray:
        """Of the load over steps, by layer: [3, L]."""
        return np.nanpercentile(self.load, PERCENTILES, axis=0)

    @property
    def typical(self) -> float:
        """The load of the median step, mean over layers."""
        return float(self.percentiles()[0].mean())

    def over_time(self, bins: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First steps of at most so many bins, and the load's mean and maximum over steps and layers."""
        edges = np.unique(np.linspace(0, self.steps, min(bins, self.steps) + 1).astype(int))
        parts = [self.load[low:high] for low, high in pairwise(edges)]
        return (
            edges[:-1],
            np.array([np.nanmean(part) for part in parts]),
            np.array([np.nanmax(part) for part in parts]),
        )


def default_ranks(recordings: Sequence[Recording]) -> int:
    """Those of the run; of a run on one, the largest number up to 8 that divides the experts."""
    first = recordings[0]
    if first.num_ranks > 1:
        return first.num_ranks
    return max(count for count in range(1, 9) if first.num_experts % count == 0)


def measured(recordings: Sequence[Recording], ranks: int) -> Traffic:
    """The traffic of a run whose ranks recorded these, its experts on so many ranks, neighbours together.

    Raises:
        ValueError: the ranks do not divide the experts.
    """
    experts, top_k = recordings[0].num_experts, recordings[0].top_k
    if ranks < 1 or experts % ranks:
        raise ValueError(f"--ranks: found {ranks}, expected a divisor of the {experts} experts")
    layers = 1 + max(int(one.tensors["layers"].max()) for one in recordings)
    steps = np.unique(np.concatenate([one.tensors["steps"].numpy() for one in recordings]))
    loads = np.zeros((layers, 2, experts), dtype=np.int64)
    rows = np.zeros((len(steps) * layers, ranks), dtype=np.int64)
    tokens = np.zeros(len(steps) * layers, dtype=np.int64)
    for one in recordings:
        counts, layer = one.tensors["counts"].numpy(), one.tensors["layers"].numpy().astype(np.int64)
        chosen, kinds = one.tensors["experts"].numpy(), one.tensors["modality"].numpy()
        place = np.searchsorted(steps, one.tensors["steps"].numpy()) * layers + layer
        tokens += np.bincount(place, counts, len(tokens)).astype(np.int64)
        ends = np.cumsum(counts)[:-1]
        parts = zip(layer, place, np.split(chosen, ends), np.split(kinds, ends), strict=True)
        for at, spot, expert, kind in parts:  # of a record, by modality and expert: all else is sums of it
            cell = expert + experts * (kind != TEXT)[:, None]
            found = np.bincount(cell[expert >= 0], minlength=2 * experts).reshape(2, experts)
            loads[at] += found
            rows[spot] += found.sum(0).reshape(ranks, -1).sum(1)
    of_step = tokens.reshape(len(steps), layers).max(1) / len(recordings)
    large = of_step >= LEAST_TOKENS
    if not large.any():
        large = np.ones_like(large)
    kept = rows.reshape(len(steps), layers, ranks)[large]
    mean = kept.sum(2) / ranks
    with np.errstate(invalid="ignore"):
        load = np.where(mean > 0, kept.max(2) / mean, np.nan)
    return Traffic(
        experts,
        top_k,
        ranks,
        len(recordings),
        loads.transpose(1, 0, 2),
        kept.sum(0),
        load,
        of_step[large],
        int((~large).sum()),
    )
