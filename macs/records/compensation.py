"""Compensation of a model: what stands in for dropped assignments, as a profile keeps it, and its fit.

Shapes: L layers, T tokens, D features, E experts, k assignments of a token, r rank. Text is modality 0,
visual tokens are modality 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, bfloat16, float32, float64, int64

from ..checks import expect
from ..steps.compensation import CompensationTables, features_of

TENSORS = ("mean", "basis", "coefficients", "tokens", "explained")

SCOPES = {"none": (), "visual": (1,), "all": (0, 1)}
"""Modalities that a setting of ``compensation`` compensates."""

RIDGE = 1e-3
"""Added to the normal equations, over the mean weight of a feature."""

LEAST_VARIANCE = 1e-5
"""Of a direction of the basis, over the largest one and the mean's square."""

ROWS = 4096
"""Tokens that are added to the normal equations together."""


@dataclass(frozen=True)
class Compensation:
    """Estimates of every expert by modality, one layer a row, as the rows of a profile.

    mean float32 [L, 2, D]; basis bfloat16 [L, 2, D, r]; coefficients bfloat16 [L, 2, E, 1 + r, D]: see
    ``macs.steps.compensation``. tokens int64 [L, 2]: that it was fitted on. explained float64 [L, 2]: share
    of the squared routed output that it explains on requests it was not fitted on.
    """

    mean: Tensor
    basis: Tensor
    coefficients: Tensor
    tokens: Tensor
    explained: Tensor

    def __post_init__(self) -> None:
        expect("compensation.basis", self.basis, (None, 2, None, None), (bfloat16,))
        layers, _, features, rank = self.basis.shape
        expect("compensation.mean", self.mean, (layers, 2, features), (float32,))
        expect(
            "compensation.coefficients", self.coefficients, (layers, 2, None, 1 + rank, features), (bfloat16,)
        )
        expect("compensation.tokens", self.tokens, (layers, 2), (int64,))
        expect("compensation.explained", self.explained, (layers, 2), (float64,))
        for name in TENSORS:
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"compensation.{name}: found a number that is not finite")

    @property
    def rank(self) -> int:
        return self.basis.shape[-1]

    def explained_by_modality(self) -> dict[str, list[float]]:
        """``explained`` of every layer."""
        return dict(zip(("text", "visual"), self.explained.T.tolist(), strict=True))

    def tables(self, row: int, scope: str, router_weight: Tensor) -> CompensationTables:
        """One layer's tables for the modalities of ``SCOPES[scope]``; router_weight [E, D]: the layer's.

        Raises:
            ValueError: the layer has other experts or features.
        """
        shape = self.coefficients.shape[2], self.basis.shape[2]
        if shape != tuple(router_weight.shape):
            raise ValueError(
                f"compensation: measured with {shape[0]} experts of {shape[1]} features, found a layer of "
                f"{router_weight.shape[0]} experts of {router_weight.shape[1]} features"
            )
        chosen = list(SCOPES[scope])
        basis = self.basis[row, chosen].float()
        offset = -(self.mean[row, chosen][:, None] @ basis)[:, 0]
        table_of = torch.tensor([chosen.index(one) if one in chosen else -1 for one in (0, 1)])
        return CompensationTables(basis, offset, self.coefficients[row, chosen], table_of)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, as a file keeps them."""
        return {f"compensation_{name}": getattr(self, name).cpu().contiguous() for name in TENSORS}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Compensation:
        """From what a file kept."""
        fields: dict[str, Any] = {name: tensors[f"compensation_{name}"] for name in TENSORS}
        return cls(**fields)


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
