"""The fit of what stands in for dropped assignments, in sweeps over the requests.

First mean and principal directions of what enters every layer, then a regression of its routed output, then,
on the other half of the requests, how much of it that explains. A sweep takes as many layers as fit in
``MEMORY``. Qwen3-VL-30B-A3B (48 layers, E 128, D 2048): 1.6 GB for the first sweep; for the second 1.4 GB at
rank 8 in one, 3.5 GB at rank 16 in two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from macs.adapters import LayerRuntime
from macs.records.compensation import Compensation, Explained, Moments, Regression

from .model import Scorer

MEMORY = 2e9
"""Bytes of sums that a sweep may hold."""


def fit_compensation(model: Scorer, rank: int) -> Compensation:
    """Fit estimates of rank ``rank`` on the half that tunes; every rank of the model's group makes the call.

    Raises:
        ValueError: the rank exceeds the features of a layer, or an engine adds shared experts before its
            routed output can be read.
    """
    layers = model.runtime.layers
    experts = {layer: layer.topology.num_experts for layer in layers}
    features = {layer: layer.adapter.router_weight().shape[1] for layer in layers}
    least = min(features.values())
    if rank > least:
        raise ValueError(f"compensation rank: found {rank}, expected at most {least}, the layers' features")
    for layer in layers:
        mixed = layer.adapter.mixes_outputs()
        if mixed is not None:
            raise ValueError(f"compensation: {mixed}")
    directions = _swept(
        model,
        "tune",
        lambda layer: Moments.nbytes(features[layer]),
        lambda layer: Moments(features[layer], layer.adapter.router_weight().device),
        lambda one: one.principal(rank),
    )
    fits = _swept(
        model,
        "tune",
        lambda layer: Regression.nbytes(experts[layer], features[layer], rank),
        lambda layer: Regression(directions[layer][0], directions[layer][1], experts[layer]),
        lambda one: (one.solve(), one.count.long().cpu()),
    )
    explained = _swept(
        model,
        "verify",
        lambda layer: Explained.nbytes(experts[layer], features[layer], rank),
        lambda layer: Explained(directions[layer][0], directions[layer][1], experts[layer], fits[layer][0]),
        lambda one: one.share(),
    )
    return Compensation(
        mean=torch.stack([directions[layer][0].cpu() for layer in layers]),
        basis=torch.stack([directions[layer][1].cpu() for layer in layers]).to(torch.bfloat16),
        coefficients=torch.stack([fits[layer][0] for layer in layers]),
        tokens=torch.stack([fits[layer][1] for layer in layers]),
        explained=torch.stack([explained[layer] for layer in layers]),
    )


def parts(layers: Sequence[LayerRuntime], nbytes: Callable[[LayerRuntime], int]) -> list[list[LayerRuntime]]:
    """The layers in groups of at most ``MEMORY``, each of one layer or more."""
    groups: list[list[LayerRuntime]] = [[]]
    for layer in layers:
        if groups[-1] and sum(nbytes(one) for one in [*groups[-1], layer]) > MEMORY:
            groups.append([])
        groups[-1].append(layer)
    return groups


def _swept(
    model: Scorer,
    half: str,
    nbytes: Callable[[LayerRuntime], int],
    make: Callable[[LayerRuntime], Any],
    take: Callable[[Any], Any],
) -> dict[LayerRuntime, Any]:
    """What is taken from every layer's sums over a half of the requests and the processes of the group."""
    found: dict[LayerRuntime, Any] = {}
    for part in parts(model.runtime.layers, nbytes):
        sums = {layer: make(layer) for layer in part}
        model.observe(half, {layer: one.add for layer, one in sums.items()})
        for one in sums.values() if model.group is not None else ():
            for tensor in one.sums:
                dist.all_reduce(tensor, group=model.group)
        found |= {layer: take(one) for layer, one in sums.items()}
    return found
