"""Megatron's top-k router, which offers the logits of all experts to the planner."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from macs.adapters import LayerRuntime


class MACSTopKRouter(TopKRouter):
    """Routes as its base class, and offers the logits in ``eval()`` mode.

    ``macs`` is set by ``MACSMoELayer``; without it this is the base class.
    """

    macs: LayerRuntime | None = None

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] of input [S, B, D]; unlike in the base class, also for no tokens."""
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.config.num_moe_experts)
        return super().gating(input)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """probs [T, E] and routing_map [T, E] of the base class, from logits [S, B, E]."""
        routed = super().routing(logits, *args, **kwargs)
        self.offer_logits(logits)
        return routed

    def offer_logits(self, logits: Tensor) -> None:
        """Offer logits [S, B, E] or [T, E] to the dispatcher, where it is to plan them."""
        if self.macs is not None:
            # None also clears what an interrupted forward pass may have left.
            self.macs.logits = logits.flatten(0, -2) if self.macs.acts else None
