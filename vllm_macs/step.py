"""Which tokens of a step are visual, and whether a step is planned."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from macs.adapters import Modality, modality

logger = logging.getLogger("vllm.macs")


def is_planned() -> bool:
    """Whether this is a step of requests in which Python runs: no profile run, no CUDA graph."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return False
    context = get_forward_context()
    return context.cudagraph_runtime_mode == CUDAGraphMode.NONE and context.attn_metadata is not None


class StepModality:
    """Sets the modality around a model's forward pass, from what its runner hands to ``embed_input_ids``.

    The runner does that for the step's tokens, before the pass, and not in profile runs. A text-only model
    has text alone.
    """

    def __init__(self, model: nn.Module, multimodal: bool) -> None:
        self.multimodal = multimodal
        self.seen: tuple[int, Tensor | None] | None = None
        self._entered, self._warned = ExitStack(), False
        if multimodal:
            self._embed: Any = model.embed_input_ids
            model.embed_input_ids = self._look  # type: ignore[assignment]
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)

    def _look(self, input_ids: Tensor, *given: Any, **named: Any) -> Tensor:
        visual = given[1] if len(given) > 1 else None
        visual = named.get("is_multimodal", visual)
        self.seen = len(input_ids), visual
        found: Tensor = self._embed(input_ids, *given, **named)
        return found

    def _enter(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not is_planned():
            return
        if self.multimodal and self.seen is None:
            if not self._warned:
                logger.warning("MACS: a step came without the mask of its visual tokens, and is not planned")
            self._warned = True
            return
        rows = named.get("inputs_embeds")
        rows = named.get("input_ids", given[0] if given else None) if rows is None else rows
        if rows is not None:
            self._entered.enter_context(modality(self._modality(len(rows), rows.device)))

    def _modality(self, count: int, device: torch.device) -> Modality:
        """Of ``count`` rows, the last of which may be padding. [1, count]"""
        from vllm.forward_context import get_forward_context

        visual = torch.zeros(count, dtype=torch.bool, device=device)
        real = count if self.seen is None else self.seen[0]
        if self.seen is not None and self.seen[1] is not None:
            visual[:real] = self.seen[1].to(device, non_blocking=True)
        valid = torch.arange(count, device=device) < real
        padding = getattr(get_forward_context(), "is_padding", None)
        if padding is not None:
            valid &= ~padding[:count]
        return Modality.of(visual[None], valid=valid[None])

    def _leave(self, *_: Any) -> None:
        self._entered.close()
        self.seen = None
