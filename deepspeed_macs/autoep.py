"""DeepSpeed's expert-parallel layer for Hugging Face models (AutoEP), planning before it dispatches.

Here splits are uneven and experts compute what arrives: an assignment that is dropped is neither sent
nor computed. ``AutoEPMoELayer`` takes T k rows for granted, so its data path is written out below,
from its own parts, for as many rows as the plan keeps.

Shapes: B sequences of S tokens, T = B S, D features, E experts, k experts a token by the router, k'
by the plan, N rows that are sent.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.module_inject import auto_ep_layer
from deepspeed.module_inject.auto_ep_comm import COMM_BACKEND, DEEPEP_BACKEND
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, RouterOutput
from deepspeed.moe import ep_tp_dispatch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import Tensor, nn

from macs import LayerRuntime, full_scores

from .gate import loads_of


class MACSTokenChoiceTopKRouter(TokenChoiceTopKRouter):
    """Routes as its base class does, and hands the full scores on."""

    macs: LayerRuntime | None = None

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> weights [T, k], experts int64 [T, k], loads int32 [E] of the base class."""
        if self.macs is None or self.training or not self.macs.awaits_scores:
            return super().forward(x, expert_bias)
        logits: list[Tensor] = []

        def keep(gate: nn.Module, inputs: Any, output: Tensor) -> None:
            logits.append(output)

        handle = self.gate.register_forward_hook(keep)
        try:
            routed = super().forward(x, expert_bias)
        finally:
            handle.remove()
        scores = full_scores(logits[0], self.score_func)
        self.macs.offer_scores(scores.masked_fill(~self._eligible(scores, expert_bias), 0.0))
        return routed

    def _eligible(self, scores: Tensor, expert_bias: Tensor | None) -> Tensor:
        """Which experts the token's groups hold, bool [T, E]; all, where routing knows no groups."""
        if self.num_expert_groups is None:
            return torch.ones_like(scores, dtype=torch.bool)
        choice = scores
        for bias in (expert_bias, self.e_score_correction_bias):
            choice = choice if bias is None else choice + bias
        return ~torch.isneginf(self._get_node_limited_routing_scores(choice))


