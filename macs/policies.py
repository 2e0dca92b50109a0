"""MACS and the baselines it is compared with, by name, behind one interface.

A policy has ``plan(hidden, experts, weights, scores, tokens) -> Plan`` and ``slots``, the width of
its plans. Token drop and rank-balanced are the planner at other settings; so every policy runs
through the same code and the same adapters, and a comparison is one of policies alone.
"""

from __future__ import annotations

from typing import Any

from .config import MACSConfig, check_name
from .modality import Tokens
from .planner import Planner
from .steps.contracts import Choice, Constants
from .steps.extension import add_local_experts
from .topology import Topology

COUNTED: dict[str, Any] = {
    "modality_strength": 0.0,
    "min_capacity": 0.0,
    "weighting": "constant",
    "visual_weight": 1.0,
    "cost": "one",
    "priority": "score",
}
"""Settings under which a token is a token, whatever its modality."""


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


POLICIES = ("vanilla", "token-drop", "expanded-drop", "rank-balanced", "macs")


def build_policy(name: str, config: MACSConfig, topology: Topology, top_k: int, **extras: Any) -> Planner:
    """The policy of that name; ``extras`` are ``Planner``'s keyword arguments.

    Baselines take ``capacity_factor`` or ``target_straggler``, ``min_tokens``,
    ``drop_padding`` and the two guards ``max_drop`` and ``max_load_factor`` from the
    config, and set the rest themselves (vanilla heeds none of them):

    vanilla        the router's choice
    token-drop     capacity ceil(gamma T k / E) for each expert, highest scores stay
    expanded-drop  the same, with the experts of the token's own rank as further candidates
    rank-balanced  capacity for each rank, the next-best expert of a rank with room takes the rest
    macs           the config as it is
    """
    check_name("policy", name, POLICIES)
    if name == "macs":
        return Planner(config, topology, top_k, **extras)
    extras = {**extras, "modality_bias": None, "similarity": None}
    counted = config.updated(**COUNTED, level="expert", reroute="none", similarity="none")
    if name == "vanilla":
        return Vanilla(counted, topology, top_k, **extras)
    if name == "token-drop":
        return Planner(counted, topology, top_k, **extras)
    if name == "expanded-drop":
        return ExpandedDrop(counted, topology, top_k, **extras)
    balanced = counted.updated(level="rank", reroute="group", reroute_rounds=config.reroute_rounds)
    return Planner(balanced, topology, top_k, **extras)
