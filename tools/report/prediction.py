"""What policies and balancers would do to recorded traffic, on clusters of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from macs import Profile, Recording

from ..common.cost_model import CostModel, break_even
from ..common.workloads import VANILLA, Contender, Shape, contenders, loosened
from .simulation import LEAST_TOKENS, resampled, simulate
from .traffic import Traffic

BALANCED = 1.05
TARGETS = BALANCED, 0.8, 0.6
STEPS, SOURCES = 2, 32
"""Recorded steps that a layer's prediction uses: the first is planned, for at most SOURCES ranks, which the
others repeat; by the second EPLB places its replicas."""

BASELINES = "token drop", "rank-balanced"


@dataclass(frozen=True)
class Prediction:
    """rows: one for each EP size and policy, as ``simulate`` returns them, means over the sampled layers.
    layers: which they are. explained: by modality, the share of each layer's routed output that the profile's
    compensation explains, if it has one. pays_from: tokens of a rank from which a plan pays by balance
    alone, at each EP size, if any. targets: KL in nats that the profile's tuning verified, by target."""

    rows: list[dict[str, Any]]
    sizes: list[int]
    layers: list[int]
    pays_from: dict[int, int | None]
    targets: dict[float, float]
    model: CostModel
    shape: Shape
    explained: dict[str, list[float]]

    def of(self, size: int, policy: str) -> dict[str, Any]:
        return next(row for row in self.rows if (row["ranks"], row["policy"]) == (size, policy))

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(row["policy"] for row in self.rows))


def sizes_for(experts: int, wanted: Sequence[int] = (8, 32, 128, 512)) -> list[int]:
    """Cluster sizes that divide the experts; of few experts, what there is."""
    found = [size for size in wanted if experts % size == 0]
    return found or [max(size for size in range(1, experts + 1) if experts % size == 0 and size <= 8)]


def sampled_layers(traffic: Traffic) -> list[int]:
    """The layer in the middle by its median load, and the worst one."""
    order = np.argsort(traffic.percentiles()[0])
    return sorted({int(order[len(order) // 2]), int(order[-1])})


def drawn_from(recordings: Sequence[Recording], layer: int) -> list[Recording]:
    """Some steps of a layer that all ranks recorded, large ones where there are, from all over the run."""

    def common(least: int) -> torch.Tensor:
        """The steps in which every rank has so many tokens."""
        found = None
        for one in recordings:
            tensors = one.tensors
            steps = tensors["steps"][(tensors["layers"] == layer) & (tensors["counts"] >= least)].unique()
            found = steps if found is None else found[torch.isin(found, steps)]
        assert found is not None
        return found

    steps = common(LEAST_TOKENS)
    steps = steps if len(steps) else common(1)
    if not len(steps):
        raise ValueError(f"recordings: layer {layer} has no step that all {len(recordings)} files have")
    chosen = steps[torch.linspace(0, len(steps) - 1, min(STEPS, len(steps))).long()]
    return [
        one.part((one.tensors["layers"] == layer) & torch.isin(one.tensors["steps"], chosen))
        for one in recordings
    ]


def predict(
    recordings: Sequence[Recording],
    traffic: Traffic,
    profile: Profile | None,
    model: CostModel,
    shape: Shape,
    sizes: Sequence[int],
    targets: Sequence[float] = TARGETS,
) -> Prediction:
    """Plan tokens drawn from the recording, by vanilla, ``BASELINES`` and MACS at every target, for clusters
    of these sizes."""
    tuning = None if profile is None else profile.tuning
    verified: dict[float, float] = {}
    if tuning is not None:
        verified = dict(zip(tuning.target_loads.tolist(), tuning.kl[:, 0].tolist(), strict=True))
    if tuning is not None and tuning.layer_loads.shape[1] != traffic.layers:
        raise ValueError(
            f"--profile: found a tuning of {tuning.layer_loads.shape[1]} layers, the recording has "
            f"{traffic.layers}"
        )
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    layers = sampled_layers(traffic)
    for layer in layers:
        own, batch_of = resampled(drawn_from(recordings, layer), layer, shape)
        known = contenders(BALANCED)
        chosen: dict[str, Contender] = {title: known[title] for title in (VANILLA, *BASELINES)}
        for target in sorted({BALANCED, *targets}, reverse=True):
            title, one = loosened("macs", known["macs"], target)
            chosen[title] = one
            if tuning is not None:
                at = tuning.layer_loads_at(target)
                if at is not None:
                    split = one.config.updated(target_load=float(at[0][layer]))
                    chosen[f"{title} tuned"] = replace(one, config=split)
        for size in sizes:
            for row in simulate(own, size, batch_of, chosen, model, SOURCES):
                found.setdefault((size, row["policy"]), []).append(row)
    rows = []
    for (size, policy), each in found.items():
        numbers = {name for row in each for name, value in row.items() if name not in ("ranks", "policy")}
        rows.append(
            {"ranks": size, "policy": policy}
            | {name: float(np.mean([row[name] for row in each if name in row])) for name in numbers}
        )
    pays = {
        size: break_even(model, shape, size, traffic.typical)
        for size in sizes
        if traffic.typical > BALANCED and size > 1
    }
    estimates = None if profile is None else profile.compensation
    shares = [] if estimates is None else estimates.explained.T.tolist()
    explained = dict(zip(("text", "visual"), shares, strict=False))
    return Prediction(rows, list(sizes), layers, pays, verified, model, shape, explained)
