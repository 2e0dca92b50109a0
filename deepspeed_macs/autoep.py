"""DeepSpeed's expert-parallel layer for Hugging Face models (AutoEP), planning before it dispatches.

Here splits are uneven and experts compute what arrives: a dropped assignment is neither sent nor computed.
``AutoEPMoELayer`` assumes T k rows, so its data path is written out below, from its own parts, for as many
rows as the plan keeps.

Shapes: B sequences of S tokens, T = B S, D features, E experts, k experts a token by the router, k'
by the plan, N rows that are sent.
"""

from __future__ import annotations

import threading
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.module_inject import auto_ep_layer
from deepspeed.module_inject.auto_ep_comm import DEEPEP_BACKEND
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, RouterOutput
from deepspeed.moe import ep_tp_dispatch
from torch import Tensor, nn

from macs.adapters import LayerRuntime, candidate_scores, loads_of


class MACSAutoEPMoELayer(AutoEPMoELayer):
    """Plans between routing and dispatch. In ``train()`` mode or with MACS off it is the base class."""

    macs: LayerRuntime | None = None

    def train(self, mode: bool = True) -> MACSAutoEPMoELayer:
        """As the base class; where serving begins, the router's rows are those of now."""
        super().train(mode)
        if not mode and self.macs is not None:
            self.macs.refresh()
        return self

    def _forward(self, hidden_states: Tensor) -> Any:
        """hidden_states [B, S, D] -> what the base class returns."""
        if self.macs is None:
            return super()._forward(hidden_states)
        count = hidden_states.shape[:-1].numel()
        with self.macs.forward_pass(count, hidden_states.device, self.training) as acts:
            return self._planned_forward(hidden_states) if acts else super()._forward(hidden_states)

    def _planned_forward(self, hidden_states: Tensor) -> Any:
        assert self.macs is not None
        batch, length, features = hidden_states.shape
        tokens = self.macs.tokens(batch, length, sequence_major=False, device=hidden_states.device)
        x = hidden_states.reshape(-1, features)
        weights, experts, counts, scores = self._scored_routes(x)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)  # the router's, as ever
        plan = self.macs.plan(x, experts, weights, scores, tokens)
        if plan is not None:
            experts, weights = plan.experts, plan.weights
            counts = loads_of(experts, self.num_experts).int()
        routed = RouterOutput(weights, experts, counts)
        shape = (batch, length, features)
        if self.ep_size > 1 and self.comm_backend == DEEPEP_BACKEND:
            output = self._deepep_route(x, routed).reshape(shape)
        elif folded_size(self) > 1:
            output = self._folded_route(x, routed, shape)
        else:
            output = self._route(x, routed, shape)
        output = self.macs.compensate(output)
        return self._finalize_output(output, x, hidden_states, features)

    def _scored_routes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The router's choice for x [T, D]: weights [T, k], experts int64 [T, k], loads int32 [E]; and
        the scores of all experts, float32 [T, E], 0 for those outside the groups the token uses."""
        router, thread, logits = self.router, threading.get_ident(), []

        def keep(gate: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if threading.get_ident() == thread:
                logits.append(output)

        handle = router.gate.register_forward_hook(keep)
        try:
            weights, experts, counts = router(x, self.expert_bias)
        finally:
            handle.remove()
        biases = [bias for bias in (self.expert_bias, router.e_score_correction_bias) if bias is not None]
        bias = sum(biases[1:], biases[0].float()) if biases else None
        groups = router.num_expert_groups, router.num_limited_groups
        scores = candidate_scores(logits[0], experts, router.score_func, bias, *groups)
        return weights, experts, counts, scores

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

        The number of rows comes to the host here, as with the engine's own splits; where there is one
        rank the engine knows it beforehand, so that this is one synchronisation more.
        """
        if self.ep_size == 1:
            kept = [int(loads.sum())]
            return loads, (kept, kept)
        if self.async_split_plan:
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
    for name, value, why in (
        ("combine_impl", "fused_weighted_sum", "its kernel assumes T k rows"),
        ("row_weighting_impl", "fused", "untried"),
    ):
        if getattr(layer, name) == value:
            raise ValueError(
                f"expert_parallel.{name} = {value!r} cannot be used with MACS: {why}; leave it unset"
            )
