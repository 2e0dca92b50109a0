"""The fit of what stands in for dropped assignments, in sweeps over the requests.

First mean and principal directions of what enters every layer, then a regression of its routed output, then,
on the other half of the requests, how much of it that explains. A sweep takes as many layers as fit in
``MEMORY``. Qwen3-VL-30B-A3B (48 layers, E 128, D 2048): 1.6 GB for the first sweep; for the second 1.4 GB at
rank 8 in one, 3.5 GB at rank 16 in two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
    device = {layer: layer.adapter.router_weight().device for layer in layers}
    moments = {layer: Moments.nbytes(features[layer]) for layer in layers}
    directions: dict[LayerRuntime, tuple[Tensor, Tensor]] = {}
    for part in parts(layers, moments):
        first = {layer: Moments(features[layer], device[layer]) for layer in part}
        _sweep(model, "tune", first)
        directions |= {layer: one.principal(rank) for layer, one in first.items()}
        del first
    sizes = {layer: Regression.nbytes(experts[layer], features[layer], rank) for layer in layers}
    coefficients: dict[LayerRuntime, Tensor] = {}
    counts: dict[LayerRuntime, Tensor] = {}
    for part in parts(layers, sizes):
        second = {layer: Regression(*directions[layer], experts[layer]) for layer in part}
        _sweep(model, "tune", second)
        coefficients |= {layer: one.solve() for layer, one in second.items()}
        counts |= {layer: one.count.long().cpu() for layer, one in second.items()}
        del second
    explained: dict[LayerRuntime, Tensor] = {}
    for part in parts(
        layers, {layer: Explained.nbytes(experts[layer], features[layer], rank) for layer in layers}
    ):
        third = {layer: Explained(*directions[layer], experts[layer], coefficients[layer]) for layer in part}
        _sweep(model, "verify", third)
        explained |= {layer: one.share() for layer, one in third.items()}
        del third
    return Compensation(
        mean=torch.stack([directions[layer][0].cpu() for layer in layers]),
        basis=torch.stack([directions[layer][1].cpu() for layer in layers]).to(torch.bfloat16),
        coefficients=torch.stack([coefficients[layer] for layer in layers]),
        tokens=torch.stack([counts[layer] for layer in layers]),
        explained=torch.stack([explained[layer] for layer in layers]),
    )


def parts(layers: Sequence[LayerRuntime], nbytes: dict[LayerRuntime, int]) -> list[list[LayerRuntime]]:
    """The layers in groups of at most ``MEMORY``, each of one layer or more."""
    groups: list[list[LayerRuntime]] = [[]]
    for layer in layers:
        if groups[-1] and sum(nbytes[one] for one in [*groups[-1], layer]) > MEMORY:
            groups.append([])
        groups[-1].append(layer)
    return groups


def _sweep(model: Scorer, half: str, sums: Mapping[LayerRuntime, Any]) -> None:
    """Read a half of the requests, and add up what the processes of the group have."""
    model.observe(half, {layer: one.add for layer, one in sums.items()})
    if model.group is not None:
        for one in sums.values():
            for tensor in one.sums:
                dist.all_reduce(tensor, group=model.group)
