"""The modality of tokens in Megatron's language and multimodal models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from macs.adapters import (
    AUDIO,
    IMAGE,
    TEXT,
    VIDEO,
    CallReader,
    Modality,
    ModalityBuffers,
    ModalityHook,
    Unreadable,
    check_tells,
    completed,
    current_modality,
    innermost,
    layers_of,
    named_tokens,
    real_keys,
    token_modality_of,
)

MODALITY_OF_NAME = {"image": IMAGE, "vision": IMAGE, "video": VIDEO, "audio": AUDIO, "sound": AUDIO}
"""Names of a ``MimoModel``'s modalities, in the singular or the plural."""


class MegatronHook(ModalityHook):
    """``ModalityHook`` for models of Megatron: GPT, hybrid, MIMO.

    Reads the dynamic engine's padding and its mask of image tokens, and keeps masks in memory that captured
    CUDA graphs read.
    """

    def __init__(self, model: nn.Module, by_token: dict[int, int], padding_id: int | None) -> None:
        inner = innermost(model)
        captured = getattr(inner.config, "cuda_graph_impl", "none") != "none"
        if captured and hasattr(inner, "cudagraph_manager"):
            raise ValueError(
                "attach_modality: inference_cuda_graph_scope = 'block' captures the model whole, and with it "
                "the mask of one step; expected 'layer'"
            )
        super().__init__(model, CallReader(by_token, padding_id, masked_is_true=True))
        self._buffers = ModalityBuffers() if captured else None
        self._layers = layers_of(model) if captured else []

    def engine_ids(self, given: dict[str, Any]) -> Tensor | None:
        """From the context of a dynamic engine that serves multimodal models: int8 [1, S]."""
        read = getattr(given.get("inference_context"), "current_image_token_mask", None)
        mask = None if read is None else read()
        if mask is None:
            return None
        ids = given.get("input_ids")
        if ids is not None and mask.shape != ids.shape:
            raise ValueError(
                f"current_image_token_mask: found shape {tuple(mask.shape)}, the call has "
                f"{tuple(ids.shape)} tokens"
            )
        return torch.where(mask >= 0, IMAGE, TEXT).to(torch.int8)

    def of_call(self, given: dict[str, Any]) -> Modality | Unreadable | None:
        """As the base class, with the padding of a dynamic engine; in a buffer if a graph may read it."""
        modality = self._of_tokens(given)
        if self._buffers is None or not isinstance(modality, Modality):
            return modality
        if not may_be_graphed(given.get("inference_context")):
            return modality
        for layer in self._layers:
            layer.prepare(modality.device)
        return self._buffers.hold(modality)

    def _of_tokens(self, given: dict[str, Any]) -> Modality | Unreadable | None:
        """The modality of the tokens that the layers get."""
        modality = super().of_call(given)
        input_ids, context = given.get("input_ids"), given.get("inference_context")
        if input_ids is None or context is None or context.is_static_batching():
            return modality
        if isinstance(modality, Unreadable):
            return modality
        if modality is None:
            modality = current_modality()
        if modality is None or modality.ids.shape != input_ids.shape:
            modality = Modality.of(torch.zeros_like(input_ids, dtype=torch.bool))
        real = torch.arange(input_ids.shape[1], device=input_ids.device) < context.active_token_count
        return modality.with_valid(modality.valid & real)


