"""Compensation of a model: what stands in for dropped assignments, as a profile keeps it.

Shapes: L layers, D features, E experts, r rank. Text is modality 0, visual tokens are modality 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, bfloat16, float32, float64, int64

from ..checks import expect
from ..steps.compensation import CompensationTables

TENSORS = ("mean", "basis", "coefficients", "tokens", "explained")

SCOPES = {"none": (), "visual": (1,), "all": (0, 1)}
"""Modalities that a setting of ``compensation`` compensates."""


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
