"""The fit of what stands in for dropped assignments, in sweeps over the requests.

First mean and principal directions of what enters every layer, then a regression of its routed output, then,
on the other half of the requests, how much of it that explains. A sweep takes as many layers as fit in
``MEMORY``. Qwen3-VL-30B-A3B (48 layers, E 128, D 2048): 1.6 GB for the first sweep; for the second 1.4 GB at
rank 8 in one, 3.5 GB at rank 16 in two.

Shapes: T tokens, D features, E experts, k assignments of a token, r rank. Text is modality 0, visual tokens
are modality 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, bfloat16, float32, float64

from macs.adapters import LayerRuntime
from macs.records.compensation import Compensation
from macs.steps.compensation import features_of

from .model import Scorer

MEMORY = 2e9
"""Bytes of sums that a sweep may hold."""

RIDGE = 1e-3
"""Added to the normal equations, over the mean weight of a feature."""

LEAST_VARIANCE = 1e-5
"""Of a direction of the basis, over the largest one and the mean's square."""

ROWS = 4096
"""Tokens that are added to the normal equations together."""


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


def members_of(event: Any) -> tuple[Tensor, Tensor]:
    """Text and visual tokens, bool [T] each; padding and features that are not finite are neither."""
    tokens, finite = event.tokens, event.hidden.isfinite().all(1)
    return tokens.valid & ~tokens.visual & finite, tokens.visual & finite


