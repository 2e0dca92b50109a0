"""What there is to measure: policies, settings and batches."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from macs import POLICIES, MACSConfig, Profile

COUNTED = (1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 2.0)


PRESET_TITLES = ("macs fast", "macs safe")
"""Points with a bound of their own."""


WEIGHTED = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
"""Capacity factors: where every token costs one, and where it costs its weight."""


TARGETS = (0.9, 1.0, 1.05, 1.1, 1.2)
"""Values of ``target_load``."""


DEFAULT = MACSConfig()


def variant(policy: str, **fields: Any) -> str:
    """The name of a row of ``POLICIES`` that is another with some fields changed."""
    name = policy + "".join(f", {field} {value}" for field, value in fields.items())
    row = POLICIES[policy]
    settings = {key: fields.pop(key) for key in list(fields) if key in row.fixed}
    POLICIES[name] = replace(row, fixed={**row.fixed, **settings}, **fields)
    return name


@dataclass(frozen=True)
class Point:
    """One thing to measure: a policy and its settings, on batches of a kind, planned for so many ranks."""

    title: str
    policy: str
    config: MACSConfig
    batches: str = "mixed"
    ranks: int = 4

    def key(self, arguments: argparse.Namespace) -> str:
        """What tells this point from all others in the file."""
        told = {
            **asdict(self),
            "config": self.config.as_dict(),
            "split": arguments.split,
            "questions": arguments.questions,
        }
        if self.config.split == "tuned" or self.config.compensation in ("visual", "all"):
            told["tuning"] = sorted(map(str, arguments.tuning))
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
    factors = WEIGHTED if POLICIES[policy].cost == "weight" else COUNTED
    return [Point(title, policy, config.updated(capacity_factor=gamma), **more) for gamma in factors]


def by_target(
    title: str, policy: str, config: MACSConfig, targets: Sequence[float] = TARGETS, **more: Any
) -> list[Point]:
    """The same policy under several bounds that it has to meet by itself."""
    return [Point(title, policy, config.updated(target_load=target), **more) for target in targets]


def profiles_of(files: Sequence[Path]) -> dict[tuple[str, int], Profile]:
    """Profiles with a tuning, by its policy and ranks."""
    found = {}
    for file in files:
        profile = Profile.load(file)
        tuning = profile.tuning
        if tuning is None:
            raise ValueError(
                f"--tuning {file}: found a profile without a tuning; expected one of `macs tune`"
            )
        found[tuning.policy, tuning.ranks] = profile
    return found


def tuned_points(points: Sequence[Point], profiles: Mapping[tuple[str, int], Profile]) -> list[Point]:
    """The same points as the policies and ranks that were tuned are served with their tuning; and, with one
    bound for all layers, compensated with the estimates of MACS's profile."""
    plain = [one for one in points if one.title == one.policy and one.config.capacity_factor is None]
    tuned = [
        replace(one, title=f"{one.title}, tuned", config=one.config.updated(split="tuned"))
        for one in plain
        if (one.policy, one.ranks) in profiles
    ]
    estimates = {key for key, profile in profiles.items() if profile.compensation is not None}
    return tuned + [
        replace(one, title=f"{one.title}, compensated", config=one.config.updated(compensation="all"))
        for one in plain
        if ("macs", one.ranks) in estimates and one.policy != "paper"  # which has none
    ]


def grids(bounds: Sequence[float]) -> dict[str, list[Point]]:
    """Named sets of points; those of variants are measured at the bounds alone."""
    baselines = [name for name, policy in POLICIES.items() if policy.is_baseline]
    controls: dict[str, dict[str, Any]] = {
        "constant weight": {"weighting": "constant"},
        "flipped entropy": {"sharpness": -1.0},
        "rho = 0": {"modality_strength": 0.0},
        "rho = 1": {"modality_strength": 1.0},
        "no rerouting": {"reroute": "none"},
        "rerouting anywhere": {"reroute": "group"},
        "cost of one": {"cost": "one"},
        "product as priority": {"priority": "product"},
    }
    rows: dict[str, dict[str, Any]] = {
        "half as steep": {"sharpness": 0.5},
        "twice as steep": {"sharpness": 2.0},
        "flipped": {"sharpness": -1.0},
        "score as priority": {"priority": "score"},
        "costs its weight": {"cost": "weight"},
    }
    variants: dict[str, dict[str, Any]] = {
        "capacity per expert": {"level": "expert"},
        "per expert, in the rank": {"level": "expert", "reroute": "rank"},
        "rerouting": {"reroute": "group"},
        "visual weight 1": {"visual_weight": 1.0},
        "visual weight 0.5": {"visual_weight": 0.5},
        "visual weight 0.1": {"visual_weight": 0.1},
        "visual weight 0.02": {"visual_weight": 0.02},
        "constant": {"weighting": "constant"},
        "constant, rerouting": {"weighting": "constant", "reroute": "group"},
        "entropy": {"weighting": "entropy"},
    }

    def pooled(policy: str) -> bool:
        return POLICIES[policy].configured(DEFAULT).level == "rank"

    def changed(policy: str, changes: dict[str, dict[str, Any]]) -> list[Point]:
        return [
            point
            for name, fields in changes.items()
            for point in by_target(f"{policy}, {name}", variant(policy, **fields), DEFAULT, bounds)
        ]

    return {
        "baselines": [
            point
            for policy in baselines
            for point in (
                # Rank-balanced has a capacity per rank: there gamma is the bound.
                *(() if pooled(policy) else by_gamma(policy, policy, DEFAULT)),
                *by_target(policy, policy, DEFAULT),
            )
        ],
        "presets": [
            *by_gamma("paper", "paper", DEFAULT),
            *by_target("paper", "paper", DEFAULT),
            *by_target("macs", "macs", DEFAULT),
            Point("macs fast", "macs", MACSConfig.preset("fast")),
            Point("macs safe", "macs", MACSConfig.preset("safe")),
        ],
        "controls": [*by_target("paper", "paper", DEFAULT, bounds), *changed("paper", controls)],
        "variants": [
            *by_target("macs", "macs", DEFAULT, bounds),
            *changed("macs", rows),
            *(
                point
                for name, change in variants.items()
                for point in by_target(f"macs, {name}", "macs", DEFAULT.updated(**change), bounds)
            ),
        ],
        "rules": [
            *by_target("macs", "macs", DEFAULT, bounds),
            *by_target("macs, rerouting", "macs", DEFAULT.updated(reroute="group"), bounds),
            *by_target("macs, text spared", "macs", DEFAULT.updated(spare_text=True), bounds),
            *changed("macs", {"score as priority": {"priority": "score"}}),
        ],
        # Every policy at every bound: the frontier of answers against load.
        "bounded": [point for policy in baselines for point in by_target(policy, policy, DEFAULT, bounds)]
        + by_target("macs", "macs", DEFAULT, bounds)
        + by_target("paper", "paper", DEFAULT, bounds),
    }
