"""What there is to measure: policies, settings and batches."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from macs import POLICIES, MACSConfig, Profile, Tuning

COUNTED = (1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 2.0)


PRESET_TITLES = ("macs fast", "macs safe")
"""Points with a bound of their own."""


WEIGHTED = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
"""Capacity factors: where every token costs one, and where it costs its weight."""


TARGETS = (0.9, 1.0, 1.05, 1.1, 1.2)
"""Bounds on the busiest rank."""


PAPER = MACSConfig.preset("paper")


DEFAULT = MACSConfig()


BASELINE = MACSConfig(weighting="constant")  # which no baseline heeds


@dataclass(frozen=True)
class Point:
    """One thing to measure: a policy and its settings, on batches of a kind, planned for so many ranks.

    random_weights: a control; semantic weights come of noise instead of the features. rerouted_weight: what
    a rerouted assignment counts in its token's output, "score" as planned (by its new expert's score), half
    of that, or what it counted at its "former" expert. spared_text: text is neither dropped nor rerouted, and
    the bound gives way to it.
    """

    title: str
    policy: str
    config: MACSConfig
    batches: str = "mixed"
    ranks: int = 4
    random_weights: bool = False
    rerouted_weight: str = "score"
    spared_text: bool = False

    def key(self, arguments: argparse.Namespace) -> str:
        """What tells this point from all others in the file."""
        told = {**asdict(self), "split": arguments.split, "questions": arguments.questions}
        if not self.spared_text:
            del told["spared_text"]  # as points were kept before there was such a one
        if self.config.split == "tuned":
            told["tuning"] = sorted(map(str, arguments.tuning))
        told["damage"] = "answer"  # once it was the first token's alone
        told |= {"seed": arguments.seed, "batch": arguments.batch, "model": str(arguments.checkpoint)}
        return json.dumps(told, sort_keys=True)

    @property
    def setting(self) -> str:
        """How its bound is set, in a word or two."""
        if self.config.capacity_factor is not None:
            return f"gamma {self.config.capacity_factor:g}"
        return f"target {self.config.target_load:g}"


def by_gamma(title: str, policy: str, config: MACSConfig, **more: Any) -> list[Point]:
    """The same policy at every capacity factor that makes sense for it."""
    weighted = policy == "macs" and config.cost == "weight"
    factors = WEIGHTED if weighted else COUNTED
    return [Point(title, policy, config.updated(capacity_factor=gamma), **more) for gamma in factors]


def by_target(
    title: str, policy: str, config: MACSConfig, targets: Sequence[float] = TARGETS, **more: Any
) -> list[Point]:
    """The same policy under several bounds that it has to meet by itself."""
    return [Point(title, policy, config.updated(target_load=target), **more) for target in targets]


def tunings_of(files: Sequence[Path]) -> dict[tuple[str, int], Tuning]:
    """By policy and ranks, the tunings that profiles carry."""
    found = {}
    for file in files:
        tuning = Profile.load(file).tuning
        if tuning is None:
            raise ValueError(
                f"--tuning {file}: found a profile without a tuning; expected one of `macs tune`"
            )
        found[tuning.policy, tuning.ranks] = tuning
    return found


def split_points(points: Sequence[Point], tuned: Sequence[tuple[str, int]]) -> list[Point]:
    """The same points with their bounds split among the layers, of the policies and ranks that were tuned."""
    return [
        replace(one, title=f"{one.title}, split", config=one.config.updated(split="tuned"))
        for one in points
        if (one.policy, one.ranks) in tuned
        and one.title == one.policy  # with the settings it was tuned with
        and one.config.capacity_factor is None
    ]


def grids(bounds: Sequence[float]) -> dict[str, list[Point]]:
    """Named sets of points; those of variants are measured at the bounds alone."""
    baselines = [name for name, policy in POLICIES.items() if policy.is_baseline]
    controls: dict[str, dict[str, Any]] = {
        "constant weight": {"weighting": "constant"},
        "flipped entropy": {"entropy_sharpness": -1.0},
        "rho = 0": {"modality_strength": 0.0},
        "rho = 1": {"modality_strength": 1.0},
        "no rerouting": {"reroute": "none"},
        "rerouting anywhere": {"reroute": "group"},
        "capacity per rank": {"level": "rank", "reroute": "group"},
        "cost of one": {"cost": "one"},
        "product as priority": {"priority": "product"},
    }
    variants: dict[str, dict[str, Any]] = {
        "capacity per expert": {"level": "expert"},
        "per expert, in the rank": {"level": "expert", "reroute": "rank"},
        "rerouting": {"reroute": "group"},
        "rerouting, 1 round": {"reroute": "group", "reroute_rounds": 1},
        "rerouting, 4 rounds": {"reroute": "group", "reroute_rounds": 4},
        "rerouting to any expert": {"reroute": "group", "similarity": "none"},
        "visual weight 1": {"visual_weight": 1.0},
        "visual weight 0.5": {"visual_weight": 0.5},
        "visual weight 0.1": {"visual_weight": 0.1},
        "visual weight 0.02": {"visual_weight": 0.02},
        "normalised in the picture": {"normalization": "image"},
        "half as steep": {"entropy_sharpness": 0.5},
        "twice as steep": {"entropy_sharpness": 2.0},
        "flipped": {"entropy_sharpness": -1.0},
        "constant": {"weighting": "constant"},
        "constant, rerouting": {"weighting": "constant", "reroute": "group"},
        "entropy": {"weighting": "entropy"},
        "entropy, flipped": {"weighting": "entropy", "entropy_sharpness": -1.0},
        "score as priority": {"priority": "score"},
        "costs its weight": {"cost": "weight"},
    }

    def pooled(policy: str) -> bool:
        return POLICIES[policy].configured(BASELINE).level == "rank"

    def changed(title: str, base: MACSConfig, changes: dict[str, dict[str, Any]]) -> list[Point]:
        return [
            point
            for name, change in changes.items()
            for point in by_target(f"{title}, {name}", "macs", base.updated(**change), bounds)
        ]

    return {
        "baselines": [
            point
            for policy in baselines
            for point in (
                # Rank-balanced has a capacity per rank: there gamma is the bound.
                *(() if pooled(policy) else by_gamma(policy, policy, BASELINE)),
                *by_target(policy, policy, BASELINE),
            )
        ],
        "presets": [
            *by_gamma("macs paper", "macs", PAPER),
            *by_target("macs paper", "macs", PAPER),
            *by_target("macs", "macs", DEFAULT),
            Point("macs fast", "macs", MACSConfig.preset("fast")),
            Point("macs safe", "macs", MACSConfig.preset("safe")),
        ],
        "controls": [
            *by_target("paper", "macs", PAPER, bounds),
            *changed("paper", PAPER, controls),
            *by_target("paper, random weight", "macs", PAPER, bounds, random_weights=True),
        ],
        "variants": [
            *by_target("default", "macs", DEFAULT, bounds),
            *changed("default", DEFAULT, variants),
            *by_target(
                "default, random weight",
                "macs",
                DEFAULT,
                bounds,
                random_weights=True,
            ),
            *(
                point
                for rule in ("half", "former")
                for point in by_target(
                    f"default, rerouted at {rule} weight",
                    "macs",
                    DEFAULT.updated(reroute="group"),
                    bounds,
                    rerouted_weight=rule,
                )
            ),
        ],
        "rules": [
            *by_target("macs", "macs", DEFAULT, bounds),
            *by_target("macs, rerouting", "macs", DEFAULT.updated(reroute="group"), bounds),
            *by_target("macs, text spared", "macs", DEFAULT, bounds, spared_text=True),
            *by_target("macs, by picture", "macs", DEFAULT.updated(normalization="image"), bounds),
            *by_target("macs, score alone", "macs", DEFAULT.updated(priority="score"), bounds),
        ],
        # Every policy at every bound: the frontier of answers against load.
        "bounded": [point for policy in baselines for point in by_target(policy, policy, BASELINE, bounds)]
        + by_target("macs", "macs", DEFAULT, bounds)
        + by_target("macs paper", "macs", PAPER, bounds),
    }
