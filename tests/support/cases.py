"""Random routings for the property tests: small, full of ties, and exactly representable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from macs import POLICIES, WEIGHTINGS, MACSConfig, PlanEvent, Planner, Policy, Runtime, Tokens, Topology
from macs.adapters import LayerAdapter


def build_policy(name: str, config: MACSConfig, topology: Topology, top_k: int, **extras: Any) -> Planner:
    """The planner of a policy, its name first."""
    return Planner(config, topology, top_k, name, **extras)


BUSY = {"level": "expert", "weighting": "entropy", "reroute": "rank", "capacity_factor": 1.0}
"""Settings under which the steps have work: a capacity of each expert, rerouting, entropy weights."""


def busy(**settings: Any) -> MACSConfig:
    """``BUSY`` with some settings changed."""
    return MACSConfig().updated(**BUSY).updated(**settings)


NOTHING_OVER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("macs", {"capacity_factor": 1e6}),
    ("macs", {"capacity_factor": 1e6, "level": "rank", "reroute": "group"}),
    ("token-drop", {"capacity_factor": 1e6}),
    ("rank-balanced", {"capacity_factor": 1e6}),
    ("vanilla", {}),
    ("macs", {"capacity_factor": 0.1, "min_tokens": 1000}),
)
"""Policies and settings under which nothing is over its capacity, or nothing is planned."""


def events_of(runtime: Runtime) -> list[PlanEvent]:
    """The steps that the layers of a runtime plan from now on, as a list that grows."""
    events: list[PlanEvent] = []
    runtime.on_plan(events.append)
    return events


class AnyAdapter(LayerAdapter):
    """Of a layer without an engine: its router's rows by a function."""

    def __init__(self, rows, topology, top_k, group=None, refetch=None):
        super().__init__(topology, top_k, group)
        self.router_weight = rows
        if refetch is not None:
            self.refetch = refetch


@dataclass
class Routing:
    """Inputs of ``Planner.plan`` and of the planner itself."""

    config: MACSConfig
    policy: Policy
    topology: Topology
    top_k: int
    hidden: Tensor
    experts: Tensor
    weights: Tensor
    scores: Tensor
    tokens: Tokens
    bias: list[float]
    similarity: Tensor


@st.composite
def routings(
    draw,
    config=None,
    policy=None,
    max_tokens=12,
    ids=(0, 1, 2),
    exempt=True,
    distinct=False,
):
    """A routing whose scores are multiples of 1/1024 and similarities multiples of 1/64.

    config, policy: strategies of ``MACSConfig`` and ``Policy``. distinct: no two scores of an expert are
    equal.
    """
    ranks = draw(st.sampled_from([1, 2, 4]))
    experts = ranks * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, min(experts, 4)))
    count = draw(st.integers(1, max_tokens))
    own = draw(st.integers(1, ranks))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    if distinct:
        scores = torch.rand(count, experts, generator=generator)
    else:
        levels = draw(st.sampled_from([3, 8, 600]))
        scores = integers(0 if levels == 8 else 1, levels + 1, count, experts).float() / 1024
    order = torch.rand(count, experts, generator=generator).argsort(1)[:, :top_k]
    hot = draw(st.booleans())
    chosen = order.sort(1).values if not hot else torch.arange(top_k).expand(count, -1).clone()
    hidden = torch.randn(count, 6, generator=generator) * draw(st.sampled_from([0.0, 1.0, 4.0]))
    weights = integers(1, 64, count, top_k).float() / 64
    place = torch.randperm(count, generator=generator)
    modality = torch.tensor(ids)[integers(0, len(ids), count)].to(torch.int8)
    valid = torch.rand(count, generator=generator) > (0.2 if draw(st.booleans()) else -1)
    spared = torch.rand(count, generator=generator) < (0.1 if exempt and draw(st.booleans()) else -1)
    expert_rank = tuple(torch.randperm(experts, generator=generator).remainder(ranks).tolist())
    similarity = integers(0, 65, experts, experts).float() / 64
    return Routing(
        config=draw(config) if config is not None else MACSConfig(min_tokens=0),
        policy=draw(policy) if policy is not None else POLICIES["macs"],
        topology=Topology(experts, ranks, expert_rank, tuple(range(own))),
        top_k=top_k,
        hidden=hidden,
        experts=chosen,
        weights=weights,
        scores=scores,
        tokens=Tokens(
            modality=modality,
            valid=valid,
            exempt=spared,
            position=place,
            source=integers(0, own, count),
        ),
        bias=[float(value) for value in integers(-1, 2, experts)],
        similarity=similarity,
    )


def configs(**fixed):
    """Any settings of the planner, some of them fixed."""
    choices = {
        "capacity_factor": st.sampled_from([0.25, 0.5, 0.8, 1.0, 1.3, 2.0]),
        "target_load": st.sampled_from([None, None, 0.7, 1.0, 1.3]),
        "weighting": st.sampled_from(list(WEIGHTINGS)),
        "visual_weight": st.sampled_from([0.25, 0.5, 1.0]),
        "level": st.sampled_from(["expert", "rank"]),
        "reroute": st.sampled_from(["rank", "group", "none"]),
        "min_tokens": st.sampled_from([0, 0, 0, 6]),
        "max_drop": st.sampled_from([None, None, 0.0, 0.1, 0.3]),
    }
    choices.update({name: st.just(value) for name, value in fixed.items()})

    def built(values):
        if values.get("target_load") is not None:  # of two bounds one is given
            values = {**values, "capacity_factor": None}
        return MACSConfig(**values)

    return st.fixed_dictionaries(choices).map(built)


def policies(**fixed):
    """Any fields of a policy that reads modality, some of them fixed."""
    choices = {
        "modality_strength": st.sampled_from([0.0, 0.5, 1.0]),
        "floor": st.sampled_from([0.0, 1.0, 2.0]),
        "cost": st.sampled_from(["weight", "one"]),
        "priority": st.sampled_from(["score", "product"]),
        "reroute_rounds": st.sampled_from([1, 2, 3]),
    }
    choices.update({name: st.just(value) for name, value in fixed.items()})
    return st.fixed_dictionaries(choices).map(lambda fields: replace(POLICIES["macs"], **fields))
