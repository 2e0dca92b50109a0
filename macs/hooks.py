"""Which token is which, from what a model is called with, at every forward pass."""

from __future__ import annotations

import inspect
import threading
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .modality import AUDIO, IMAGE, TEXT, VIDEO, Modality, current_modality, modality

TOKEN_ID_NAMES = {
    IMAGE: ("image_token_id", "image_token_index", "media_placeholder_token_id"),
    VIDEO: ("video_token_id", "video_token_index"),
    AUDIO: ("audio_token_id", "audio_token_index"),
}
"""What the configs of multimodal models call the token that stands for one piece of a modality."""


def token_kinds_of(config: Any) -> dict[int, int]:
    """Token id -> kind, as far as a model's config (any object or none) tells."""
    found: dict[int, int] = {}
    for kind, names in TOKEN_ID_NAMES.items():
        for name in names:
            token = getattr(config, name, None)
            if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
                found.setdefault(token, kind)
    return found


class ModalityHook:
    """The hooks ``attach_modality`` set; ``remove`` takes them off."""

    def __init__(self, model: nn.Module, token_kinds: dict[int, int], padding_id: int | None) -> None:
        self._token_kinds = token_kinds
        self._padding_id = padding_id
        self._signature = inspect.signature(model.forward)
        self._own = threading.local()  # of each thread: the calls under way, innermost last
        self._handles = [
            # Before all others, so that whatever fails after it, ``_leave`` has something to leave.
            model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def of_call(self, given: dict[str, Any]) -> Modality | None:
        """The modality of the tokens of a call with these arguments; none if nothing tells.

        What the caller said of these very tokens, in a block around it, goes before what their ids say.
        """
        names = ("input_ids", "mm_token_type_ids", "attention_mask")
        found, outer = self.modality_of(*(given.get(name) for name in names)), current_modality()
        same = found is not None and outer is not None and outer.kinds.shape == found.kinds.shape
        return outer if same else found

    def modality_of(
        self,
        input_ids: Tensor | None,
        mm_token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Modality | None:
        """The modality of the tokens of a call; none if nothing tells.

        input_ids int [B, S]; mm_token_type_ids int [B, S' >= S], a processor's own kinds, which go before
        what the ids say; attention_mask [B, S' >= S], 0 for padding. Of the wider ones the last S
        columns belong to these tokens, those before to a cache. An attention mask of another rank says
        nothing of padding.
        """
        types = mm_token_type_ids
        if types is not None and types.dim() != 2:
            types = None
        if types is not None and (input_ids is None or types.shape == input_ids.shape):
            kinds = types
        elif input_ids is not None and self._token_kinds:
            kinds = torch.full_like(input_ids, TEXT, dtype=torch.int8)
            for token_id, kind in self._token_kinds.items():
                kinds = kinds.masked_fill(input_ids == token_id, kind)
        elif types is not None and input_ids is not None:
            kinds = _last_columns("mm_token_type_ids", types, input_ids)
        else:
            return None
        valid = torch.ones_like(kinds, dtype=torch.bool)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            valid = valid & (_last_columns("attention_mask", attention_mask, kinds) != 0)
        if self._padding_id is not None and input_ids is not None:
            valid = valid & (input_ids != self._padding_id)
        return Modality.of(kinds.to(torch.int8), valid=valid)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        if not hasattr(self._own, "calls"):
            self._own.calls = []
        self._own.calls.append(stack)
        given = {**kwargs, **self._signature.bind_partial(*args, **kwargs).arguments}
        found = self.of_call(given)
        if found is not None:
            stack.enter_context(modality(found))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._own.calls.pop().close()


def _last_columns(name: str, tensor: Tensor, tokens: Tensor) -> Tensor:
    """The columns of ``tensor`` [B, S' >= S] that belong to ``tokens`` [B, S]."""
    rows, count = tokens.shape
    if tensor.shape[0] != rows or tensor.shape[1] < count:
        raise ValueError(
            f"{name}: found shape {tuple(tensor.shape)}, expected {rows} sequences of {count} tokens or more"
        )
    return tensor[:, tensor.shape[1] - count :]


def attach_modality(
    model: nn.Module,
    *,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    audio_token_id: int | None = None,
    padding_token_id: int | None = None,
) -> ModalityHook:
    """Set the modality mask around every forward pass of a model that takes ``input_ids`` [B, S].

    Token ids that are not given are read from ``model.config`` where it has them (Hugging Face);
    ``mm_token_type_ids`` and a two-dimensional ``attention_mask`` are heeded where the model is called
    with them. ``padding_token_id`` marks padding in prompts that come without such a mask; padding has
    no weight and no say. Every pipeline stage must be called with the ids, as Megatron's inference
    engines do. A ``macs.modality`` block of the same [B, S] around the call goes first, so that it can
    exempt tokens. Returns a handle with ``remove``.

    Raises a ``ValueError`` where nothing would tell visual tokens from text.
    """
    named = named_kinds(image_token_id, video_token_id, audio_token_id)
    kinds = completed(named, token_kinds_of(getattr(model, "config", None)))
    check_tells(model, kinds)
    return ModalityHook(model, kinds, padding_token_id)


def named_kinds(image: int | None, video: int | None, audio: int | None) -> dict[int, int]:
    """Token id -> kind, of the ids given."""
    given = ((image, IMAGE), (video, VIDEO), (audio, AUDIO))
    return {token: kind for token, kind in given if token is not None}


def completed(named: dict[int, int], told: dict[int, int]) -> dict[int, int]:
    """Token id -> kind: as the caller ``named`` them and, for the kinds not named, as the model told."""
    rest = {token: kind for token, kind in told.items() if kind not in named.values() and token not in named}
    return {**rest, **named}


def check_tells(model: nn.Module, token_kinds: dict[int, int]) -> None:
    """Raise a ``ValueError`` where nothing that a model is called with tells visual tokens from text."""
    parameters = inspect.signature(model.forward).parameters
    if not (token_kinds or "mm_token_type_ids" in parameters):
        raise ValueError(
            "attach_modality: expected image_token_id, video_token_id or audio_token_id, as an argument or "
            f"in the model's config; found none, and {type(model).__name__}.forward takes no "
            "mm_token_type_ids"
        )
    if "input_ids" not in parameters:
        raise ValueError(f"attach_modality: {type(model).__name__}.forward takes no input_ids")
