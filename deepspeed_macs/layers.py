"""One MoE layer of DeepSpeed as MACS sees it."""

from __future__ import annotations

from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_comm import DEEPEP_BACKEND
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.runtime.zero.utils import is_zero_param
from deepspeed.utils import groups
from torch import Tensor, nn

from macs.adapters import (
    LayerAdapter,
    LayerRuntime,
    MACSConfig,
    Owner,
    Policy,
    Topology,
    policy_of,
)

from .autoep import folded_size


class DeepSpeedAdapter(LayerAdapter):
    """``LayerAdapter`` of a layer of DeepSpeed.

    weight: the router's, [E, D]. same_tokens: ranks of the expert-parallel group that hold the same tokens,
    and must make the same plan. blind: why visual tokens cannot be found, if so.
    """

    def __init__(
        self, layer: Any, weight: nn.Parameter, top_k: int, experts: int, same_tokens: int, blind: str | None
    ) -> None:
        ranks, group = layer.ep_size, layer.ep_group if layer.ep_size > 1 else None
        own = 0 if group is None else dist.get_rank(group=group)
        super().__init__(Topology(experts, ranks, sources=(own,)), top_k, group)
        self.owner = Owner(layer)
        self.same_tokens = same_tokens if ranks > 1 else 1
        self.blind = blind
        self._weight = weight
        # ZeRO-3 keeps a part of the rows on each rank, and putting them together within a forward pass would
        # disturb its own fetching: they are copied now, on all ranks together.
        self._rows = _gathered(weight) if is_zero_param(weight) else None
        # Its own fetching of the router would come before our exchange on one rank and after it on another.
        self.exchanges = self._rows is None

    def router_weight(self) -> Tensor:
        return self._weight if self._rows is None else self._rows

    def refetch(self) -> None:
        """Fetch the rows anew where ZeRO-3 keeps them in parts."""
        if self._rows is not None:
            with torch.inference_mode():
                self._rows.copy_(_gathered(self._weight))

    def refusal(self, policy: Policy) -> str | None:
        """Visual tokens must be found, and ranks with the same tokens must make the same plan."""
        if policy.adds_assignments and self.same_tokens > 1:
            return (
                f"the expert-parallel group holds {self.same_tokens} tensor-parallel ranks with the same "
                "tokens, which would add other experts of their own"
            )
        if policy.reads_modality and self.blind is not None:
            return (
                f"the visual tokens cannot be found ({self.blind}). Give image_token_id, or set "
                '"modality": "text" for a model that has nothing else, or "manual" and macs.modality(mask) '
                "around every forward pass"
            )
        return None


class GateAdapter(DeepSpeedAdapter):
    """Of ``deepspeed.moe.layer.MoE``."""

    def __init__(self, layer: MOELayer, same_tokens: int, blind: str | None) -> None:
        if groups._get_expert_model_parallel_world_size() > 1:
            same_tokens = 1  # then the group has one rank of every tensor-parallel group
        experts = layer.ep_size * layer.num_local_experts
        super().__init__(layer, layer.gate.wg.weight, layer.gate.k, experts, same_tokens, blind)

    def advice(self, policy: str, config: MACSConfig) -> list[str]:
        """The layer computes as many rows for every expert as the fullest one has."""
        advice, row = [], policy_of(policy)
        if self.owner().gate.drop_tokens:
            advice.append(
                "MACS: while it is on, deepspeed.moe.layer.MoE drops by its plan alone; drop_tokens and "
                "eval_capacity_factor have no effect"
            )
        chosen = row.configured(config)
        if row.plans and (chosen.level == "rank" or chosen.capacity_factor is None):
            advice.append(
                "MACS: deepspeed.moe.layer.MoE computes as many rows for every expert as the fullest one "
                "has: a capacity of a rank (level = rank, rank-balanced) and target_load do not shorten its "
                "steps; use policy = padded with a capacity_factor"
            )
        return advice


class AutoEPAdapter(DeepSpeedAdapter):
    """Of AutoEP."""

    def __init__(self, layer: AutoEPMoELayer, same_tokens: int, blind: str | None) -> None:
        same_tokens = max(same_tokens, folded_size(layer))
        weight = layer.router.gate.weight
        super().__init__(layer, weight, layer.top_k, layer.num_experts, same_tokens, blind)

    def refusal(self, policy: Policy) -> str | None:
        """DeepEP's buffers hold k assignments a token."""
        layer, reason = self.owner(), super().refusal(policy)
        deepep = layer.comm_backend == DEEPEP_BACKEND and layer.ep_size > 1
        if reason is None and policy.adds_assignments and deepep:
            return (
                f"the buffers of expert_parallel.comm_backend = 'deepep' hold {layer.top_k} assignments a "
                "token; use comm_backend = 'comm'"
            )
        return reason


def _gathered(weight: nn.Parameter) -> Tensor:
    """A copy of the whole of a weight that ZeRO-3 keeps in parts."""
    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


class LayerDone:
    """A hook at the end of ``MOELayer``, whose collectives come after its gate: it adds the estimates of what
    was dropped."""

    def __init__(self, macs: LayerRuntime) -> None:
        self.macs = macs

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.macs.done()
        return self.macs.compensate(output)
