"""Megatron's top-k router, keeping the scores of all experts for the planner."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from macs import LayerRuntime, full_scores, without_outcasts


class MACSTopKRouter(TopKRouter):
    """Routes as its base class does, and hands the full scores on in ``eval()`` mode.

    ``macs`` is set by ``MACSMoELayer``; without it this is the base class.
    """

    macs: LayerRuntime | None = None

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] of input [S, B, D]; unlike the base class, of no tokens too."""
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.config.num_moe_experts)
        return super().gating(input)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """probs [T, E] and routing_map [T, E] of the base class, from logits [S, B, E]."""
        routed = super().routing(logits, *args, **kwargs)
        self.offer_scores(logits)
        return routed

    def offer_scores(self, logits: Tensor) -> None:
        """Scores of logits [S, B, E] or [T, E] for the dispatcher, where it is to plan them."""
        if self.macs is None:
            return
        self.macs.take_scores()  # what an interrupted forward pass may have left
        # A static engine may have the experts padded while it decodes, which leaves nothing to plan.
        padded = self.config.moe_pad_expert_input_to_capacity
        if not self.training and not padded and self.macs.acts_on(logits.shape[:-1].numel(), logits.device):
            scores = full_scores(logits.flatten(0, -2), self.score_function)
            groups = self.config.moe_router_num_groups, self.config.moe_router_group_topk
            self.macs.offer_scores(without_outcasts(scores, self.expert_bias, self.macs.top_k, *groups))
