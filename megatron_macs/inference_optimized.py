"""Megatron's inference-optimised MoE layer, as of 0.19: its router and its two dispatchers.

There the router hands on a token's k experts instead of a map over all of them, the dispatchers gather
every rank's tokens, and the layer changes between its two dispatchers from one forward pass to the
next. A dropped assignment is expert -1, which the grouped GEMM kernels pass over as they do padding.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.router import InferenceTopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.moe.token_dispatcher_inference import (
    NCCLAllGatherDispatcher,
    NVLSAllGatherVDispatcher,
)
from torch import Tensor

from macs import LayerRuntime

from .dispatcher import plan_of
from .router import MACSTopKRouter


class MACSInferenceTopKRouter(MACSTopKRouter, InferenceTopKRouter):
    """Routes as its base class does, with an inference engine and without, and hands the scores on."""

    def _compiled_topk_routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """probs [T, k] and experts int64 [T, k] of the base class, from logits [T, E]."""
        routed = super()._compiled_topk_routing(logits, *args, **kwargs)
        self.offer_scores(logits)
        return routed


class _PlansChoice(MoETokenDispatcher):
    """Plans, then does what the dispatcher behind it in the class's order does."""

    macs: LayerRuntime

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [S, B, D], routing_map int64 [T, k] experts, probs [T, k]: as the base class."""
        scores = self.macs.take_scores()
        plan = None if scores is None else plan_of(self.macs, hidden_states, routing_map, probs, scores)
        if plan is not None:
            routing_map, probs = plan.experts, plan.weights
        return super().dispatch_preprocess(hidden_states, routing_map, probs)


class MACSNCCLAllGatherDispatcher(_PlansChoice, NCCLAllGatherDispatcher):
    """The all-gather of ``inference_moe_token_dispatcher_type = "nccl"``."""


class MACSNVLSAllGatherVDispatcher(_PlansChoice, NVLSAllGatherVDispatcher):
    """The uneven all-gather of ``inference_moe_token_dispatcher_type = "nvls"``."""
