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
from macs_tools.common.intervals import bootstrap, bootstrap_ratio

from .points import Point

SHARES = [action + suffix for suffix in ("", "_mass") for action in ("kept", "rerouted", "dropped")]


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
    """The figures of a point, from its answers and reports and vanilla's; those of answers as (mean, low,
    high). Intervals are over questions, which the plan of a batch ties to each other a little."""
    (found, reports), (vanilla, untouched) = under, stock
    right = np.array([ids == sample.answer for ids, sample in zip(found.ids, asked, strict=True)])
    expected_right = np.array([ids == one.answer for ids, one in zip(vanilla.ids, asked, strict=True)])
    same = np.array([ids == other for ids, other in zip(found.ids, vanilla.ids, strict=True)])
    kl = np.array([divergence(*pair) for pair in zip(vanilla.said, found.said, strict=True)])
    tasks = np.array([sample.task for sample in asked])
    pictures = np.array([sample.pixels is not None for sample in asked])

    def where(chosen: np.ndarray, values: np.ndarray) -> Any:
        return bootstrap(values[chosen].astype(float)) if chosen.any() else None

    def kept(chosen: np.ndarray) -> Any:
        """Accuracy over vanilla's."""
        if not chosen.any():
            return None
        return bootstrap_ratio(right[chosen].astype(float), expected_right[chosen].astype(float))

    after = torch.stack([report.load("after") for report in reports])  # [L, N]
    # Vanilla's own: before planning a layer has what the plans of those before it made of its input.
    before = torch.stack([report.load("before") for report in untouched])
    experts = torch.stack([report.imbalance("after") for report in reports])
    return {
        "title": point.title,
        "setting": point.setting,
        "policy": point.policy,
        "settings": point.config.as_dict(),
        "batches": point.batches,
        "ranks": point.ranks,
        "accuracy": {task: where(tasks == task, right) for task in dict.fromkeys(tasks)},
        "picture_accuracy": where(pictures, right),
        "text_accuracy": where(~pictures, right),
        "picture_accuracy_kept": kept(pictures),
        "text_accuracy_kept": kept(~pictures),
        "vanilla_accuracy": {
            task: float(expected_right[tasks == task].mean()) for task in dict.fromkeys(tasks)
        },
        "picture_kl_each": [float(f"{value:.3g}") for value in kl[pictures]],
        "agreement": bootstrap(same.astype(float)),
        "kl": bootstrap(kl),
        "picture_kl": where(pictures, kl),
        "text_kl": where(~pictures, kl),
        "load_before": float(before.mean()),
        "load": float(after.mean()),
        "load_p95": float(after.flatten().quantile(0.95)),
        "busiest_expert": float(experts.mean()),
        "busiest_expert_p95": float(experts.flatten().quantile(0.95)),
        "layers": [
            {"before": float(one), "after": float(other)}
            for one, other in zip(before.mean(1), after.mean(1), strict=True)
        ],
        **{name: float(np.mean([report.share(name) for report in reports])) for name in SHARES},
    }


def measure_of(found: dict[str, Any]) -> list[float]:
    """What policies are compared by: KL over picture questions, or over all where there are none."""
    return found["picture_kl"] or found["kl"]


def best_baseline(found: list[dict[str, Any]], bound: float) -> dict[str, Any] | None:
    """The point of least KL over all questions among baselines, uniform, whose load keeps to the bound."""
    within = [
        one
        for one in found
        if POLICIES[one["policy"]].is_baseline
        and one["settings"]["split"] == "uniform"
        and one["load"] <= bound
    ]
    return min(within, key=lambda one: one["kl"][0], default=None)


def least_load(found: list[dict[str, Any]], title: str, kl: float) -> float | None:
    """The least realised load at which a policy costs at most ``kl`` over all questions; no lower one that
    was measured costs more at a higher load, or it would be luck."""
    mine = sorted((one for one in found if one["title"] == title), key=lambda one: -one["load"])
    least = None
    for one in mine:
        if one["kl"][0] > kl:
            break
        least = one["load"]
    return least


def best_within(found: list[dict[str, Any]], bound: float) -> dict[str, dict[str, Any]]:
    """By title: the point of least KL among those whose realised load keeps to the bound."""
    best: dict[str, dict[str, Any]] = {}
    for one in found:
        if one["load"] > bound:
            continue
        held = best.get(one["title"])
        if held is None or measure_of(one)[0] < measure_of(held)[0]:
            best[one["title"]] = one
    return best
