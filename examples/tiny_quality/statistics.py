"""The figures of a point, with intervals over questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tiny_vlm import data
from torch import Tensor

from macs import POLICIES
from macs_tools.common.answers import divergence
from macs_tools.common.intervals import bootstrap

from .points import Point


@dataclass
class Answers:
    """What a policy made of the questions, in their order."""

    ids: list[list[int]] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)
    """Log-probabilities [A, V] that predict the tokens of the answers vanilla gives."""


def measured(
    point: Point,
    asked: Sequence[data.Sample],
    under: tuple[Answers, list[Any]],
    stock: tuple[Answers, list[Any]],
) -> dict[str, Any]:
    """The figures of a point, from its answers and reports and vanilla's; KL as (mean, low, high) in nats.
    Intervals are over questions, which the plan of a batch ties to each other a little."""
    (found, reports), (vanilla, untouched) = under, stock
    right = np.array([ids == sample.answer for ids, sample in zip(found.ids, asked, strict=True)])
    expected_right = np.array([ids == one.answer for ids, one in zip(vanilla.ids, asked, strict=True)])
    same = np.array([ids == other for ids, other in zip(found.ids, vanilla.ids, strict=True)])
    kl = np.array([divergence(*pair) for pair in zip(vanilla.said, found.said, strict=True)])
    after = torch.stack([report.load("after") for report in reports])  # [L, N]
    # Vanilla's own: before planning a layer has what the plans of those before it made of its input.
    before = torch.stack([report.load("before") for report in untouched])
    own = point.config.split == "uniform" and point.config.compensation == "tuned"
    return {
        "title": point.title,
        "baseline": POLICIES[point.policy].is_baseline and own,
        "batches": point.batches,
        "ranks": point.ranks,
        "target": point.config.target_load,
        "kl": [float(f"{value:.4g}") for value in bootstrap(kl)],
        "same": round(float(same.mean()), 4),
        "right": round(float(right.mean()), 4),
        "vanilla_right": round(float(expected_right.mean()), 4),
        "load": round(float(after.mean()), 4),
        "largest_load": round(float(after.max()), 4),
        "vanilla_loads": [round(float(load), 4) for load in before.mean(1)],
        "dropped": round(float(np.mean([report.share("dropped") for report in reports])), 4),
    }


def best_baseline(found: list[dict[str, Any]], bound: float) -> dict[str, Any] | None:
    """The point of least KL among baselines as they are published whose load keeps to the bound."""
    within = [one for one in found if one["baseline"] and one["load"] <= bound]
    return min(within, key=lambda one: one["kl"][0], default=None)


def least_load(found: list[dict[str, Any]], title: str, kl: float) -> float | None:
    """The least realised load at which a policy costs at most ``kl``; a lower one counts only if no load
    between them costs more."""
    least = None
    for one in sorted((one for one in found if one["title"] == title), key=lambda one: -one["load"]):
        if one["kl"][0] > kl:
            break
        least = one["load"]
    return least
