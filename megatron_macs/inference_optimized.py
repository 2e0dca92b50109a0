"""Megatron's inference-optimised MoE layer, as of 0.19: its router and its two dispatchers.

Here the router returns a token's k experts instead of a map over all of them, the dispatchers gather every
rank's tokens, and the layer switches between its two dispatchers from one forward pass to the next. A
dropped assignment is expert -1, which the grouped GEMM kernels skip as they skip padding.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.router import InferenceTopKRouter
from megatron.core.transformer.moe.token_dispatcher_inference import (
    NCCLAllGatherDispatcher,
    NVLSAllGatherVDispatcher,
)
from torch import Tensor

from .dispatcher import PlansFirst
from .router import MACSTopKRouter


class MACSInferenceTopKRouter(MACSTopKRouter, InferenceTopKRouter):
    """Routes as its base class, with and without an inference engine, and offers the logits."""

    def _compiled_topk_routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """probs [T, k] and experts int64 [T, k] of the base class, from logits [T, E]."""
        routed = super()._compiled_topk_routing(logits, *args, **kwargs)
        self.offer_logits(logits)
        return routed


class PlansChoice(PlansFirst):
    """``PlansFirst`` where the router's choice comes as k experts a token."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [S, B, D], routing_map int64 [T, k] experts, probs [T, k]: as the base class."""
        plan = self.plan(hidden_states, routing_map, probs)
        if plan is not None:
            routing_map, probs = plan.experts, plan.weights
        return super(PlansFirst, self).dispatch_preprocess(hidden_states, routing_map, probs)


class MACSNCCLAllGatherDispatcher(PlansChoice, NCCLAllGatherDispatcher):
    """The all-gather of ``inference_moe_token_dispatcher_type = "nccl"``."""


class MACSNVLSAllGatherVDispatcher(PlansChoice, NVLSAllGatherVDispatcher):
    """The uneven all-gather of ``inference_moe_token_dispatcher_type = "nvls"``."""