class Moments:
    """First sweep of a fit, of one layer: mean and covariance of the tokens that enter it, by modality."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = torch.zeros(2, dtype=float64, device=device)
        self.total = torch.zeros(2, features, dtype=float32, device=device)
        self.product = torch.zeros(2, features, features, dtype=float32, device=device)

    @staticmethod
    def nbytes(features: int) -> int:
        """Memory of a layer."""
        return 8 * features * (features + 1)

    @property
    def sums(self) -> list[Tensor]:
        """What adds up over the processes that share the layer."""
        return [self.count, self.total, self.product]

    def add(self, event: Any, output: Tensor) -> None:
        """event: a ``PlanEvent``; output [T, D]: what its experts gave."""
        for modality, chosen in enumerate(members_of(event)):
            rows = event.hidden[chosen].float()
            self.count[modality] += len(rows)
            self.total[modality] += rows.sum(0)
            self.product[modality] += rows.T @ rows

    def principal(self, rank: int) -> tuple[Tensor, Tensor]:
        """The mean float32 [2, D] and the ``rank`` directions of the largest variance, float32 [2, D, r]."""
        count = self.count.double().clamp(min=1)[:, None]
        mean = self.total.double() / count
        covariance = self.product.double() / count[:, :, None] - mean[:, :, None] * mean[:, None]
        variances, directions = (one.flip(-1)[..., :rank] for one in torch.linalg.eigh(covariance))
        # Of tokens that hardly differ the rest would be noise, magnified without bound on others.
        scale = variances[:, :1].clamp(min=0) + mean.square().sum(1, keepdim=True)
        directions = torch.where((variances > LEAST_VARIANCE * scale)[:, None], directions, 0.0)
        # An eigenvector has no sign of its own: its largest entry is made positive.
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return mean.float(), (directions * largest.sign()).float()


def spread(features: Tensor, experts: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """w_te phi(x_t) in the columns of every expert e of a token: features [T, q], experts int64 [T, k],
    weights [T, k] -> [T, E q]."""
    count, width = features.shape
    columns = features.new_zeros(count, num_experts, width)
    index = experts[:, :, None].expand(-1, -1, width)
    columns.scatter_add_(1, index, weights[:, :, None] * features[:, None])
    return columns.flatten(1)


class WeightedFeatures:
    """The columns of the regression, of one layer: w_te phi(x_t) of each of a token's experts, as served."""

    def __init__(self, mean: Tensor, basis: Tensor, num_experts: int) -> None:
        self.basis = basis.to(bfloat16).float()  # as it is kept
        self.offset = -(mean[:, None] @ self.basis)[:, 0]
        self.num_experts = num_experts
        self.size = num_experts * (1 + basis.shape[2])

    def parts(self, event: Any, output: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of a step and its routed output [T, D], by modality and part: the modality, columns float32
        [rows, E (1 + r)], outputs float32 [rows, D]."""
        for modality, chosen in enumerate(members_of(event)):
            for rows in chosen.nonzero()[:, 0].split(ROWS):
                own = slice(modality, modality + 1)
                hidden = event.hidden[rows].float()[None]
                (features,) = features_of(hidden, self.basis[own], self.offset[own])
                experts = event.experts[rows]
                weights = event.weights[rows].float() * (experts >= 0)
                columns = spread(features, experts.clamp(min=0), weights, self.num_experts)
                yield modality, columns, output[rows].float()


class Regression:
    """Second sweep, of one layer: ridge regression of its routed output on the weighted features of all of a
    token's experts together, by modality.

    The output of a token is a sum over its experts, so nothing has to be known where experts compute.
    """

    def __init__(self, mean: Tensor, basis: Tensor, num_experts: int) -> None:
        self.columns = WeightedFeatures(mean, basis, num_experts)
        size, features, device = self.columns.size, basis.shape[1], basis.device
        self.gram = torch.zeros(2, size, size, dtype=float32, device=device)
        self.right = torch.zeros(2, size, features, dtype=float32, device=device)
        self.count = torch.zeros(2, dtype=float64, device=device)

    @staticmethod
    def nbytes(num_experts: int, features: int, rank: int) -> int:
        """Memory of a layer."""
        size = num_experts * (1 + rank)
        return 8 * size * (size + features)

    @property
    def sums(self) -> list[Tensor]:
        """As of ``Moments``."""
        return [self.gram, self.right, self.count]

    def add(self, event: Any, output: Tensor) -> None:
        """As of ``Moments``."""
        for modality, columns, outputs in self.columns.parts(event, output):
            self.gram[modality] += columns.T @ columns
            self.right[modality] += columns.T @ outputs
            self.count[modality] += len(columns)

    def solve(self) -> Tensor:
        """Coefficients bfloat16 [2, E, 1 + r, D]; zero for an expert that no token of the modality chose."""
        size, features = self.right.shape[1:]
        experts, solved = self.columns.num_experts, []
        for gram, right in zip(self.gram.double().cpu(), self.right.double().cpu(), strict=True):
            weight = gram.diagonal().view(experts, -1)
            used = (weight[:, 0] > 0).sum().clamp(min=1)
            ridge = RIDGE * (weight.sum(0) / used).repeat(experts) + 1e-12
            solved.append(torch.linalg.solve(gram + torch.diag(ridge), right))
        return torch.stack(solved).view(2, experts, size // experts, features).to(bfloat16)


class Explained:
    """Third sweep, of one layer, over other requests: what is left of the routed output."""

    def __init__(self, mean: Tensor, basis: Tensor, num_experts: int, coefficients: Tensor) -> None:
        self.columns = WeightedFeatures(mean, basis, num_experts)
        self.coefficients = coefficients.to(basis.device).float().flatten(1, 2)
        self.squares = torch.zeros(2, 2, dtype=float64, device=basis.device)

    @staticmethod
    def nbytes(num_experts: int, features: int, rank: int) -> int:
        """Memory of a layer."""
        return 8 * num_experts * (1 + rank) * features

    @property
    def sums(self) -> list[Tensor]:
        """As of ``Moments``."""
        return [self.squares]

    def add(self, event: Any, output: Tensor) -> None:
        """As of ``Moments``."""
        for modality, columns, outputs in self.columns.parts(event, output):
            rest = outputs - columns @ self.coefficients[modality]
            self.squares[modality] += torch.stack([rest.square().sum(), outputs.square().sum()]).double()

    def share(self) -> Tensor:
        """1 - squares left over squares, float64 [2]; 0 where there was no token."""
        rest, whole = self.squares.cpu().unbind(1)
        return torch.where(whole > 0, 1 - rest / whole.clamp(min=1e-300), 0.0)
