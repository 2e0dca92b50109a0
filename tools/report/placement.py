"""Bounds that move weights instead of tokens: where the rows of an expert are computed instead.

Shapes: R ranks, E experts; share [E, R]: what part of an expert's rows is computed on which rank.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from ..common.cost_model import Breakdown, CostModel, at_home

INTERVAL = 100
"""Steps between two placements of EPLB."""


@dataclass(frozen=True)
class Placement:
    """share [E, R]; extra bytes a rank keeps; bytes a rank receives or sends for them in a step, at most."""

    share: np.ndarray
    memory: float = 0.0
    moved: float = 0.0


def replicated(loads: np.ndarray, ranks: int, replicas: int, expert_bytes: int) -> Placement:
    """As EPLB: ``replicas`` more experts on every rank. The busiest expert is copied, again and again, until
    all slots are taken; then the busiest copies go first, each to the idlest rank with a slot.

    loads [E]: what is known when experts are placed. All experts move, once in ``INTERVAL`` steps.
    """
    experts = len(loads)
    copies = np.ones(experts, dtype=int)
    queue = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(queue)
    for _ in range(replicas * ranks):
        _, expert = heapq.heappop(queue)
        copies[expert] += 1
        heapq.heappush(queue, (-loads[expert] / copies[expert], expert))
    slots = experts // ranks + replicas
    share = np.zeros((experts, ranks))
    ranks_by_load = [(0.0, rank, 0) for rank in range(ranks)]
    for expert in np.argsort(-loads / copies, kind="stable"):
        for _ in range(copies[expert]):
            load, rank, taken = heapq.heappop(ranks_by_load)
            share[expert, rank] += 1 / copies[expert]
            if taken + 1 < slots:
                entry = load + loads[expert] / copies[expert], rank, taken + 1
                heapq.heappush(ranks_by_load, entry)
    return Placement(share, replicas * expert_bytes, slots * expert_bytes / INTERVAL)


def least_loaded(loads: np.ndarray, ranks: int, expert_bytes: int) -> Placement:
    """Ranks with more rows than the mean hand the rest to the idlest, biggest expert first, weights with
    them; every step anew."""
    experts = len(loads)
    share = at_home(experts, ranks)
    rows = loads @ share
    mean = rows.mean()
    taken, given = np.zeros(ranks, dtype=int), np.zeros(ranks, dtype=int)
    for rank in np.argsort(-rows):
        mine = np.flatnonzero(share[:, rank] == 1)
        for expert in mine[np.argsort(-loads[mine])]:
            while rows[rank] > mean + 1 and share[expert, rank] * loads[expert] > 1:
                idlest = int(rows.argmin())
                part = min(rows[rank] - mean, mean - rows[idlest], share[expert, rank] * loads[expert])
                if part < 1:
                    break
                share[expert, rank] -= part / loads[expert]
                share[expert, idlest] += part / loads[expert]
                rows[rank] -= part
                rows[idlest] += part
                taken[idlest] += 1
                given[rank] += 1
    rounding = (share * loads[:, None] < 0.5) & (loads[:, None] >= 1)
    share[rounding] = 0.0
    most = max(int(taken.max()), int(given.max()))
    return Placement(share, int(taken.max()) * expert_bytes, most * expert_bytes)


def moving_ms(model: CostModel, placement: Placement) -> float:
    """For the weights that go with a placement, over the slower network."""
    return placement.moved / min(model.inside_gbs, model.beyond_gbs) / 1e6


def ideal(model: CostModel, requested: np.ndarray, tokens: int) -> Breakdown:
    """The same rows of so many tokens a source, even over sources, ranks and experts."""
    return model.layer(np.full(requested.shape, requested.sum() / requested.size), tokens=tokens)
