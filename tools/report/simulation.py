"""Time of a MoE layer by policy and balancer, from routings and a cost model.

Shapes: R ranks, E experts; requested [R, E] rows that each source sends to each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from macs import Modality, Planner, Recording, Topology

from ..common.cost_model import Breakdown, CostModel
from ..common.workloads import VANILLA, Batch, Contender, Shape, features, replay, stream
from .placement import ideal, least_loaded, moving_ms, replicated

EPLB = "EPLB, 1 replica"
IDEAL = "ideal balance"
LEAST_LOADED = "least-loaded EP"
LEAST_TOKENS = 64
"""Tokens of a rank below which a recorded step is small, as in decoding; used only if there is no larger."""

BatchOf = Callable[[int, int], Batch]
"""(step, source rank) -> batch."""


@dataclass(frozen=True)
class Requested:
    """rows [R, E] that the sources send in a step; mass [3]: combine weight kept, rerouted, dropped; shared:
    whether the ranks share a bound."""

    rows: np.ndarray
    mass: np.ndarray
    shared: bool


def moves_weights(title: str) -> bool:
    """Whether a row is of a balancer, which moves weights and changes no answer, and not of a policy."""
    return title in (EPLB, IDEAL, LEAST_LOADED)


def requested_by(
    shape: Shape,
    chosen: dict[str, Contender],
    batch_of: BatchOf,
    step: int,
    ranks: int,
    sources: int | None = None,
) -> dict[str, Requested]:
    """What the ranks send under every policy. At most ``sources`` ranks are planned; the rest repeat them."""
    planned = ranks if sources is None else min(ranks, sources)
    own = [number * ranks // planned for number in range(planned)]
    batches = [batch_of(step, number) for number in range(planned)]
    # Features only tell visual tokens apart, and do so with fewer dimensions.
    size = min(shape.hidden, 256)
    hidden = torch.cat([features(batch, size, step, rank) for batch, rank in zip(batches, own, strict=True)])
    experts, weights, scores = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("experts", "weights", "scores")
    )
    tokens = Modality.of(torch.stack([batch.ids for batch in batches])).tokens(sources=planned)
    topology = Topology(shape.experts, ranks, sources=tuple(own))
    planned_by = np.arange(ranks) * planned // ranks
    found = {}
    for title, contender in chosen.items():
        planner = Planner(contender.config, topology, shape.top_k, contender.policy)
        plan = planner.plan(hidden, experts, weights, scores, tokens)
        expert = torch.where(plan.experts < 0, shape.experts, plan.experts)
        cell = expert + (shape.experts + 1) * tokens.source[:, None]
        rows = torch.bincount(cell.flatten(), minlength=planned * (shape.experts + 1)).view(planned, -1)
        numbers = plan.statistics
        mass = np.array(
            [float(part) for part in (numbers.kept_mass, numbers.rerouted_mass, numbers.dropped_mass)]
        )
        found[title] = Requested(rows[planned_by, :-1].numpy(), mass / mass.sum(), planner.shares_bound)
    return found


def simulate(
    shape: Shape,
    ranks: int,
    batch_of: BatchOf,
    chosen: dict[str, Contender],
    model: CostModel,
    sources: int | None = None,
) -> list[dict[str, Any]]:
    """Layer time of every policy and balancer in step 0, one row each, times in ms.

    EPLB's replicas, one a rank, are placed by the loads of step 1. At most ``sources`` ranks are planned; the
    rest repeat them.
    """
    requested = requested_by(shape, chosen, batch_of, 0, ranks, sources)
    vanilla = requested[VANILLA].rows
    loads = vanilla.sum(0).astype(float)
    mean = loads.sum() / ranks
    tokens = shape.tokens
    base = model.layer(vanilla, tokens=tokens).total

    def row(title: str, time: Breakdown, busiest: float) -> dict[str, Any]:
        found = {"ranks": ranks, "policy": title, "ms": time.total, "ratio": time.total / base}
        return found | {"load": busiest / mean}

    rows = []
    for title, one in requested.items():
        planning = model.planning_ms(title, tokens) + one.shared * model.sharing_ms
        busiest = one.rows.sum(0).reshape(ranks, -1).sum(1).max()
        masses = dict(zip(("kept_mass", "rerouted_mass", "dropped_mass"), one.mass.tolist(), strict=True))
        time = model.layer(one.rows, planning, tokens=tokens)
        rows.append(row(title, time, float(busiest)) | masses)
    other = requested_by(shape, {VANILLA: chosen[VANILLA]}, batch_of, 1, ranks, sources)
    before = other[VANILLA].rows.sum(0).astype(float)
    for title, placement in (
        (EPLB, replicated(before, ranks, 1, model.expert_bytes)),
        (LEAST_LOADED, least_loaded(loads, ranks, model.expert_bytes)),
    ):
        time = model.layer(vanilla, 0.0, placement.share, moving_ms(model, placement), tokens)
        busiest = float((loads @ placement.share).max())
        rows.append(row(title, time, busiest) | {"extra_bytes": placement.memory})
    rows.append(row(IDEAL, ideal(model, vanilla, tokens), mean))
    return rows


def resampled(recordings: Sequence[Recording], layer: int, shape: Shape) -> tuple[Shape, BatchOf]:
    """Recorded traffic for any number of ranks: each source draws its tokens, with replacement, from those
    of one recorded rank and step."""
    steps = replay(recordings, layer)
    # A trace has decoding steps, too, which are not planned.
    steps = [row for row in steps if min(len(one.ids) for one in row) >= LEAST_TOKENS] or steps
    shape = replace(shape, experts=recordings[0].num_experts, top_k=recordings[0].top_k)

    def batch_of(step: int, rank: int) -> Batch:
        row = steps[step % len(steps)]
        own = row[rank % len(row)]
        taken = torch.randint(len(own.ids), (shape.tokens,), generator=stream("resampled", 0, step, rank))
        return Batch(*(getattr(own, name)[taken] for name in ("experts", "weights", "scores", "ids")))

    return shape, batch_of
