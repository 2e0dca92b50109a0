"""Policies by name: MACS, the paper's method, and the baselines they are compared with.

Every policy runs through the same planner and the same adapters, so a comparison is one of policies alone. A
new policy is a row of ``POLICIES``: what it fixes and what it needs of an engine is declared there, and
adapters, command lines and tools read it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import MACSConfig, check_name


@dataclass(frozen=True)
class Policy:
    """A row of ``POLICIES``.

    summary              one line
    fixed                settings that replace the user's
    default_bound        the bound where the user gives none; none: ``MACSConfig``'s
    plans                False: the router's choice is left unchanged, and only counted
    adds_assignments     a token may end with more than k experts
    reads_modality       visual tokens are treated differently from text, and a profile is used
    modality_strength    [rho] how far capacities follow the batch's visual ratio, 0..2
    bias_threshold       [tau] an expert's visual share beyond one half that makes it biased, 0..0.5
    sharpness            [delta] steepness of the weight in the normalised entropy or distinctness
    cost                 what an assignment takes of a capacity: "one", or its token's "weight"
    priority             admission by the router's "score", or by its "product" with the token's weight
    reroute_rounds       proposals that a token may make, one after the other
    similarity           candidates are ranked by score times similarity of the experts' router rows
    floor                least capacity of an expert, in tokens
    """

    summary: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    default_bound: Mapping[str, float] | None = None
    plans: bool = True
    adds_assignments: bool = False
    reads_modality: bool = False
    modality_strength: float = 0.0
    bias_threshold: float = 0.1
    sharpness: float = 1.0
    cost: str = "one"
    priority: str = "score"
    reroute_rounds: int = 2
    similarity: bool = False
    floor: float = 0.0

    def configured(self, config: MACSConfig) -> MACSConfig:
        """The settings that are used where a user gives these."""
        default = {} if self.default_bound is None or config.bound_given else self.default_bound
        return config.updated(**{**default, **self.fixed})

    def uses_similarity(self, config: MACSConfig) -> bool:
        """Whether plans under these settings depend on the routers' similarity."""
        return self.similarity and self.configured(config).reroute != "none"

    @property
    def is_baseline(self) -> bool:
        """Whether MACS is compared with it."""
        return self.plans and not self.reads_modality


_COUNTED = {
    "level": "expert",
    "weighting": "constant",
    "visual_weight": 1.0,
    "reroute": "none",
    "spare_text": False,
}
"""Every token costs one, whatever its modality, and stays at its expert or is dropped."""

_MACS: dict[str, Any] = {"reads_modality": True, "priority": "product", "similarity": True, "floor": 1.0}

POLICIES: dict[str, Policy] = {
    "vanilla": Policy("the router's choice", _COUNTED, plans=False),
    "token-drop": Policy("capacity ceil(gamma T k / E) of each expert; highest scores stay", _COUNTED),
    "expanded-drop": Policy(
        "token-drop, with the experts of the token's own rank as further candidates",
        _COUNTED,
        adds_assignments=True,
    ),
    "rank-balanced": Policy(
        "capacity of each rank; overflow goes to the next-best expert of a rank with capacity left",
        {**_COUNTED, "level": "rank", "reroute": "group"},
    ),
    "macs": Policy("capacity of each rank, in rows; text and distinct visual tokens first", **_MACS),
    "padded": Policy(
        "macs for engines that pad every expert to the fullest one: capacity of each expert, four rounds of "
        "rerouting",
        {"level": "expert", "reroute": "group"},
        {"capacity_factor": 1.2},
        **{**_MACS, "reroute_rounds": 4},
    ),
    "paper": Policy(
        "the paper: entropy weights, capacity of weighted load that follows modality, rerouting in the rank",
        {
            "level": "expert",
            "weighting": "entropy",
            "reroute": "rank",
            "spare_text": False,
            "compensation": "none",
        },
        {"capacity_factor": 1.0},
        **{**_MACS, "modality_strength": 0.5, "cost": "weight", "priority": "score"},
    ),
}
"""By name. A baseline and ``paper`` take ``capacity_factor`` or ``target_load``, ``max_drop`` and
``min_tokens`` from the user's settings."""


def policy_of(name: str) -> Policy:
    """The row of ``POLICIES`` of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    check_name("policy", name, tuple(POLICIES))
    return POLICIES[name]
