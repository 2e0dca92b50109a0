"""The figures of a point, with intervals over questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from macs import POLICIES, MACSConfig, Profile
from macs_tools.common.intervals import bootstrap
from macs_tools.tune import Scorer

from .points import Point


def vanilla_of(scorer: Scorer) -> dict[str, Any]:
    """The figures of the model without a limit: loads by layer, and right answers."""
    scorer.under("vanilla", MACSConfig())
    batches = [*scorer.halves["tune"], *scorer.halves["verify"]]
    right = [
        ids == sample.answer
        for batch in batches
        for ids, sample in zip(batch.answers, batch.prompts, strict=True)
    ]
    # Before planning a layer has, under a limit, what the plans of those before it made of its input.
    loads = [float(report.prefill.load("before").mean()) for report in scorer.runtime.reports()]
    return {
        "vanilla_right": round(float(np.mean(right)), 4),
        "vanilla_loads": [round(load, 4) for load in loads],
    }


def measured(
    point: Point, scorer: Scorer, profiles: Mapping[tuple[str, int], Profile], vanilla: dict[str, Any]
) -> dict[str, Any]:
    """The figures of a point; KL as (mean, low, high) in nats. Intervals are over questions, which the plan
    of a batch ties to each other a little."""
    profile, config = scorer.modality, point.config
    assert profile is not None
    if config.split == "tuned":
        profile = profiles[point.policy, point.ranks]
    elif config.compensation != "tuned":
        profile = replace(profile, compensation=profiles["macs", point.ranks].compensation)
    found = scorer.under(point.policy, config, profile)
    reports = [report.prefill for report in scorer.runtime.reports()]
    after = torch.stack([report.load("after") for report in reports])  # [L, N]
    own = config.split == "uniform" and config.compensation == "tuned"
    return {
        "title": point.title,
        "baseline": POLICIES[point.policy].is_baseline and own,
        "batches": point.batches,
        "ranks": point.ranks,
        "target": config.target_load,
        "kl": [float(f"{value:.4g}") for value in bootstrap(found.kl)],
        "same": round(float(found.same.mean()), 4),
        "load": round(float(after.mean()), 4),
        "largest_load": round(float(after.max()), 4),
        **vanilla,
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