class LLaVAHook(MegatronHook):
    """For ``LLaVAModel``, which replaces one token by the features of a picture inside the model."""

    def __init__(self, model: nn.Module, by_token: dict[int, int], padding_id: int | None) -> None:
        super().__init__(model, by_token, padding_id)
        self._model: Any = innermost(model)

    def _of_tokens(self, given: dict[str, Any]) -> Modality | Unreadable | None:
        """The modality [B, S'] of the tokens that the language model gets."""
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:  # of the language model's tokens
            given = {**given, "attention_mask": None}
        else:
            mask = None
        modality = super()._of_tokens(given)
        input_ids, context = given["input_ids"], given.get("inference_context")
        memory = {} if context is None else context.key_value_memory_dict
        cached = "image_tokens_count" in memory or "sound_tokens_count" in memory
        if not isinstance(modality, Modality) or cached or not self._model.add_decoder:
            return modality  # the pictures are in the cache, or the language model is elsewhere
        outer = current_modality()
        if given.get("imgs_sizes") is not None:
            if outer is None:
                return Unreadable(
                    "attach_modality: found imgs_sizes, pictures of many sizes, and cannot find their "
                    "tokens; set macs.modality around the call"
                )
            return outer
        image_token = given.get("image_token_index")
        image = input_ids == (self._model.image_token_index if image_token is None else image_token)
        repeats = self._repeats(image, given.get("num_image_tiles"))
        # Reads the values once a prompt, as the model itself does.
        length = self._length(int(repeats.sum(1).max()), context)
        if outer is not None and outer.ids.shape == (len(input_ids), length):
            modality = outer
        else:
            modality = replace(modality, ids=modality.ids.masked_fill(image, IMAGE))
            modality = modality.expanded(repeats, length)
        if mask is not None and not modality.states_valid:
            real = real_keys(~(mask != 0), tuple(modality.ids.shape))
            modality = modality.with_valid(modality.valid & real)
        return modality

    def _repeats(self, image: Tensor, tiles: Any) -> Tensor:
        """Number of tokens that each of the ids [B, S] becomes."""
        count = int(image.sum())
        if tiles is None:
            tiles = torch.ones(count, dtype=torch.int64)
        tiles = torch.as_tensor(tiles, device=image.device).long()
        if len(tiles) < count:
            raise ValueError(
                f"num_image_tiles: found {len(tiles)} pictures, expected {count}, as in input_ids"
            )
        repeats = torch.ones(image.shape, dtype=torch.int64, device=image.device)
        return repeats.masked_scatter(image, tiles[:count] * self._model.img_seq_len)

    def _length(self, longest: int, context: Any) -> int:
        """Length of the language model's sequences, padded or cut."""
        model = self._model
        largest = model._language_max_sequence_length
        if model._language_is_pipeline_parallel and context is None:
            longest = max(longest, largest)
        longest = min(longest, largest)
        if model.sequence_parallel_lm:
            longest += -longest % model.tensor_model_parallel_size_lm
        return longest


def may_be_graphed(context: Any) -> bool:
    """Whether the engine may replay CUDA graphs in a step of this inference context."""
    if context is None:
        return False
    if context.is_static_batching():
        return bool(context.is_decode_only())
    return bool(context.using_cuda_graph_this_step())


def attach_modality(
    model: nn.Module,
    *,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    audio_token_id: int | None = None,
    padding_token_id: int | None = None,
) -> ModalityHook:
    """Set the modality mask around every forward pass of a Megatron model.

    As ``macs.attach_modality``. model: one that is called with ``input_ids`` [B, S], a ``LLaVAModel`` or a
    ``MimoModel``, not the language model inside of these; also in a wrapper such as ``Float16Module``. Ids
    that are not given are read from the model.
    """
    inner = innermost(model)
    named = named_tokens(image_token_id, video_token_id, audio_token_id)
    by_token = known_tokens(inner, named)
    check_tells(inner, by_token)
    return watch(model, by_token, padding_token_id)


def watch(model: nn.Module, by_token: dict[int, int], padding_id: int | None) -> ModalityHook:
    """``attach_modality`` with these ids. There may be none: then the mask is that of ``macs.modality``, and
    only a dynamic engine's padding is added to it."""
    return (LLaVAHook if is_llava(innermost(model)) else MegatronHook)(model, by_token, padding_id)


def known_tokens(model: Any, named: dict[int, int]) -> dict[int, int]:
    """Token id -> modality id, as ``named`` by the caller and, for other modalities, of the model."""
    known: dict[int, int]
    if is_llava(model):
        known = {model.image_token_index: IMAGE}
        if getattr(model, "sound_token_index", None) is not None:
            known[model.sound_token_index] = AUDIO
    elif hasattr(model, "special_token_ids"):  # MimoModel
        known = {
            token: modality_of_name(name)
            for name, token in model.special_token_ids.items()
            if token not in named
        }
    else:
        known = token_modality_of(getattr(model, "config", None))
    return completed(named, known)


def modality_of_name(name: str) -> int:
    """The modality that a model calls by this name."""
    for known, modality in MODALITY_OF_NAME.items():
        if name.lower().startswith(known):
            return modality
    raise ValueError(
        f"special_token_ids: found a modality {name!r}, expected its token id among the arguments, or a name "
        f"that starts with one of {', '.join(MODALITY_OF_NAME)}"
    )


def is_llava(model: nn.Module) -> bool:
    """Whether a model is Megatron's ``LLaVAModel``: by name, for its import may need packages that are not
    installed."""
    name = "megatron.core.models.multimodal.llava_model"
    return any(one.__module__ == name for one in type(model).__mro__)
