"""Hooks that set the modality of the tokens around every forward pass of a model."""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..tokens import AUDIO, IMAGE, VIDEO, Modality
from .calls import CallReader
from .consistency import model_call
from .layer import LayerRuntime, layers_of
from .modality import Unreadable, current_modality, modality_of_call
from .state import RuntimeState, called_model

logger = logging.getLogger(__name__)

TOKEN_IDS = ("image_token_id", "video_token_id", "audio_token_id", "padding_token_id")
"""The arguments of ``attach_modality`` that name an input id; flags and config blocks have the same."""


TOKEN_ID_NAMES = {
    IMAGE: ("image_token_id", "image_token_index", "media_placeholder_token_id"),
    VIDEO: ("video_token_id", "video_token_index"),
    AUDIO: ("audio_token_id", "audio_token_index"),
}
"""Names in the configs of multimodal models for the token that stands for one piece of a modality."""


def token_modality_of(config: Any) -> dict[int, int]:
    """Token id -> modality id, from a model's config (any object or none)."""
    by_token: dict[int, int] = {}
    for modality, names in TOKEN_ID_NAMES.items():
        for name in names:
            token = getattr(config, name, None)
            if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
                by_token.setdefault(token, modality)
    return by_token


class ModalityHook:
    """The hooks that ``attach_modality`` sets; ``remove`` removes them.

    They are on the model and on all wrappers (PEFT, ``torch.compile``, training wrappers), since calls may
    enter at any of them: ``generate`` of a PEFT model calls the model inside. Copies and pickles of the model
    have hooks of their own.
    """

    def __init__(self, model: nn.Module, reader: CallReader) -> None:
        _out_of_graphs()
        self.reader = reader
        self._name = type(innermost(model)).__name__
        self._warned = False
        self._handles = []
        self._planning: list[nn.Module] = []
        modules = entrances(model)
        # A wrapper that takes any arguments passes them on to the model inside.
        self._order = {type(module): parameters(modules[-1]) for module in modules}
        self._order |= {type(one): parameters(one) for one in modules if "input_ids" in parameters(one)}
        for module in modules:
            # Before all other hooks, so that ``_leave`` has a call to leave whatever fails later.
            self._handles.append(
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            )
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        _out_of_graphs()
        self.__dict__.update(state)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def of_call(self, given: dict[str, Any]) -> Modality | Unreadable | None:
        """The modality of the tokens of a call with these arguments, see ``calls``; none if unknown."""
        ids, outer = self.engine_ids(given), current_modality()
        modality = self.reader.read(given, outer, ids)
        if not isinstance(modality, Modality):
            return modality
        if outer is None and ids is None and self.reader.has_no_modality(given):
            self._warn_once(
                f"MACS: nothing in a call of {self._name} tells visual tokens from text; every token counts "
                "as text"
            )
        elif outer is not None and modality.ids.numel() > outer.ids.numel():
            # Not an error: it is also what ``generate`` without a cache does, whose calls grow.
            self._warn_once(
                f"MACS: a macs.modality block of shape {tuple(outer.ids.shape)} is around a call of "
                f"{self._name} of shape {tuple(modality.ids.shape)}: the modality is read from the call, and "
                "the block is ignored"
            )
        return modality

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(message)

    def engine_ids(self, given: dict[str, Any]) -> Tensor | None:
        """Modality ids int8 [B, S] of the engine itself, where it has them."""
        return None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        _thread.calls.append((stack, sys.exc_info()[1]))
        for runtime in self._runtimes_of(module):
            stack.enter_context(runtime.forward_pass())
        stack.callback(called_model.reset, called_model.set(module))
        training = module.training
        # Looked for only when an error leaves the call: to walk a large model takes milliseconds.
        stack.enter_context(
            model_call(lambda: [] if training else [layer for layer in layers_of(module) if layer.runtime.on])
        )
        given = {**dict(zip(self._order[type(module)], args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        modality = self.of_call(given)
        if modality is not None:
            stack.enter_context(modality_of_call(modality))

    def _runtimes_of(self, module: nn.Module) -> list[RuntimeState]:
        """The runtimes of the module's layers; modules with layers are looked for until there are some."""
        layers = [_layer(one) for one in self._planning]
        if not any(layers):
            self._planning = [one for one in module.modules() if isinstance(_layer(one), LayerRuntime)]
            layers = [_layer(one) for one in self._planning]
        return list({layer.runtime: None for layer in layers if layer is not None})

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        stack, error_before = _thread.calls.pop()
        error = sys.exc_info()
        # A model may be called while another error is handled.
        stack.__exit__(*(error if error[1] is not error_before else (None, None, None)))


def _layer(module: nn.Module) -> Any:
    return getattr(module, "macs", None)


@cache
def _out_of_graphs() -> None:
    """Exclude hooks from torch.compile. Once, and not at import: it loads torch's compiler, which takes as
    long as torch itself."""
    for name in ("_enter", "_leave"):
        setattr(ModalityHook, name, torch.compiler.disable(getattr(ModalityHook, name)))


class _Thread(threading.local):
    """The current calls of a thread, innermost last, and the error that was handled before each."""

    def __init__(self) -> None:
        self.calls: list[tuple[ExitStack, BaseException | None]] = []


_thread = _Thread()


def parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a model's ``forward``, in order."""
    return tuple(inspect.signature(model.forward).parameters)


def entrances(model: nn.Module) -> list[nn.Module]:
    """The modules at which a call may enter: the model, all that it wraps, and the model inside, outermost
    first."""
    modules = [model]
    while (inner := _wrapped(modules[-1])) is not None:
        modules.append(inner)
    return modules


def innermost(model: nn.Module) -> nn.Module:
    """The model inside all wrappers."""
    return entrances(model)[-1]


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; none for a model."""
    compiled = getattr(model, "_orig_mod", None)  # torch.compile
    if isinstance(compiled, nn.Module):
        return compiled
    peft = sys.modules.get("peft")
    if peft is not None:
        if isinstance(model, peft.PeftModel):
            return model.base_model
        if isinstance(model, peft.tuners.tuners_utils.BaseTuner):
            return model.model
    inner = getattr(model, "module", None)  # DistributedDataParallel, DeepSpeed's engine, Float16Module
    if isinstance(inner, nn.Module) and "input_ids" not in parameters(model):
        return inner
    return None


def attach_modality(
    model: nn.Module,
    *,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    audio_token_id: int | None = None,
    padding_token_id: int | None = None,
    text_only: bool = False,
) -> ModalityHook:
    """Set the modality mask around every forward pass of a model that takes ``input_ids`` [B, S].

    ``macs.runtime.calls`` lists what is read from a call, in order of precedence. Every pipeline stage must
    be called with the ids, as Megatron's inference engines do. A ``macs.modality`` block of the same [B, S]
    around the call takes precedence, so that it can exempt tokens.

    Args:
        model: any module, also inside wrappers: PEFT, ``torch.compile``, accelerate, training wrappers.
        image_token_id: input id of image tokens; none: read from ``model.config`` where it has one.
        video_token_id, audio_token_id: likewise.
        padding_token_id: of padding, in prompts without an attention mask; padding has no weight and is not
            counted.
        text_only: the model has no modality but text, whose padding is read from its calls.

    Returns:
        The hooks; ``remove`` removes them.

    Raises:
        ValueError: visual tokens cannot be told from text.
    """
    named = named_tokens(image_token_id, video_token_id, audio_token_id)
    inner = innermost(model)
    by_token = completed(named, token_modality_of(getattr(inner, "config", None)))
    if text_only and by_token:
        raise ValueError(f"attach_modality: found text_only and token ids {sorted(by_token)}, expected one")
    if not text_only:
        check_tells(inner, by_token)
    check_vocabulary(inner, named)
    return ModalityHook(model, CallReader(by_token, padding_token_id, text_only))


def named_tokens(image: int | None, video: int | None, audio: int | None) -> dict[int, int]:
    """Token id -> modality id, of the ids given."""
    pairs = ((image, IMAGE), (video, VIDEO), (audio, AUDIO))
    return {token: modality for token, modality in pairs if token is not None}


def completed(named: dict[int, int], known: dict[int, int]) -> dict[int, int]:
    """Token id -> modality id: as ``named`` by the caller, and of the model's own for other modalities."""
    rest = {
        token: modality
        for token, modality in known.items()
        if modality not in named.values() and token not in named
    }
    return {**rest, **named}


def check_vocabulary(model: nn.Module, named: Iterable[int]) -> None:
    """Raise a ``ValueError`` for a token id that the model's vocabulary does not have."""
    config = getattr(model, "config", None)
    sizes = [
        getattr(one, "vocab_size", None)
        for one in (config, getattr(config, "text_config", None), getattr(config, "llm_config", None))
    ]
    largest = max((size for size in sizes if isinstance(size, int)), default=None)
    for token in named:
        if largest is not None and token >= largest:
            raise ValueError(
                f"attach_modality: found token id {token}, expected one of the {largest} of the model's "
                "vocabulary"
            )


def check_tells(model: nn.Module, by_token: dict[int, int]) -> None:
    """Raise a ``ValueError`` where no argument of a model's call tells visual tokens from text."""
    taken = parameters(model)
    if not (by_token or "mm_token_type_ids" in taken):
        raise ValueError(
            "attach_modality: expected image_token_id, video_token_id or audio_token_id, as an argument or "
            f"in the model's config; found none, and {type(model).__name__}.forward takes no "
            "mm_token_type_ids (text_only=True for a model that has nothing else)"
        )
    if "input_ids" not in taken:
        raise ValueError(f"attach_modality: {type(model).__name__}.forward takes no input_ids")
