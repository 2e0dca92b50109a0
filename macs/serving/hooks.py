"""Which token is which, from what a model is called with, at every forward pass."""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..tokens import AUDIO, IMAGE, VIDEO, Modality
from .agreement import Agreement, pass_around
from .calls import CallReader
from .context import Unreadable, current_modality, reading
from .layer import LayerRuntime

logger = logging.getLogger(__name__)

TOKEN_IDS = ("image_token_id", "video_token_id", "audio_token_id", "padding_token_id")
"""The arguments of ``attach_modality`` that name an input id; flags and config blocks have the same."""


def token_ids_in(given: Any, prefix: str = "") -> dict[str, int]:
    """Those of ``TOKEN_IDS`` that an object has under its name, behind a prefix, and that are not none."""
    found = {name: getattr(given, prefix + name) for name in TOKEN_IDS}
    return {name: value for name, value in found.items() if value is not None}


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
    """The hooks ``attach_modality`` set; ``remove`` takes them off.

    They sit on the model and on all that wraps it (PEFT, ``torch.compile``, training wrappers), since
    calls come in at any of them: ``generate`` of a PEFT model calls the model inside. Copies and pickles
    of the model have hooks of their own, which do the same.
    """

    def __init__(self, model: nn.Module, reader: CallReader) -> None:
        _out_of_graphs()
        self.reader = reader
        self._name = type(innermost(model)).__name__
        self._warned = self._outgrown = False
        self._handles = []
        modules = entrances(model)
        # A wrapper that takes any arguments hands them on as the model inside takes them.
        self._order = {type(module): parameters(modules[-1]) for module in modules}
        self._order |= {type(one): parameters(one) for one in modules if "input_ids" in parameters(one)}
        for module in modules:
            # Before all others, so that whatever fails after it, ``_leave`` has something to leave.
            self._handles.append(
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            )
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        _out_of_graphs()
        self.__dict__.update(state)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def of_call(self, given: dict[str, Any]) -> Modality | Unreadable | None:
        """The modality of the tokens of a call with these arguments, see ``calls``; none if nothing
        tells."""
        kinds, outer = self.engine_kinds(given), current_modality()
        found = self.reader.read(given, outer, kinds)
        if isinstance(found, Modality) and outer is not None and found.kinds.numel() > outer.kinds.numel():
            self._say_block_is_shorter(tuple(outer.kinds.shape), tuple(found.kinds.shape))
        untold = isinstance(found, Modality) and kinds is None and self.reader.tells_nothing(given)
        if untold and current_modality() is None and not self._warned:
            self._warned = True
            logger.warning(
                "MACS: nothing in a call of %s tells visual tokens from text; every token counts as text",
                self._name,
            )
        return found

    def _say_block_is_shorter(self, block: tuple[int, ...], call: tuple[int, ...]) -> None:
        """Once: a block of fewer tokens than a call has cannot be meant for it, nor a mistake be told from
        ``generate`` without a cache, whose calls grow."""
        if not self._outgrown:
            self._outgrown = True
            logger.warning(
                "MACS: a macs.modality block of shape %s is around a call of %s of shape %s: what the call "
                "itself tells is taken, and nothing of the block",
                block,
                self._name,
                call,
            )

    def engine_kinds(self, given: dict[str, Any]) -> Tensor | None:
        """Modality ids int8 [B, S] as the engine itself has them, where it does."""
        return None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        _calls_of_thread().append((stack, sys.exc_info()[1]))
        stack.enter_context(pass_around(lambda: groups_of(module)))
        given = {**dict(zip(self._order[type(module)], args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        found = self.of_call(given)
        if found is not None:
            stack.enter_context(reading(found))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        stack, error_before = _calls_of_thread().pop()
        error = sys.exc_info()
        # A model may be called where somebody handles another error.
        stack.__exit__(*(error if error[1] is not error_before else (None, None, None)))


@cache
def _out_of_graphs() -> None:
    """Keep hooks out of what torch.compile traces. Once, and not at import: it loads torch's compiler, which
    takes as long as torch itself."""
    for name in ("_enter", "_leave"):
        setattr(ModalityHook, name, torch.compiler.disable(getattr(ModalityHook, name)))


_threads = threading.local()


def _calls_of_thread() -> list[tuple[ExitStack, BaseException | None]]:
    """The calls under way in this thread, innermost last, and the error that was being handled before."""
    if not hasattr(_threads, "calls"):
        _threads.calls = []
    calls: list[tuple[ExitStack, BaseException | None]] = _threads.calls
    return calls


def planning_layers(model: nn.Module) -> list[LayerRuntime]:
    """What the MACS layers in a model share their state through."""
    found = (getattr(module, "macs", None) for module in model.modules())
    return list({id(layer): layer for layer in found if isinstance(layer, LayerRuntime)}.values())


def groups_of(model: nn.Module) -> list[Agreement]:
    """The groups of processes that wait for each other in a model's layers, where those plan."""
    if model.training:
        return []
    layers = [layer for layer in planning_layers(model) if layer.on]
    return list({id(one.agreement): one.agreement for one in layers if one.agreement is not None}.values())


def parameters(model: nn.Module) -> tuple[str, ...]:
    """What a model's ``forward`` takes, in order."""
    return tuple(inspect.signature(model.forward).parameters)


def entrances(model: nn.Module) -> list[nn.Module]:
    """Where a call of the model may come in: the model that is given, all that it wraps, and the model
    inside, outermost first."""
    found = [model]
    while (inner := _wrapped(found[-1])) is not None:
        found.append(inner)
    return found


def innermost(model: nn.Module) -> nn.Module:
    """The model inside of what wraps it."""
    return entrances(model)[-1]


def _wrapped(model: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; none for a model."""
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
) -> ModalityHook:
    """Set the modality mask around every forward pass of a model that takes ``input_ids`` [B, S].

    ``macs.serving.calls`` says what else in a call is read and what takes precedence. Every pipeline stage
    must be called with the ids, as Megatron's inference engines do. A ``macs.modality`` block of the same
    [B, S] around the call takes precedence, so that it can exempt tokens.

    Args:
        model: any module; what wraps it may stay: PEFT, ``torch.compile``, accelerate, training wrappers.
        image_token_id: input id of image tokens; none: read from ``model.config`` where it has one.
        video_token_id: of video tokens, so too.
        audio_token_id: of audio tokens, so too.
        padding_token_id: what is padding in prompts without an attention mask; padding has no weight and is
            not counted.

    Returns:
        The hooks; their ``remove`` takes them off.

    Raises:
        ValueError: nothing would tell visual tokens from text.
    """
    named = named_kinds(image_token_id, video_token_id, audio_token_id)
    inner = innermost(model)
    kinds = completed(named, token_kinds_of(getattr(inner, "config", None)))
    check_tells(inner, kinds)
    return ModalityHook(model, CallReader(kinds, padding_token_id))


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
    taken = parameters(model)
    if not (token_kinds or "mm_token_type_ids" in taken):
        raise ValueError(
            "attach_modality: expected image_token_id, video_token_id or audio_token_id, as an argument or "
            f"in the model's config; found none, and {type(model).__name__}.forward takes no "
            "mm_token_type_ids"
        )
    if "input_ids" not in taken:
        raise ValueError(f"attach_modality: {type(model).__name__}.forward takes no input_ids")
