"""Compensation: an estimate in the place of a dropped assignment's expert output (ours).

    output_t += sum over dropped e of w_te phi(x_t) B_ec        phi(x) = [1, (x - mean_c) A_c]

by expert e and modality c of the token: A_c a basis of rank r that a layer's experts share, B_ec the
coefficients of each, fitted by ``macs tune``. It is computed where the token is; nothing is sent.

Shapes: T tokens, D features, E experts, k assignments of a token, M modalities, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..tokens import TEXT, Tokens
from .kernels.dispatch import kernels_enabled, on_device

ALIGNED = 4
"""Float32 numbers that rows of a grouped product are multiples of on a CPU."""


@dataclass(frozen=True)
class CompensationTables:
    """The estimates of one layer, for the modalities that are compensated.

    basis [M, D, r]; offset float32 [M, r]: -mean A; coefficients [M, E, 1 + r, D]. float32 on a CPU, where
    directions of zeros may follow, otherwise bfloat16. table_of int64 [2]: which table text (0) and visual
    tokens (1) have; -1: none.
    """

    basis: Tensor
    offset: Tensor
    coefficients: Tensor
    table_of: Tensor

    def to(self, device: torch.device) -> CompensationTables:
        """The tables on a device, in the dtypes used there."""
        wide = torch.float32 if device.type == "cpu" else torch.bfloat16
        padding = -self.coefficients.shape[2] % ALIGNED if device.type == "cpu" else 0
        return CompensationTables(
            functional.pad(self.basis.to(device, wide), (0, padding)).contiguous(),
            functional.pad(self.offset.to(device, torch.float32), (0, padding)).contiguous(),
            functional.pad(self.coefficients.to(device, wide), (0, 0, 0, padding)).contiguous(),
            self.table_of.to(device),
        )


@dataclass(frozen=True)
class Dropped:
    """What a step dropped.

    hidden [T, D]: features that enter the layer. experts int64 [T, k], weights [T, k]: the router's choice.
    planned int64 [T, k']: the plan's; its first k entries are where those of ``experts`` went, -1: dropped.
    tokens: their modality.
    """

    hidden: Tensor
    experts: Tensor
    weights: Tensor
    planned: Tensor
    tokens: Tokens


def compensate(output: Tensor, dropped: Dropped, tables: CompensationTables) -> Tensor:
    """Add the estimates to a layer's routed output.

    Args:
        output: [T, D], any float dtype, combined from the assignments that were not dropped.
        dropped: of the same tokens.
        tables: of the layer, on the same device.

    Returns:
        [T, D] in the output's dtype, added in float32; a token without a dropped assignment keeps its row
        bit for bit.
    """
    with torch.no_grad(), on_device(output.device):
        if kernels_enabled(output.device):
            from .kernels import compensation as kernels

            result = kernels.compensate(output, dropped, tables)
        else:
            result = _compensate(output, dropped, tables)
    return _WithGradient.apply(output, result) if output.requires_grad else result  # type: ignore[no-untyped-call]


class _WithGradient(torch.autograd.Function):
    """A result with the gradient of what it was added to; estimates have none."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, result: Tensor) -> Tensor:
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def _compensate(output: Tensor, dropped: Dropped, tables: CompensationTables) -> Tensor:
    (count, k), (many, num_experts) = dropped.experts.shape, tables.coefficients.shape[:2]
    of_text, of_visual = tables.table_of
    table = torch.where(dropped.tokens.modality == TEXT, of_text, of_visual)
    lost = (dropped.planned[:, :k] < 0) & (dropped.experts >= 0)
    if many == 1:
        lost &= (table >= 0)[:, None]
    at = lost.flatten().nonzero()[:, 0]
    index = torch.add(dropped.experts.flatten()[at], table[at // k], alpha=num_experts)
    index, order = index.sort(stable=True)
    at = at[order]
    token = at // k
    hidden = dropped.hidden.float().expand(many, count, -1)
    features = features_of(hidden, tables.basis, tables.offset)[table[token], token]
    weighted = features * dropped.weights.flatten()[at].float()[:, None]
    products = by_table(weighted, index, tables.coefficients.flatten(0, 1))
    wide = torch.promote_types(output.dtype, torch.float32)
    return output.to(wide).index_add(0, token, products.to(wide)).to(output.dtype)


def by_table(features: Tensor, index: Tensor, coefficients: Tensor) -> Tensor:
    """Products of rows float32 [N, q] with the table of each, of coefficients [M E, q, D]; index int64 [N]
    rises. A grouped product where torch has one for these sizes, otherwise one for each table."""
    coefficients = coefficients.float()
    aligned = not coefficients.shape[1] % ALIGNED and not coefficients.shape[2] % ALIGNED
    if hasattr(functional, "grouped_mm") and features.device.type == "cpu" and aligned and len(features):
        last = torch.arange(1, len(coefficients) + 1)
        ends = torch.searchsorted(index, last, out_int32=True)
        return functional.grouped_mm(features, coefficients, offs=ends)
    counts = index.bincount(minlength=len(coefficients))
    parts = zip(features.split(counts.tolist()), coefficients, strict=True)
    return torch.cat([part @ table for part, table in parts])


def features_of(hidden: Tensor, basis: Tensor, offset: Tensor) -> Tensor:
    """phi(x), float32 [M, T, 1 + r], of hidden float32 [M, T, D] by basis [M, D, r] and offset [M, r]."""
    return functional.pad(torch.baddbmm(offset[:, None], hidden, basis.float()), (1, 0), value=1.0)
