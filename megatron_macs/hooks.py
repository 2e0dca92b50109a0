"""Which token is which in Megatron's models, language models and multimodal ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from macs import AUDIO, IMAGE, TEXT, VIDEO, Modality, ModalityHook, current_modality
from macs.serving.calls import CallReader, real_keys
from macs.serving.context import ModalityBuffers, Unreadable
from macs.serving.hooks import check_tells, completed, innermost, named_kinds, planning_layers, token_kinds_of

KIND_OF_NAME = {"image": IMAGE, "vision": IMAGE, "video": VIDEO, "audio": AUDIO, "sound": AUDIO}
"""What the modalities of a ``MimoModel`` are called, in the singular or the plural."""


class MegatronHook(ModalityHook):
    """``ModalityHook`` for models of Megatron: GPT, hybrid, MIMO.

    Knows the dynamic engine's padding and its mask of image tokens, and keeps masks where captured CUDA
    graphs find them.
    """

    def __init__(self, model: nn.Module, token_kinds: dict[int, int], padding_id: int | None) -> None:
        inner = innermost(model)
        captured = getattr(inner.config, "cuda_graph_impl", "none") != "none"
        if captured and hasattr(inner, "cudagraph_manager"):
            raise ValueError(
                "attach_modality: inference_cuda_graph_scope = 'block' captures the model whole, and with it "
                "the mask of one step; expected 'layer'"
            )
        super().__init__(model, CallReader(token_kinds, padding_id, masked_is_true=True))
        self._buffers = ModalityBuffers() if captured else None
        self._layers = planning_layers(model) if captured else []

    def engine_kinds(self, given: dict[str, Any]) -> Tensor | None:
        """From the context of a dynamic engine that serves multimodal models: int8 [1, S]."""
        tell = getattr(given.get("inference_context"), "current_image_token_mask", None)
        mask = None if tell is None else tell()
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
        found = self._of_tokens(given)
        if self._buffers is None or not isinstance(found, Modality):
            return found
        if not may_be_graphed(given.get("inference_context")):
            return found
        for layer in self._layers:
            layer.prepare(found.kinds.device)
        return self._buffers.hold(found)

    def _of_tokens(self, given: dict[str, Any]) -> Modality | Unreadable | None:
        """The modality of the tokens that the layers get."""
        found = super().of_call(given)
        input_ids, context = given.get("input_ids"), given.get("inference_context")
        if input_ids is None or context is None or context.is_static_batching():
            return found
        if isinstance(found, Unreadable):
            return found
        if found is None:
            found = current_modality()
        if found is None or found.kinds.shape != input_ids.shape:
            found = Modality.of(torch.zeros_like(input_ids, dtype=torch.bool))
        real = torch.arange(input_ids.shape[1], device=input_ids.device) < context.active_token_count
        return found.with_valid(found.valid & real)


class LLaVAHook(MegatronHook):
    """For ``LLaVAModel``, where the features of a picture take the place of one token inside the model."""

    def __init__(self, model: nn.Module, token_kinds: dict[int, int], padding_id: int | None) -> None:
        super().__init__(model, token_kinds, padding_id)
        self._model: Any = innermost(model)

    def _of_tokens(self, given: dict[str, Any]) -> Modality | Unreadable | None:
        """The modality [B, S'] of the tokens that the language model gets."""
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:  # of the tokens the language model gets
            given = {**given, "attention_mask": None}
        else:
            mask = None
        found = super()._of_tokens(given)
        input_ids, context = given["input_ids"], given.get("inference_context")
        memory = {} if context is None else context.key_value_memory_dict
        cached = "image_tokens_count" in memory or "sound_tokens_count" in memory
        if not isinstance(found, Modality) or cached or not self._model.add_decoder:
            return found  # the pictures are in the cache, or the language model is elsewhere
        outer = current_modality()
        if given.get("imgs_sizes") is not None:
            if outer is None:
                return Unreadable(
                    "attach_modality: found imgs_sizes, pictures of many sizes, and cannot tell which tokens "
                    "come of them; set macs.modality around the call"
                )
            return outer
        image_token = given.get("image_token_index")
        image = input_ids == (self._model.image_token_index if image_token is None else image_token)
        repeats = self._repeats(image, given.get("num_image_tiles"))
        # One look at the values a prompt, as the model itself takes.
        length = self._length(int(repeats.sum(1).max()), context)
        if outer is not None and outer.kinds.shape == (len(input_ids), length):
            found = outer
        else:
            found = replace(found, kinds=found.kinds.masked_fill(image, IMAGE)).expanded(repeats, length)
        if mask is not None and not found.states_valid:
            found = found.with_valid(found.valid & real_keys(~(mask != 0), tuple(found.kinds.shape)))
        return found

    def _repeats(self, image: Tensor, tiles: Any) -> Tensor:
        """How many tokens come of each of the ids' [B, S]."""
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
        """How many tokens the language model gets, with what it is filled up with or loses."""
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

    model: one that is called with ``input_ids`` [B, S], a ``LLaVAModel`` or a ``MimoModel``; not the
    language model inside of these. What training wraps around it, such as ``Float16Module``, may stay.
    Ids that are not given are those the model itself knows. Otherwise as ``macs.attach_modality``. Every
    pipeline stage must be called with the ids, as Megatron's inference engines do.

    Raises a ``ValueError`` where nothing would tell visual tokens from text.
    """
    inner = innermost(model)
    named = named_kinds(image_token_id, video_token_id, audio_token_id)
    kinds = known_token_kinds(inner, named)
    check_tells(inner, kinds)
    return watch(model, kinds, padding_token_id)


def watch(model: nn.Module, token_kinds: dict[int, int], padding_id: int | None) -> ModalityHook:
    """``attach_modality`` with what is known of the ids, which may be nothing: then a ``macs.modality``
    around the call tells, and only a dynamic engine's padding is added to it."""
    return (LLaVAHook if is_llava(innermost(model)) else MegatronHook)(model, token_kinds, padding_id)


def known_token_kinds(model: Any, named: dict[int, int]) -> dict[int, int]:
    """Token id -> kind, as the caller ``named`` them and, for the other kinds, as the model says."""
    told: dict[int, int]
    if is_llava(model):
        told = {model.image_token_index: IMAGE}
        if getattr(model, "sound_token_index", None) is not None:
            told[model.sound_token_index] = AUDIO
    elif hasattr(model, "special_token_ids"):  # MimoModel
        told = {
            token: kind_of_name(name) for name, token in model.special_token_ids.items() if token not in named
        }
    else:
        told = token_kinds_of(getattr(model, "config", None))
    return completed(named, told)


def kind_of_name(name: str) -> int:
    """The kind of a modality that a model calls by this name."""
    for known, kind in KIND_OF_NAME.items():
        if name.lower().startswith(known):
            return kind
    raise ValueError(
        f"special_token_ids: found a modality {name!r}, expected its token id among the arguments, or a name "
        f"that starts with one of {', '.join(KIND_OF_NAME)}"
    )


def is_llava(model: nn.Module) -> bool:
    """Whether a model is Megatron's ``LLaVAModel``."""
    try:
        from megatron.core.models.multimodal.llava_model import LLaVAModel
    except ImportError:
        return False
    return isinstance(model, LLaVAModel)
