"""What a dropped assignment leaves behind: an estimate of its expert's output (ours).

    output_t += sum over dropped e of w_te phi(x_t) B_ec        phi(x) = [1, (x - mean_c) A_c]

by expert e and modality c of the token: A_c a basis of rank r that a layer's experts share, B_ec the
coefficients of each, fitted by ``macs tune``. It is computed where the token is; nothing is sent.

Shapes: T tokens, D features, E experts, k assignments of a token, M modalities, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..tokens import Tokens
from .kernels.dispatch import kernels_enabled


@dataclass(frozen=True)
class CompensationTables:
    """The estimates of one layer, for the modalities that are compensated.

    basis [M, D, r]; offset float32 [M, r]: -mean A; coefficients [M, E, 1 + r, D]. float32 on a CPU,
    otherwise bfloat16. table_of int64 [2]: which table text (0) and visual tokens (1) have; -1: none.
    """

    basis: Tensor
    offset: Tensor
    coefficients: Tensor
    table_of: Tensor

    def to(self, device: torch.device) -> CompensationTables:
        """The tables on a device, in the dtypes used there."""
        wide = torch.float32 if device.type == "cpu" else torch.bfloat16
        return CompensationTables(
            self.basis.to(device, wide).contiguous(),
            self.offset.to(device, torch.float32).contiguous(),
            self.coefficients.to(device, wide).contiguous(),
            self.table_of.to(device),
        )

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return sum(getattr(self, one.name).nbytes for one in fields(self))


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
    if kernels_enabled(output.device):
        from .kernels import compensation as kernels

        return kernels.compensate(output, dropped, tables)
    lost = (dropped.planned[:, : dropped.experts.shape[1]] < 0) & (dropped.experts >= 0)
    table = tables.table_of[dropped.tokens.visual.long()]
    rows = (lost.any(1) & (table >= 0)).nonzero()[:, 0]
    lost, table, hidden = lost[rows], table[rows], dropped.hidden[rows].float()
    experts, weights = dropped.experts[rows].clamp(min=0), dropped.weights[rows].float() * lost
    result = output.clone()
    for index in range(len(tables.basis)):
        here = (table == index).nonzero()[:, 0]
        features = features_of(hidden[here], tables, index)
        by_expert = spread(features, experts[here], weights[here], tables.coefficients.shape[1])
        estimate = by_expert @ tables.coefficients[index].flatten(0, 1)
        tokens = rows[here]
        result[tokens] = (output[tokens].float() + estimate).to(output.dtype)
    return result


def features_of(hidden: Tensor, tables: CompensationTables, index: int) -> Tensor:
    """phi(x), float32 [T, 1 + r], of hidden float32 [T, D] by one of the tables."""
    projected = torch.addmm(tables.offset[index], hidden, tables.basis[index].float())
    return torch.cat([projected.new_ones(len(projected), 1), projected], 1)


def spread(features: Tensor, experts: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """w_te phi(x_t) in the columns of every expert e of a token: features [T, q], experts int64 [T, k],
    weights [T, k] -> [T, E q]."""
    count, width = features.shape
    columns = features.new_zeros(count, num_experts, width)
    index = experts[:, :, None].expand(-1, -1, width)
    columns.scatter_add_(1, index, weights[:, :, None] * features[:, None])
    return columns.flatten(1)
