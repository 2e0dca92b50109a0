"""Which token is which, from a model's input ids, at every forward pass."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from macs import AUDIO, IMAGE, TEXT, VIDEO, Modality, current_modality, modality


class ModalityHook:
    """The hooks ``attach_modality`` set; ``remove`` takes them off."""

    def __init__(self, model: nn.Module, token_ids: dict[int, int], padding_id: int | None) -> None:
        self._token_ids = token_ids
        self._padding_id = padding_id
        self._signature = inspect.signature(model.forward)
        self._open: list[ExitStack] = []
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def modality_of(self, input_ids: Tensor) -> Modality:
        """input_ids int [B, S] -> the modality of every token."""
        kinds = torch.full_like(input_ids, TEXT, dtype=torch.int8)
        for token_id, kind in self._token_ids.items():
            kinds = torch.where(input_ids == token_id, kind, kinds)
        valid = None if self._padding_id is None else input_ids != self._padding_id
        return Modality.of(kinds.to(torch.int8), valid=valid)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        self._open.append(stack)
        input_ids = self._signature.bind_partial(*args, **kwargs).arguments.get("input_ids")
        outer = current_modality()
        # What the caller said of these very tokens goes before what their ids say.
        if input_ids is not None and (outer is None or outer.kinds.shape != input_ids.shape):
            stack.enter_context(modality(self.modality_of(input_ids)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.pop().close()


def attach_modality(
    model: nn.Module,
    *,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    audio_token_id: int | None = None,
    padding_token_id: int | None = None,
) -> ModalityHook:
    """Set the modality mask around every forward pass of a model that takes ``input_ids`` [B, S].

    At least one of the modality's token ids is needed. ``padding_token_id`` marks padding, which
    has no weight and no say; leave it out if prompts are not padded. Every pipeline stage must be
    called with the ids, as Megatron's inference engines do. A ``macs.modality`` block of the same [B, S]
    around the call goes first, so that it can exempt tokens. Returns a handle with ``remove``.
    """
    given = {image_token_id: IMAGE, video_token_id: VIDEO, audio_token_id: AUDIO}
    token_ids = {token: kind for token, kind in given.items() if token is not None}
    if not token_ids:
        raise ValueError(
            "attach_modality: expected image_token_id, video_token_id or audio_token_id; found none"
        )
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"attach_modality: {type(model).__name__}.forward takes no input_ids")
    return ModalityHook(model, token_ids, padding_token_id)
