"""The modality of a forward pass: a mask that follows it to every MoE layer.

with macs.modality(input_ids == image_token_id):
    logits = model(input_ids)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tokens import Modality, lay_out
from .agreement import pass_around


class ModalityBuffers:
    """One modality for each shape, in memory that stays: what a captured CUDA graph can read."""

    def __init__(self) -> None:
        self._held: dict[tuple[tuple[int, ...], torch.device], Modality] = {}

    def hold(self, modality: Modality) -> Modality:
        """The one of this shape, now saying what ``modality`` says, in every layout made of it so far."""
        key = tuple(modality.kinds.shape), modality.kinds.device
        with torch.inference_mode():
            if key in self._held:
                _overwrite(self._held[key], modality)
            else:
                self._held[key] = Modality(
                    modality.kinds.clone(),
                    modality.valid.clone(),
                    None if modality.segments is None else modality.segments.clone(),
                    modality.exempt.clone(),
                    held=True,
                    states_valid=modality.states_valid,
                )
        return self._held[key]


def _overwrite(held: Modality, modality: Modality) -> None:
    for name in ("kinds", "valid", "exempt"):
        getattr(held, name).copy_(getattr(modality, name))
    if held.segments is not None:
        held.segments.copy_(modality.pictures)
    elif modality.segments is not None and any(layout.segmented for layout in held._layouts):
        raise ValueError(
            "segments: found them given for a step, while a captured CUDA graph may read those of steps of "
            "this shape for which none were given; expected segments with every step, or with none"
        )
    _refresh(held)


def _refresh(held: Modality) -> None:
    """Make the layouts of a modality, and of its parts, anew from what it says now."""
    for layout, tokens in held._layouts.items():
        for name, tensor in vars(lay_out(held, layout)).items():
            if tensor is not None:
                getattr(tokens, name).copy_(tensor)
    for part in held._parts.values():  # views of the whole
        _refresh(part)


@dataclass(frozen=True)
class Unreadable:
    """A call that says something of its tokens which cannot be read, and why. An error, but one of the layer
    that needs it: training, or a model with MACS off, is called as it likes."""

    reason: str


_current: ContextVar[Modality | Unreadable | None] = ContextVar("macs_modality", default=None)


def current_modality() -> Modality | None:
    """The modality of the forward pass under way, if any was set."""
    found = _current.get()
    return None if isinstance(found, Unreadable) else found


def needed_modality() -> Modality | None:
    """The same, for who is about to use it: a ``ValueError`` where a call says what cannot be read."""
    found = _current.get()
    if isinstance(found, Unreadable):
        raise ValueError(found.reason)
    return found


@contextmanager
def reading(found: Modality | Unreadable) -> Iterator[None]:
    """What a call says of its tokens is in force in this block; for hooks."""
    token = _current.set(found)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def modality(
    mask: Tensor | Modality,
    *,
    valid: Tensor | None = None,
    segments: Tensor | None = None,
    exempt: Tensor | None = None,
) -> Iterator[Modality]:
    """Tell every MACS layer in this block which token is which.

    Blocks nest; each thread and asyncio task has its own.

    Args:
        mask: [B, S], bool (True: image token) or modality ids (``TEXT``, ``IMAGE``, ``VIDEO``, ``AUDIO``).
        valid: bool [B, S], False: padding; none: all are tokens.
        segments: integers [B, S], which picture a token is of; none: found from runs in ``mask``.
        exempt: bool [B, S], tokens that are neither dropped nor rerouted; none: no token.

    Yields:
        What is in force.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``mask`` is a ``Modality`` and other arguments are given.
    """
    if isinstance(mask, Modality):
        if valid is not None or segments is not None or exempt is not None:
            raise ValueError("modality: valid, segments and exempt are already part of a Modality")
        value = mask
    else:
        value = Modality.of(mask, valid=valid, segments=segments, exempt=exempt)
    token = _current.set(value)
    try:
        with pass_around():
            yield value
    finally:
        _current.reset(token)
