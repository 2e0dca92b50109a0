"""The modality of a forward pass: a mask that every MoE layer can read.

with macs.modality(input_ids == image_token_id):
    logits = model(input_ids)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tokens import Modality, ordered
from .state import RuntimeState, capturing

FIELDS = ("ids", "valid", "exempt")


class ModalityBuffers:
    """One modality for each shape, in memory that a captured CUDA graph can read."""

    def __init__(self) -> None:
        self._held: dict[tuple[tuple[int, ...], torch.device], Modality] = {}

    def hold(self, modality: Modality) -> Modality:
        """The buffer of this shape, with the values of ``modality``, in every layout made of it so far."""
        key = tuple(modality.ids.shape), modality.device
        with torch.inference_mode():
            if key in self._held:
                for name in FIELDS:
                    getattr(self._held[key], name).copy_(getattr(modality, name))
                _refresh(self._held[key])
            else:
                copies = {name: getattr(modality, name).clone() for name in FIELDS}
                self._held[key] = replace(modality, **copies, held=True, _layouts={}, _parts={})
        return self._held[key]


def _refresh(held: Modality) -> None:
    """Update the layouts of a modality and of its parts."""
    for layout, tokens in held._layouts.items():
        for buffer, tensor in zip(vars(tokens).values(), ordered(held, *layout), strict=True):
            buffer.copy_(tensor)
    for part in held._parts.values():  # views of the whole
        _refresh(part)


@dataclass(frozen=True)
class Unreadable:
    """Why the tokens of a call cannot be told apart. It is raised by the first layer that plans: training, or
    a model with MACS off, may be called in any way."""

    reason: str


_current: ContextVar[Modality | Unreadable | None] = ContextVar("macs_modality", default=None)


def current_modality() -> Modality | None:
    """The modality of the current forward pass, if any was set."""
    current = _current.get()
    return None if isinstance(current, Unreadable) else current


def layer_modality(batch: int, length: int, device: torch.device, runtime: RuntimeState) -> Modality:
    """The modality around a layer's call; all text, [batch, length], if there is none.

    Raises:
        ValueError: the call cannot be read, or the mask is on another device.
        RuntimeError: a CUDA graph captures the layer, and would not follow the mask.
    """
    modality = _current.get()
    if isinstance(modality, Unreadable):
        raise ValueError(modality.reason)
    if capturing(device) and (modality is None or not modality.held):
        raise RuntimeError(
            "modality: a CUDA graph captures this layer, and would replay the mask of this one step; "
            "expected attach_modality, which keeps masks where a graph reads them"
        )
    if modality is None:
        runtime.warn_once(
            "MACS: no modality mask around this forward pass, so every token counts as text; call "
            "attach_modality on the model, or macs.modality around the call"
        )
        return Modality.of(torch.zeros(batch, length, dtype=torch.bool, device=device))
    if modality.device != device:
        raise ValueError(f"modality mask: found on {modality.device}, the hidden states are on {device}")
    return modality


@contextmanager
def modality_of_call(value: Modality | Unreadable) -> Iterator[None]:
    """Set what a hook read from a call."""
    token = _current.set(value)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def modality(
    mask: Tensor | Modality, *, valid: Tensor | None = None, exempt: Tensor | None = None
) -> Iterator[Modality]:
    """Set the modality of the tokens for every MACS layer in this block.

    Blocks nest; each thread and asyncio task has its own.

    Args:
        mask: [B, S], bool (True: image token) or modality ids (``TEXT``, ``IMAGE``, ``VIDEO``, ``AUDIO``).
        valid: bool [B, S], False: padding; none: all are tokens.
        exempt: bool [B, S], tokens that are never dropped or rerouted; none: no token.

    Yields:
        The modality.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``mask`` is a ``Modality`` and other arguments are given.
    """
    if not isinstance(mask, Modality):
        mask = Modality.of(mask, valid=valid, exempt=exempt)
    elif valid is not None or exempt is not None:
        raise ValueError("modality: valid and exempt are already part of a Modality")
    with modality_of_call(mask):
        yield mask


def select(
    modality: Modality, batch: int, length: int, shard: tuple[int, int], chunk: tuple[int, int]
) -> Modality:
    """The modality [batch, length] of a layer's tokens, out of that of the whole sequences.

    shard: (index, parts) under sequence parallelism. chunk: (first, chunks): from which token of the part on,
    where an engine divides it into so many calls. A ``ValueError`` if the shapes do not fit.
    """
    (index, parts), (first, chunks) = shard, chunk
    rows, columns = modality.ids.shape
    whole = columns // parts
    size = -(-whole // max(1, min(chunks, whole)))  # as in torch.chunk
    if length == whole:  # not divided: engines divide prompts alone, and only while they serve
        first, size = 0, whole
    if (rows, whole * parts) != (batch, columns) or length != min(size, whole - first):
        raise ValueError(misfit(modality, batch, length * parts))
    return modality.columns(index * whole + first, length)


def misfit(modality: Modality, batch: int | None, length: int) -> str:
    """The error for a mask of other tokens than a layer has: [batch, length], or ``length`` tokens in all."""
    rows, columns = modality.ids.shape
    if batch is None:
        sizes = f"found shape {(rows, columns)}, {rows * columns} tokens; the layer has {length}"
    else:
        sizes = f"found shape {(rows, columns)}, the layer has {batch} sequences of {length} tokens"
    count = length if batch is None else batch * length
    if batch == rows and length < columns:
        way_out = (
            "if this is a decoding step of generate() inside a macs.modality block, the block covers the "
            "prompt alone: use attach_modality, which follows every step, or set min_tokens above the "
            "batch size"
        )
    elif batch == 1 and count < rows * columns:
        way_out = (
            "if the model packs padded sequences by itself, the layers get fewer tokens than it was called "
            "with: use attach_modality on the model that is called with packed_seq_params too, or set "
            "macs.modality around that one"
        )
    else:
        way_out = "set macs.modality, or attach_modality, on the call that passes these tokens to the layer"
    return f"modality mask: {sizes}; {way_out}"
