"""Time of an MoE layer by policy and bound, from routings and a cost model.

Shapes: R ranks, E experts; asked [R, E] rows that each source sends to each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from macs import Planner, Recording, Topology

from ..common.cost_model import Breakdown, CostModel, captured
from ..common.workloads import (
    VANILLA,
    Batch,
    Contender,
    Shape,
    draw,
    features,
    replay,
    stream,
)
from .placement import Placement, ideal, least_loaded, moving_ms, replicated

IDEAL = "ideal balance"


BatchOf = Callable[[int, int], Batch]
"""step, source rank -> batch."""


@dataclass(frozen=True)
class Asked:
    """What the sources ask for in a step: rows [R, E]; combine mass kept, rerouted, dropped (in sum 1)."""

    rows: np.ndarray
    mass: np.ndarray


def asked_by(
    shape: Shape,
    chosen: dict[str, Contender],
    batch_of: BatchOf,
    step: int,
    ranks: int,
    seed: int,
    sources: int | None = None,
) -> dict[str, Asked]:
    """What they ask for under every policy; of so many sources, which stand for the others, too."""
    rows: dict[str, list[np.ndarray]] = {title: [] for title in chosen}
    mass = {title: np.zeros(3) for title in chosen}
    planned = ranks if sources is None else min(ranks, sources)
    for number in range(planned):
        rank = number * ranks // planned
        batch = batch_of(step, number)
        # Features only tell visual tokens apart, and do so with fewer.
        hidden = features(batch, min(shape.hidden, 256), step, rank, seed)
        tokens = batch.tokens
        topology = Topology(shape.experts, ranks, sources=(rank,))
        for title, contender in chosen.items():
            planner = Planner(contender.config, topology, shape.top_k, contender.policy)
            found = planner.plan(hidden, batch.experts, batch.weights, batch.scores, tokens).statistics
            rows[title].append(found.load_after.numpy())
            parts = (found.kept_mass, found.rerouted_mass, found.dropped_mass)
            mass[title] += [float(part) for part in parts]
    stands = np.arange(ranks) * planned // ranks
    return {title: Asked(np.stack(rows[title])[stands], mass[title] / mass[title].sum()) for title in chosen}


def simulate(
    shape: Shape,
    ranks: int,
    batch_of: BatchOf,
    chosen: dict[str, Contender],
    model: CostModel,
    steps: int,
    replicas: Sequence[int] = (),
    interval: int = 100,
    bounds: bool = True,
    seed: int = 0,
    sources: int | None = None,
) -> list[dict[str, Any]]:
    """Mean layer time of every policy and bound over the steps, in ms, and the parts of it.

    sources: draw and plan no more ranks' tokens than these; the other ranks have the same again.
    """
    times: dict[str, list[Breakdown]] = {}
    largest: dict[str, list[float]] = {}
    masses: dict[str, list[np.ndarray]] = {}
    extra: dict[str, Placement] = {}
    replayed: dict[str, float] = {}
    mean = shape.tokens * shape.top_k
    before = np.zeros(shape.experts)
    placed: dict[str, Placement] = {}
    for step in range(steps):
        asked = asked_by(shape, chosen, batch_of, step, ranks, seed, sources)
        for title, one in asked.items():
            planning = model.planning_ms(title, shape.tokens)
            replayed[title] = captured(model).planning_ms(title, shape.tokens) - planning
            times.setdefault(title, []).append(model.layer(one.rows, planning))
            largest.setdefault(title, []).append(float(one.rows.sum(0).reshape(ranks, -1).sum(1).max()))
            masses.setdefault(title, []).append(one.mass)
        vanilla = asked[VANILLA].rows
        if not bounds:
            continue
        loads = vanilla.sum(0).astype(float)
        if step % interval == 0:
            if step == 0:
                # By what the experts have in another step of the same traffic.
                other = asked_by(shape, {VANILLA: chosen[VANILLA]}, batch_of, steps, ranks, seed, sources)[
                    VANILLA
                ]
                before = other.rows.sum(0).astype(float)
            for count in replicas:
                title = f"EPLB, {count} replica{'s' * (count > 1)} a rank"
                placed[title] = replicated(before, ranks, count, model.expert_bytes, interval)
        placed["least-loaded EP"] = least_loaded(loads, ranks, model.expert_bytes)
        for title, placement in placed.items():
            moving = moving_ms(model, placement)
            times.setdefault(title, []).append(model.layer(vanilla, 0.0, placement.share, moving))
            largest.setdefault(title, []).append(float((loads @ placement.share).max()))
            worst = extra.get(title, placement)
            extra[title] = replace(
                placement,
                memory=max(worst.memory, placement.memory),
                moved=max(worst.moved, placement.moved),
            )
        times.setdefault(IDEAL, []).append(ideal(model, vanilla))
        largest.setdefault(IDEAL, []).append(loads.sum() / ranks)
        before = loads
    base = float(np.mean([one.total for one in times[VANILLA]]))
    best = float(np.mean([one.total for one in times[IDEAL]])) if bounds else 0.0
    rows = []
    for title, parts in times.items():
        total = float(np.mean([one.total for one in parts]))
        row = {
            "ranks": ranks,
            "policy": title,
            "ms": total,
            "ratio": total / base,
            "captured": (total + replayed.get(title, 0.0)) / base,
            "load": float(np.mean(largest[title])) / mean,
            **{
                part: float(np.mean([getattr(one, part) for one in parts]))
                for part in ("source", "planner", "exchange", "experts")
            },
        }
        if bounds and base > best:
            row["won_back"] = (base - total) / (base - best)
        if title in masses:
            names = ("kept_mass", "rerouted_mass", "dropped_mass")
            row |= dict(zip(names, np.mean(masses[title], axis=0).tolist(), strict=True))
        if title in extra:
            row |= {"extra_bytes": extra[title].memory, "moved_bytes": extra[title].moved}
        rows.append(row)
    return rows


def synthetic(workload: str, shape: Shape, ranks: int, seed: int) -> BatchOf:
    return lambda step, rank: draw(workload, shape, step, rank, ranks, seed)


LEAST_TOKENS = 64
"""Of a rank, in a recorded step that tokens are drawn from, where there is one."""


def resampled(recordings: Sequence[Recording], layer: int, shape: Shape, seed: int) -> tuple[Shape, BatchOf]:
    """Recorded traffic for any number of ranks: each source draws its tokens, with replacement, from those
    of one recorded rank and step."""
    steps = replay(recordings, layer)
    # A trace has decoding steps, too, which nobody plans.
    steps = [row for row in steps if min(len(one.ids) for one in row) >= LEAST_TOKENS] or steps
    shape = replace(shape, experts=recordings[0].num_experts, top_k=recordings[0].top_k)

    def batch_of(step: int, rank: int) -> Batch:
        row = steps[step % len(steps)]
        own = row[rank % len(row)]
        count = len(own.ids)
        taken = torch.randint(count, (shape.tokens,), generator=stream("resampled", seed, step, rank))
        return Batch(*(getattr(own, name)[taken] for name in ("experts", "weights", "scores", "ids")))

    return shape, batch_of
