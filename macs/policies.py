"""MACS and the baselines it is compared with, by name, behind one interface.

A policy has ``plan(hidden, experts, weights, scores, tokens) -> Plan`` and ``slots``, the width of
its plans. Token drop and rank-balanced are the planner at other settings; so every policy runs
through the same code and the same adapters, and a comparison is one of policies alone.

A new policy is a row of ``POLICIES``: what it asks of an engine it declares there, and adapters, command
lines and tools look there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import MACSConfig, check_name
from .planner import Planner
from .steps.contracts import Choice, Constants
from .steps.extension import add_local_experts
from .tokens import Tokens
from .topology import Topology

COUNTED: dict[str, Any] = {
    "modality_strength": 0.0,
    "min_capacity": 0.0,
    "weighting": "constant",
    "visual_weight": 1.0,
    "cost": "one",
    "priority": "score",
    "level": "expert",
    "reroute": "none",
    "similarity": "none",
    "spare_text": False,
}
"""Settings under which a token is a token, whatever its modality, and stays where it is or nowhere."""


class Vanilla(Planner):
    """The router's top-k, dropless: the plan is the choice, and only counted."""

    plans = False


class ExpandedDrop(Planner):
    """Capacity-Aware Inference's expanded drop (arXiv 2503.05066).

    A token's candidates are its top-k and *all* experts on its own rank; each expert then keeps its
    best by score, up to capacity. A token may end with more than k experts, or fewer. An added
    expert's combine weight follows its score, as a rerouted one's does.
    """

    @property
    def slots(self) -> int:
        return self.top_k + self.topology.experts_per_rank

    def _extended(self, choice: Choice, tokens: Tokens, constants: Constants) -> Choice:
        return add_local_experts(choice, tokens, constants)


@dataclass(frozen=True)
class Policy:
    """What a policy is, and what it asks of an engine.

    summary: in a line. settings: laid over the user's; none: the user's as they are. planner: what makes its
    plans. adds_assignments: whether a token may end with more than k experts. reads_modality: whether it
    tells visual tokens from text, and has a use for a profile and the routers' similarity.
    """

    summary: str
    settings: Mapping[str, Any] | None
    planner: type[Planner] = Planner
    adds_assignments: bool = False
    reads_modality: bool = False

    def configured(self, config: MACSConfig) -> MACSConfig:
        """The settings it plans with where a user gives these."""
        return config if self.settings is None else config.updated(**self.settings)

    @property
    def plans(self) -> bool:
        """Whether it changes anything."""
        return self.planner.plans

    @property
    def is_baseline(self) -> bool:
        """Whether it is what MACS is compared with."""
        return self.plans and not self.reads_modality


POLICIES: dict[str, Policy] = {
    "vanilla": Policy("the router's choice", COUNTED, Vanilla),
    "token-drop": Policy("capacity ceil(gamma T k / E) for each expert, highest scores stay", COUNTED),
    "expanded-drop": Policy(
        "the same, with the experts of the token's own rank as further candidates",
        COUNTED,
        ExpandedDrop,
        adds_assignments=True,
    ),
    "rank-balanced": Policy(
        "capacity for each rank, the next-best expert of a rank with room takes the rest",
        {**COUNTED, "level": "rank", "reroute": "group"},
    ),
    "macs": Policy("the config as it is", None, reads_modality=True),
}
"""By name. Baselines take ``capacity_factor`` or ``target_load``, ``reroute_rounds``, ``min_tokens``,
``drop_padding`` and the two guards ``max_drop`` and ``max_load_factor`` from the user's settings, and set the
rest themselves (vanilla heeds none of them)."""


def policy_of(name: str) -> Policy:
    """The row of ``POLICIES`` of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    check_name("policy", name, tuple(POLICIES))
    return POLICIES[name]


def build_policy(name: str, config: MACSConfig, topology: Topology, top_k: int, **extras: Any) -> Planner:
    """The planner of a policy.

    Args:
        name: of the policy, a key of ``POLICIES``.
        config: the settings; those that the policy sets itself are replaced.
        topology: where experts live, and whose tokens are planned.
        top_k: k, experts a token.
        extras: ``Planner``'s keyword arguments; ignored by policies that do not read modality.

    Returns:
        A planner for one MoE layer.

    Raises:
        ValueError: no policy has that name, or a value does not fit the topology.
    """
    policy = policy_of(name)
    if not policy.reads_modality:
        extras = {}
    return policy.planner(policy.configured(config), topology, top_k, **extras)
