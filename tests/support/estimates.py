"""Profiles with arbitrary compensation, and what it should add to a layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from macs import Profile, Runtime
from macs.records.compensation import SCOPES, Compensation
from macs.records.profile import router_fingerprint


def profile_of(routers: Sequence[Tensor], top_k: int, rank: int = 3) -> Profile:
    """Of routers [E, D]: means, bases and coefficients drawn at random."""
    (experts, features), layers = routers[0].shape, len(routers)
    random = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(layers, 2, *shape, generator=random)

    compensation = Compensation(
        mean=drawn(features),
        basis=drawn(features, rank).bfloat16(),
        coefficients=drawn(experts, 1 + rank, features).bfloat16(),
        tokens=torch.full((layers, 2), 100),
        explained=torch.full((layers, 2), 0.9, dtype=torch.float64),
    )
    counts = torch.ones(layers, experts, dtype=torch.int64)
    names = tuple(router_fingerprint(one) for one in routers)
    return Profile(counts, counts.clone(), names, top_k, compensation=compensation)


def estimates_of(event: Any, compensation: Compensation, scope: str, row: int = 0) -> Tensor:
    """The formula for what a step dropped, token by token in float64: [T, D]."""
    total = torch.zeros_like(event.hidden, dtype=torch.float64)
    for token, choice in enumerate(event.experts.tolist()):
        kind = int(event.tokens.visual[token])
        if kind not in SCOPES[scope]:
            continue
        features = event.hidden[token].double() - compensation.mean[row, kind].double()
        features = torch.cat([features.new_ones(1), features @ compensation.basis[row, kind].double()])
        for slot, expert in enumerate(choice):
            if expert >= 0 and event.plan.experts[token, slot] < 0:
                estimate = features @ compensation.coefficients[row, kind, expert].double()
                total[token] += event.weights[token, slot].double() * estimate
    return total


def check_added(runtime: Runtime, config: Any, profile: Profile, run: Any, near: float = 1e-4) -> None:
    """Assert that ``run() -> output`` has the estimates of what its first layer dropped, that tokens without
    a drop keep their bits, and that observers see the output before."""
    layer, seen, routed = runtime.layers[0], [], []
    outputs = {}
    for scope in ("none", "visual", "all"):
        runtime.use("macs", config.updated(compensation=scope), profile)
        ends = layer.on_plan(seen.append), layer.on_output(lambda _, output: routed.append(output.clone()))
        outputs[scope] = run()
        for end in ends:
            end()
    assert all(torch.equal(one, routed[0]) for one in routed) and len(routed) == 3
    for scope, event in zip(outputs, seen, strict=True):
        expected = estimates_of(event, profile.compensation, scope)
        moved = (outputs[scope].double() - outputs["none"].double()).reshape(expected.shape)
        torch.testing.assert_close(moved, expected, rtol=near, atol=near)
        lost = expected.abs().amax(1) > 0
        assert scope == "none" or 0 < int(lost.sum()) < len(lost)
        kept = [one.reshape(expected.shape)[~lost] for one in (outputs[scope], outputs["none"])]
        assert torch.equal(*kept)
