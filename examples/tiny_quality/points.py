"""What there is to measure: policies, settings and batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from macs import POLICIES, MACSConfig, Profile

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "macs": ("macs", {}),
    "weighting: constant": ("macs", {"weighting": "constant"}),
    "weighting: entropy": ("macs", {"weighting": "entropy"}),
    "distinctness reversed": ("macs", {"sharpness": -1.0}),
    "visual_weight: 1": ("macs", {"visual_weight": 1.0}),
    "visual_weight: 0.5": ("macs", {"visual_weight": 0.5}),
    "visual_weight: 0.05": ("macs", {"visual_weight": 0.05}),
    "admission by score alone": ("macs", {"priority": "score"}),
    "an assignment costs its weight": ("macs", {"cost": "weight"}),
    "level: expert": ("macs", {"level": "expert"}),
    "level: expert, reroute: rank": ("macs", {"level": "expert", "reroute": "rank"}),
    "reroute: group": ("macs", {"reroute": "group"}),
    "spare_text: true": ("macs", {"spare_text": True}),
    "paper": ("paper", {}),
    "paper, weighting: constant": ("paper", {"weighting": "constant"}),
    "paper, entropy reversed": ("paper", {"sharpness": -1.0}),
    "paper, rho 0": ("paper", {"modality_strength": 0.0}),
    "paper, reroute: none": ("paper", {"reroute": "none"}),
    "paper, level: rank, reroute: group": ("paper", {"level": "rank", "reroute": "group"}),
}
"""By title: a policy, and what is changed of its row or of the default settings."""


def variant(policy: str, fields: Mapping[str, Any]) -> tuple[str, MACSConfig]:
    """A policy with fields of its row changed, under a name of its own, and the default settings with the
    others changed."""
    row = POLICIES[policy]
    fixed = {key: value for key, value in fields.items() if key in row.fixed}
    own = {key: value for key, value in fields.items() if key in row.__dataclass_fields__}
    config = MACSConfig(**{key: value for key, value in fields.items() if key not in {**fixed, **own}})
    if not fixed and not own:
        return policy, config
    name = ", ".join([policy, *(f"{key} {value}" for key, value in fields.items())])
    POLICIES[name] = replace(row, fixed={**row.fixed, **fixed}, **own)
    return name, config


@dataclass(frozen=True)
class Point:
    """One thing to measure: a policy and its settings, on batches of a kind, planned for so many ranks."""

    title: str
    policy: str
    config: MACSConfig
    batches: str = "mixed"
    ranks: int = 4

    def key(self, run: Any) -> str:
        """What distinguishes this point of a ``Run`` from all others in the file."""
        fields = {
            **asdict(self),
            "config": self.config.as_dict(),
            "split": run.split,
            "questions": run.questions,
        }
        if self.config.split == "tuned" or self.config.compensation in ("visual", "all"):
            fields["tuning"] = sorted(map(str, run.tuning))
        fields |= {"seed": run.seed, "batch": run.batch, "model": str(run.checkpoint)}
        return json.dumps(fields, sort_keys=True)


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
    """The same points served with the tuning of their policy and ranks; and, with one limit for all layers,
    compensated with the estimates of MACS's profile."""
    plain = [one for one in points if one.title == one.policy]
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
    """Named sets of points: every policy at every limit, and every setting at every limit."""
    policies = [name for name, policy in POLICIES.items() if policy.is_baseline] + ["paper", "macs"]
    named = {title: variant(*change) for title, change in SETTINGS.items()}

    def at_bounds(rows: Mapping[str, tuple[str, MACSConfig]]) -> list[Point]:
        return [
            Point(title, policy, config.updated(target_load=bound))
            for title, (policy, config) in rows.items()
            for bound in bounds
        ]

    return {
        "frontier": at_bounds({name: (name, MACSConfig()) for name in policies}),
        "settings": at_bounds(named),
    }
