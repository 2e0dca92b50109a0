"""What a model's call says of its tokens: the one place where masks, ids and packing are read.

Which token is of which modality, first found wins:

1. a ``macs.modality`` block around the call, of the same [B, S]
2. the engine's own mask of image tokens (``kinds`` of ``CallReader.read``)
3. ``mm_token_type_ids``
4. token ids
5. nothing tells: all text, if the model is known to have nothing else; otherwise an error at the first
   layer that plans

Which token is padding, first found wins:

1. ``valid`` of the ``macs.modality`` block
2. what comes with the call, all of it together: ``attention_mask`` (2-D, or 4-D as attention takes it),
   ``padding_mask``, packed-sequence parameters
3. ``padding_token_id``, where a call brings no mask. Megatron's 4-D mask, which comes with every call and is
   causal alone as a rule, does not stand in its way: what either tells is padding

Shapes: B sequences of S tokens, K >= S keys of an attention mask, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import INTEGERS, expect
from ..tokens import TEXT, Modality, placed_in
from .context import Unreadable

WAY_OUT = "set macs.modality(mask, valid=...) around the call"


@dataclass(frozen=True)
class CallReader:
    """Turns the arguments of a model's call into a ``Modality``.

    token_kinds   token id -> modality id
    padding_id    the id of padding, for calls without a mask; none: no id is padding
    text_only     the model has no modality but text, so that a call without ids is not a riddle
    masked_is_true  a 4-D attention mask of bools is True where attention is *masked*, as Megatron has it,
                  and not where it looks, as Hugging Face does
    """

    token_kinds: Mapping[int, int] = field(default_factory=dict)
    padding_id: int | None = None
    text_only: bool = False
    masked_is_true: bool = False

    def read(
        self, given: Mapping[str, Any], outer: Modality | None = None, kinds: Tensor | None = None
    ) -> Modality | Unreadable | None:
        """The modality of a call's tokens.

        given: the call's arguments by name. outer: the ``macs.modality`` block around it. kinds: int8 [B, S],
        where the engine itself knows. Returns none for a call that says nothing of tokens at all, such
        as one of a pipeline stage that gets hidden states alone, and an ``Unreadable`` where it says
        something that cannot be read: the first layer that plans then raises it.

        Raises a ``ValueError`` for a mask of another shape than the tokens.
        """
        shape, device = shape_of(given)
        if shape is None:
            packed = given.get("packed_seq_params")
            if packed is not None and outer is not None:
                return packed_inside(outer, packed)
            return None
        valid, reason = self._valid(given, shape, device)
        if reason is not None:
            return Unreadable(reason)
        if outer is not None and tuple(outer.kinds.shape) == shape:
            if valid is not None and not outer.states_valid:
                outer = outer.with_valid(valid)
            return folded(outer, given)
        if kinds is None and outer is not None and self.tells_nothing(given):
            return None  # whoever set the block means other tokens: the layers will say so
        if kinds is None:
            kinds, reason = self._kinds(given, shape)
        if kinds is None:
            if reason is None:
                return None
            return Unreadable(reason)
        segments = None
        bounds = sequence_bounds(given, shape)
        if bounds is not None:
            # Pictures that touch across a border between packed sequences are two.
            segments = runs_within(kinds, bounds)
        found = Modality.of(kinds.to(torch.int8), valid=valid, segments=segments)
        return folded(found, given)

    def _kinds(self, given: Mapping[str, Any], shape: tuple[int, int]) -> tuple[Tensor | None, str | None]:
        """Modality ids int8 [B, S], or why there are none (or neither, where the layers say so)."""
        ids, types = given.get("input_ids"), given.get("mm_token_type_ids")
        if isinstance(types, Tensor):
            if types.dim() != 2:
                return (
                    None,
                    f"mm_token_type_ids: found shape {tuple(types.shape)}, expected [B, S]; {WAY_OUT}",
                )
            return last_columns("mm_token_type_ids", types, shape), None
        if isinstance(ids, Tensor):
            if not (self.token_kinds or self.text_only or self.padding_id is not None or self._masks(given)):
                return None, None
            kinds = torch.full_like(ids, TEXT, dtype=torch.int8)
            for token_id, kind in self.token_kinds.items():
                kinds = kinds.masked_fill(ids == token_id, kind)
            return kinds, None
        embeds = given["inputs_embeds"]
        if self.text_only:
            return torch.zeros(shape, dtype=torch.int8, device=embeds.device), None
        return None, (
            "inputs_embeds: found them in the place of input_ids, and they do not tell visual tokens from "
            "text; "
            f"expected input_ids or mm_token_type_ids beside them, or {WAY_OUT}"
        )

    def tells_nothing(self, given: Mapping[str, Any]) -> bool:
        """Whether neither the call nor what is known of the model tells visual tokens from text."""
        return not (self.token_kinds or self.text_only or given.get("mm_token_type_ids") is not None)

    def _masks(self, given: Mapping[str, Any]) -> bool:
        return any(given.get(name) is not None for name in ("attention_mask", "padding_mask"))

    def _valid(
        self, given: Mapping[str, Any], shape: tuple[int, int], device: torch.device
    ) -> tuple[Tensor | None, str | None]:
        """Which tokens are no padding, bool [B, S]; none where nothing tells; or why that cannot be read."""
        told: list[Tensor] = []
        causal: Tensor | None = None
        mask = given.get("attention_mask")
        if isinstance(mask, Mapping):  # Hugging Face's, by kind of attention
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            told.append(last_columns("attention_mask", mask, shape) != 0)
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            seen = (~mask if self.masked_is_true else mask) if mask.dtype == torch.bool else mask >= 0
            if self.masked_is_true:
                causal = real_keys(seen, shape)
            else:
                told.append(real_keys(seen, shape))
        elif mask is not None:
            what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            return None, f"attention_mask: found {what}, expected [B, S] or [B, 1, S, K]; {WAY_OUT}"
        padding = given.get("padding_mask")
        if padding is not None:
            found = tuple(padding.shape) if isinstance(padding, Tensor) else type(padding).__name__
            if found != shape:
                raise ValueError(f"padding_mask: found {found}, expected shape {shape}, True for padding")
            told.append(padding == 0)
        starts = packing_of(given)
        if starts is not None:
            if shape[0] != 1:
                return None, (
                    f"packed sequences: found {shape[0]} rows of tokens, expected one that holds them "
                    f"all; {WAY_OUT}"
                )
            told.append(within_sequences(*starts, shape[1]))
        ids = given.get("input_ids")
        if not told and self.padding_id is not None and isinstance(ids, Tensor):
            told.append(ids != self.padding_id)
        if causal is not None:
            told.append(causal)
        if not told:
            return None, None
        valid = told[0]
        for one in told[1:]:
            valid = valid & one
        return valid.expand(shape), None


def shape_of(given: Mapping[str, Any]) -> tuple[tuple[int, int] | None, torch.device]:
    """[B, S] of the call's tokens, from ids, embeddings or a processor's types; none where it has none."""
    for name in ("input_ids", "inputs_embeds", "mm_token_type_ids"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() >= 2:
            return (tensor.shape[0], tensor.shape[1]), tensor.device
    return None, torch.device("cpu")


def last_columns(name: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """The columns of ``tensor`` [B, S' >= S] that belong to a call's tokens [B, S]: those before are of
    a cache."""
    rows, count = shape
    if tensor.shape[0] != rows or tensor.shape[1] < count:
        raise ValueError(
            f"{name}: found shape {tuple(tensor.shape)}, expected {rows} sequences of {count} tokens or more"
        )
    return tensor[:, tensor.shape[1] - count :]


def real_keys(seen: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Which tokens are no padding, from an attention mask: seen bool [B or 1, 1 or heads, S, K], True where
    the query looks at the key -> bool [B, S].

    Padding is a key that nobody looks at. Engines let a query that has nothing to look at, padding in
    front of a prompt, look at everything: if the first query of a sequence does, such rows do not count.
    Of K > S keys the tokens' own are those that end where the last query that looks furthest does, so
    that caches with room to spare are read too.
    """
    rows, count = shape
    if seen.shape[0] not in (1, rows) or seen.shape[2] != count or seen.shape[3] < count:
        raise ValueError(
            f"attention_mask: found shape {tuple(seen.shape)}, expected "
            f"[{rows} or 1, 1, {count}, {count} or more]"
        )
    looks = seen.any(1)  # [B, S, K]
    if count == 0:
        return torch.ones(shape, dtype=torch.bool, device=seen.device)
    keys = torch.arange(looks.shape[2], device=seen.device)
    if looks.shape[2] > count:
        furthest = torch.where(looks[:, -1], keys, -1).amax()
        first = (furthest - (count - 1)).clamp(0, looks.shape[2] - count)
        own = first + keys[:count]
    else:
        own = keys
    looks = looks.index_select(2, own)  # [B, S, S]
    everything = looks.all(2)
    counts = ~(everything & everything[:, :1])  # [B, S]
    found = (looks & counts[:, :, None]).any(1) | ~counts.any(1, keepdim=True)
    return found.expand(rows, count)


def packing_of(given: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Where packed sequences end, (lengths int [N], ends with what pads each int [N + 1]), if they are told:
    Megatron's ``PackedSeqParams``, or Hugging Face's ``cu_seq_lens_q``."""
    packed = given.get("packed_seq_params")
    ends = getattr(packed, "cu_seqlens_q", None) if packed is not None else given.get("cu_seq_lens_q")
    if ends is None:
        return None
    expect("packed sequences", ends, (None,), INTEGERS)
    padded = getattr(packed, "cu_seqlens_q_padded", None) if packed is not None else None
    return ends.diff(), ends if padded is None else padded


def within_sequences(lengths: Tensor, ends: Tensor, count: int) -> Tensor:
    """Which of ``count`` packed tokens belong to a sequence, bool [1, count]; the others fill up."""
    index, place = placed_in(ends, count)
    known = torch.cat([lengths, lengths.new_zeros(1)])
    return (place < known[index])[None]


def packed_inside(outer: Modality, packed: Any) -> Modality | Unreadable | None:
    """The modality of sequences that a model has packed by itself: outer [B, S], padded -> [1, T].

    For the language model inside a multimodal one, which is called with what the outer model made.
    """
    told = packing_of({"packed_seq_params": packed})
    if told is None or outer.kinds.shape[0] == 1:
        return None
    lengths, ends = told
    rows = outer.kinds.shape[0]
    if len(lengths) != rows:
        return Unreadable(
            f"packed sequences: found {len(lengths)}, the modality mask around them has {rows} sequences; "
            "set macs.modality around the model that is called with the packed tokens"
        )
    total = getattr(packed, "total_tokens", None)
    return outer.packed(lengths, ends, int(ends[-1]) if total is None else total)


def folded(modality: Modality, given: Mapping[str, Any]) -> Modality:
    """``PackedSeqParams.tokens_per_sample``: a layer gets [B, that many] of a row that holds B samples."""
    size = getattr(given.get("packed_seq_params"), "tokens_per_sample", None)
    if size is None or modality.kinds.shape[1] <= size or modality.kinds.shape[1] % size:
        return modality
    return modality.folded(size)


def sequence_bounds(given: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Where a packed sequence begins, bool [B, S], as packing or ``position_ids`` that start anew tell."""
    told, position = packing_of(given), given.get("position_ids")
    if told is not None:
        return (placed_in(told[1], shape[1])[1] == 0)[None]
    if not isinstance(position, Tensor) or tuple(position.shape) != shape or shape[0] != 1:
        return None
    starts = torch.ones(shape, dtype=torch.bool, device=position.device)
    starts[:, 1:] = position[:, 1:] < position[:, :-1]
    return starts


def runs_within(kinds: Tensor, starts: Tensor) -> Tensor:
    """Number the unbroken runs of equal kinds [B, S] that no start bool [B, S] divides. int64 [B, S]"""
    new = starts.clone()
    new[:, 0] = True
    new[:, 1:] |= kinds[:, 1:] != kinds[:, :-1]
    return new.flatten().cumsum(0).view(kinds.shape) - 1