class MACSAutoEPMoELayer(AutoEPMoELayer):
    """Plans between routing and dispatch. In ``train()`` mode or with MACS off it is the base class."""

    macs: LayerRuntime | None = None

    @classmethod
    def adopt(cls, layer: AutoEPMoELayer, macs: LayerRuntime) -> None:
        """Turn an engine's layer into one of these, in place: weights, hooks and groups stay."""
        layer.__class__ = cls
        layer.router.__class__ = MACSTokenChoiceTopKRouter
        layer.macs = layer.router.macs = macs

    def _forward(self, hidden_states: Tensor) -> Any:
        """hidden_states [B, S, D] -> what the base class returns."""
        if self.macs is None or self.training or not self.macs.awaits_scores:
            return super()._forward(hidden_states)
        batch, length, features = hidden_states.shape
        tokens = self.macs.tokens(batch, length, sequence_major=False, device=hidden_states.device)
        x = hidden_states.reshape(-1, features)
        weights, experts, _ = self.router(x, self.expert_bias)
        scores = self.macs.take_scores()
        assert scores is not None
        plan = self.macs.plan(x, experts, weights, scores, tokens)
        if plan is not None:
            experts, weights = plan.experts, plan.weights
        routed = RouterOutput(weights, experts, loads_of(experts, self.num_experts).int())
        with torch.no_grad():
            self.tokens_per_expert.add_(routed.num_tokens_per_expert)
        if self.ep_size > 1 and self.comm_backend == DEEPEP_BACKEND:
            output = self._deepep_route(x, routed).reshape(batch, length, features)
        elif folded_size(self) > 1:
            output = self._folded_route(x, routed, (batch, length, features))
        else:
            output = self._route(x, routed, (batch, length, features))
        return self._finalize_output(output, x, hidden_states, features)

    def _route(self, x: Tensor, routed: RouterOutput, shape: tuple[int, int, int]) -> Tensor:
        """Send rows to their experts and combine what comes back: x [T, D] -> ``shape`` [B, S, D]."""
        slots = routed.selected_experts.shape[1]
        local_counts, splits = self._splits(routed.num_tokens_per_expert)
        rows = self._rows_by_expert(routed)[: sum(splits[0])]
        sent = auto_ep_layer.apply_scores_before_experts_if_enabled(
            x[rows // slots], routed.top_scores.flatten()[rows], score_apply=self.score_apply
        )
        return auto_ep_layer.combine_from_routed(
            self._compute(sent, local_counts, splits),
            top_scores=routed.top_scores,
            token_indices_sorted=rows,
            top_k=slots,
            score_apply=self.score_apply,
            combine_impl=self.combine_impl,
            shape=shape,
        )

    def _folded_route(self, x: Tensor, routed: RouterOutput, shape: tuple[int, int, int]) -> Tensor:
        """As ``_route`` where tensor-parallel ranks hold the same tokens: each sends its part of the rows,
        and all get all results."""
        slots = routed.selected_experts.shape[1]
        rows = self._rows_by_expert(routed)[: int(routed.num_tokens_per_expert.sum())]
        experts = routed.selected_experts.flatten()[rows]
        weights = routed.top_scores.flatten()[rows]
        nothing = torch.zeros_like(rows, dtype=torch.bool)
        payload = ep_tp_dispatch.RoutedAssignmentPayload(
            token_indices=rows // slots,
            expert_indices=experts,
            assignment_indices=ep_tp_dispatch.assignment_ordinals_by_expert(experts),
            capacity_slots=rows % slots,
            combine_weights=weights if self.score_apply == "post" else torch.ones_like(weights),
            drop_mask=nothing,
            pad_mask=nothing,
            input_splits=[0] * self.ep_size,
            output_splits=[0] * self.ep_size,
            extra={
                "destination_ranks": experts // self.num_local_experts,
                "top_scores": weights,
                "num_tokens": torch.tensor(len(x), device=x.device),
            },
        )
        tp_size = self.folding_group_handles.spec.tp_size
        if self.validate_folding_routing:
            ep_tp_dispatch.assert_tp_payload_consistent(payload, tp_group=self.tp_group, tp_size=tp_size)
        part, context = ep_tp_dispatch.partition_assignments(
            payload, tp_group=self.tp_group, tp_rank=dist.get_rank(group=self.tp_group), tp_size=tp_size
        )
        sent = auto_ep_layer.apply_scores_before_experts_if_enabled(
            x[part.token_indices], part.extra["top_scores"], score_apply=self.score_apply
        )
        plan = auto_ep_layer.compute_split_plan_from_expert_indices(
            part.expert_indices, self.num_experts, self.ep_size, self.num_local_experts, self.ep_group
        )
        computed = self._compute(sent, plan.local_counts_by_source, (plan.input_splits, plan.output_splits))
        return ep_tp_dispatch.restore_combined(
            computed, context, tp_group=self.tp_group, validate_coverage=self.validate_folding_routing
        ).reshape(shape)

    def _rows_by_expert(self, routed: RouterOutput) -> Tensor:
        """Assignments by expert and, within one, by token; what is dropped comes last. int64 [T k']"""
        experts = routed.selected_experts.flatten()
        return torch.argsort(torch.where(experts < 0, self.num_experts, experts), stable=True)

    def _compute(self, sent: Tensor, local_counts: Tensor, splits: tuple[list[int], list[int]]) -> Tensor:
        """Rows [N, D] there, through their experts, and back: [N, D]."""
        if self.ep_size > 1:
            sent = auto_ep_layer._AllToAllV.apply(self.ep_group, sent, *splits)
        sent, order, aligned_counts, arrived = auto_ep_layer.permute_by_local_expert(sent, local_counts)
        computed = auto_ep_layer.unpermute_by_local_expert(self.experts(sent, aligned_counts), order, arrived)
        if self.ep_size > 1:
            computed = auto_ep_layer._AllToAllV.apply(self.ep_group, computed, *reversed(splits))
        return computed

    def _splits(self, loads: Tensor) -> tuple[Tensor, tuple[list[int], list[int]]]:
        """Arrivals by local expert, and the rows this rank sends to and gets from each rank.

        The engine brings the splits to the host here, with or without MACS.
        """
        if self.ep_size == 1:
            kept = [int(loads.sum())]
            return loads, (kept, kept)
        if self.async_split_plan and self.comm_backend == COMM_BACKEND:
            plan = self._wait_async_split_plan(self._start_async_split_plan(loads))
        else:
            plan = auto_ep_layer._split_plan_from_expert_counts(
                loads, self.ep_size, self.num_local_experts, self.ep_group
            )
        return plan.local_counts_by_source, (plan.input_splits, plan.output_splits)


def folded_size(layer: AutoEPMoELayer) -> int:
    """Tensor-parallel ranks that hold the same tokens as this one, itself included."""
    handles = layer.folding_group_handles
    return 1 if handles is None else handles.spec.tp_size


def check_options(layer: AutoEPMoELayer) -> None:
    """Raise a ``ValueError`` that names the option of AutoEP that MACS cannot work with, and why."""
    if layer.combine_impl == "fused_weighted_sum":
        raise ValueError(
            "expert_parallel.combine_impl = 'fused_weighted_sum' cannot be used with MACS: its kernel "
            "takes T k rows for granted; leave it unset"
        )
