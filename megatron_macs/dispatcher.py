"""Megatron's token dispatchers, planning before anything is sent.

``dispatch_preprocess`` sees hidden states, routing map and weights together, before any
communication: the plan replaces map and weights there, and the engine's own dispatch, all-to-all
and combine do the rest.

Shapes: S tokens of B sequences, T = S B tokens in the order s B + b, E experts, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from macs.adapters import LayerRuntime, Plan, candidate_scores, routing_from_map


class PlansFirst(MoETokenDispatcher):
    """Mixin: applies the plan, then calls ``super()``."""

    macs: LayerRuntime
    planned = False
    chunk: Chunk | None = None  # as ``MACSMoELayer`` finds it

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [S, B, D], routing_map bool [T, E], probs [T, E]: as the base class."""
        self.planned = False
        if self.macs.logits is not None:
            choice = routing_from_map(routing_map, probs, self.macs.top_k)
            plan = self.plan(hidden_states, *choice, self.config.mlp_chunks_for_prefill)
            if plan is not None:
                self.planned, planned = True, plan.as_map(routing_map.shape[1])
                fused = self.config.moe_permute_fusion
                routing_map, probs = keep_a_row(*planned, routing_map) if fused else planned
        return super().dispatch_preprocess(hidden_states, routing_map, probs)

    def combine_postprocess(self, *args: Any) -> Tensor:
        """As the base class -> [S, B, D], with the estimates of what was dropped."""
        return self.macs.compensate(super().combine_postprocess(*args))

    def plan(self, hidden: Tensor, experts: Tensor, weights: Tensor, chunks: int = 1) -> Plan | None:
        """The layer's plan: hidden [S, B, D], experts and weights [T, k]. None without logits from the router
        (in ``train()`` mode, with MACS off) and while MACS calibrates.

        chunks: into how many the engine divides the tokens.
        """
        layer, config = self.macs, self.config
        logits, layer.logits = layer.logits, None
        if logits is None:
            return None
        adapter: Any = layer.adapter
        bias = adapter.owner().router.expert_bias
        groups = config.moe_router_num_groups, config.moe_router_group_topk
        scores = candidate_scores(logits, experts, config.moe_router_score_function, bias, *groups)
        length, batch = hidden.shape[:2]
        first = 0 if self.chunk is None else self.chunk.first
        tokens = layer.tokens(batch, length, True, hidden.device, first, chunks)
        return layer.plan(hidden.flatten(0, 1), experts, weights, scores, tokens)


class MACSAllGatherTokenDispatcher(PlansFirst, MoEAllGatherTokenDispatcher):
    """The all-gather dispatcher: every rank gets all tokens, and computes its planned ones."""


class MACSAlltoAllTokenDispatcher(PlansFirst, MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher: what is dropped is neither sent nor computed."""

    cuda_dtoh_point: str
    engine_dtoh_point: str | None = None

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Split sizes of the all-to-all, for as many rows as the plan kept."""
        # The base class only moves its sync point earlier; a step without a plan must have its own.
        self.cuda_sync_point = "no_sync"
        # Where CUDA graphs are on, the base class copies to the host only after what it sends is
        # permuted, which is too late for a count that the permutation needs.
        if self.engine_dtoh_point is None:
            self.engine_dtoh_point = self.cuda_dtoh_point
        self.cuda_dtoh_point = "before_permutation_1" if self.planned else self.engine_dtoh_point
        tokens_per_expert = super().preprocess(routing_map)
        if self.planned:
            # The base class assumes T k rows. The count is on the device and comes to the host with the split
            # sizes, at the engine's own sync point for dropping.
            self.num_out_tokens = routing_map.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert


class MACSFlexTokenDispatcher(PlansFirst, MoEFlexTokenDispatcher):
    """The dispatcher over DeepEP or HybridEP: what is dropped is neither sent nor computed."""

    def _initialize_metadata(self, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Map and weights [T, E] for the whole group, on their way to the communication manager."""
        if self.config.moe_flex_dispatcher_backend == "deepep":
            # HybridEP reads the map. DeepEP's manager takes the k largest weights, and marks weights of 0 as
            # dropped (-1) only if a capacity factor is set.
            self._comm_manager.capacity_factor = 1.0 if self.planned else None
        return super()._initialize_metadata(routing_map, probs)


def keep_a_row(planned: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
    """The plan's map bool [T, E] and probs [T, E]. If it drops every row, the first token keeps its first
    expert with weight 0: fused permutation kernels assert that there is a row."""
    if not len(planned):
        return planned, probs
    first = routing_map[0] & (routing_map[0].cumsum(0) == 1)
    kept = planned.clone()
    kept[0] |= first & ~planned.any()
    return kept, probs


@dataclass(frozen=True)
class Chunk:
    """The position of a chunk in the hidden states (``mlp_chunks_for_prefill``).

    memory: address of the storage. offset, end: of this chunk in it. first: first token of every sequence.
    """

    memory: int
    offset: int
    end: int
    first: int

    @classmethod
    def of(cls, hidden: Tensor, former: Chunk | None) -> Chunk:
        """The chunk hidden [S, B, D]: the next one if it begins where the former one, a view of the same
        memory, ended; otherwise the first of another forward pass."""
        memory, offset = hidden.untyped_storage().data_ptr(), int(hidden.storage_offset())
        end = offset + int(hidden.shape[0] * hidden.stride(0))
        follows = former is not None and (former.memory, former.end) == (memory, offset)
        before = former.end - former.offset if former is not None else 0
        first = former.first + before // hidden.stride(0) if former is not None and follows else 0
        return cls(memory, offset, end, first)
