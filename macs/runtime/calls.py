"""The modality of a call's tokens: the one place where masks, ids and packing are read.

Modality, first found wins:

1. a ``macs.modality`` block around the call, of the same [B, S]
2. the engine's own mask of image tokens (``engine_ids`` of ``CallReader.read``)
3. ``mm_token_type_ids``
4. token ids
5. none of these: all text, if the model has no other modality; otherwise an error at the first layer that
   plans

Padding, first found wins:

1. ``valid`` of the ``macs.modality`` block
2. what comes with the call, all of it together: ``attention_mask`` (2-D, or 4-D as attention takes it),
   ``padding_mask``, packed-sequence parameters
3. ``padding_token_id``, for calls without a mask. Megatron's 4-D mask comes with every call and is usually
   causal alone, so it does not count as one: a token is padding by either

Shapes: B sequences of S tokens, K >= S keys of an attention mask, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import INTEGERS, expect
from ..tokens import TEXT, Modality, locate_in
from .modality import Unreadable

WAY_OUT = "set macs.modality(mask, valid=...) around the call"


@dataclass(frozen=True)
class CallReader:
    """Turns the arguments of a model's call into a ``Modality``.

    token_modality  token id -> modality id
    padding_id      the id of padding, for calls without a mask; none: no id is padding
    text_only       the model has no modality but text
    masked_is_true  a 4-D bool attention mask is True where attention is *masked*, as in Megatron; False:
                    where it attends, as in Hugging Face
    """

    token_modality: Mapping[int, int] = field(default_factory=dict)
    padding_id: int | None = None
    text_only: bool = False
    masked_is_true: bool = False

    def read(
        self, given: Mapping[str, Any], outer: Modality | None = None, engine_ids: Tensor | None = None
    ) -> Modality | Unreadable | None:
        """The modality of a call's tokens.

        Args:
            given: the call's arguments by name.
            outer: the ``macs.modality`` block around it.
            engine_ids: modality ids int8 [B, S], where the engine itself has them.

        Returns:
            None for a call without tokens, such as that of a pipeline stage that gets hidden states alone;
            an ``Unreadable`` for one that cannot be read, which the first layer that plans raises. Where
            nothing is planned, nothing is checked.
        """
        try:
            return self._read(given, outer, engine_ids)
        except (ValueError, TypeError) as error:
            return Unreadable(str(error))

    def _read(
        self, given: Mapping[str, Any], outer: Modality | None, engine_ids: Tensor | None
    ) -> Modality | None:
        shape = shape_of(given)
        if shape is None:
            packed = given.get("packed_seq_params")
            if packed is not None and outer is not None:
                return packed_inside(outer, packed)
            if packed is not None and self.token_modality:
                raise ValueError(
                    "packed_seq_params: found it without input_ids; use attach_modality on the model that "
                    f"packs, too, or {WAY_OUT}"
                )
            return None
        valid = self._valid(given, shape)
        if outer is not None and tuple(outer.ids.shape) == shape:
            if valid is not None and not outer.states_valid:
                outer = outer.with_valid(valid)
            return folded(outer, given)
        ids = engine_ids
        if ids is None and outer is not None and self.has_no_modality(given):
            return None  # the block is of other tokens: the layers raise
        if ids is None:
            ids = self._ids(given, shape)
        if ids is None:
            return None
        return folded(Modality.of(ids.to(torch.int8), valid=valid), given)

    def _ids(self, given: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
        """Modality ids int8 [B, S]; none where the layers raise."""
        tokens, types = given.get("input_ids"), given.get("mm_token_type_ids")
        if isinstance(types, Tensor):
            if types.dim() != 2:
                found = tuple(types.shape)
                raise ValueError(f"mm_token_type_ids: found shape {found}, expected [B, S]; {WAY_OUT}")
            # A processor's types are of the prompt; what was generated behind it is text. Types that are as
            # wide as the call behind a cache may be either's, and ids tell.
            past = past_of(given)
            unclear = types.shape[1] == shape[1] and not (isinstance(past, int) and past == 0)
            if not (unclear and self.token_modality and isinstance(tokens, Tensor)):
                return own_columns("mm_token_type_ids", types, shape, past, TEXT)
        if isinstance(tokens, Tensor):
            masked = any(given.get(name) is not None for name in ("attention_mask", "padding_mask"))
            if not (self.token_modality or self.text_only or self.padding_id is not None or masked):
                return None
            ids = torch.full_like(tokens, TEXT, dtype=torch.int8)
            for token_id, modality in self.token_modality.items():
                ids = ids.masked_fill(tokens == token_id, modality)
            return ids
        embeds = given["inputs_embeds"]
        if self.text_only:
            return torch.zeros(shape, dtype=torch.int8, device=embeds.device)
        raise ValueError(
            "inputs_embeds: found them without input_ids, and they do not tell visual tokens from text; "
            f"expected input_ids or mm_token_type_ids beside them, or {WAY_OUT}"
        )

    def has_no_modality(self, given: Mapping[str, Any]) -> bool:
        """Whether neither the call nor what is known of the model tells visual tokens from text."""
        return not (self.token_modality or self.text_only or given.get("mm_token_type_ids") is not None)

    def _valid(self, given: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
        """Tokens that are not padding, bool [B, S]; none: unknown."""
        masks: list[Tensor] = []
        causal: Tensor | None = None
        mask = given.get("attention_mask")
        if isinstance(mask, Mapping):  # Hugging Face's, by kind of attention
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            masks.append(own_columns("attention_mask", mask, shape, past_of(given)) != 0)
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            seen = (~mask if self.masked_is_true else mask) if mask.dtype == torch.bool else mask >= 0
            if self.masked_is_true:
                causal = real_keys(seen, shape)
            else:
                masks.append(real_keys(seen, shape))
        elif mask is not None:
            what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: found {what}, expected [B, S] or [B, 1, S, K]; {WAY_OUT}")
        padding = given.get("padding_mask")
        if padding is not None:
            found = tuple(padding.shape) if isinstance(padding, Tensor) else type(padding).__name__
            if found != shape:
                raise ValueError(f"padding_mask: found {found}, expected shape {shape}, True for padding")
            masks.append(padding == 0)
        starts = packing_of(given)
        if starts is not None:
            if shape[0] != 1:
                raise ValueError(
                    f"packed sequences: found {shape[0]} rows of tokens, expected one that holds them "
                    f"all; {WAY_OUT}"
                )
            lengths, ends = starts
            index, place = locate_in(ends, shape[1])
            masks.append((place < torch.cat([lengths, lengths.new_zeros(1)])[index])[None])
        ids = given.get("input_ids")
        if not masks and self.padding_id is not None and isinstance(ids, Tensor):
            masks.append(ids != self.padding_id)
        if causal is not None:
            masks.append(causal)
        if not masks:
            return None
        valid = masks[0]
        for mask in masks[1:]:
            valid = valid & mask
        return valid.expand(shape)


def shape_of(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """[B, S] of the call's tokens, from ids, embeddings or a processor's types; none where it has none."""
    for name in ("input_ids", "inputs_embeds", "mm_token_type_ids"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() >= 2:
            return tensor.shape[0], tensor.shape[1]
    return None


def past_of(given: Mapping[str, Any]) -> int | Tensor:
    """Tokens in the call's cache, before its own: a number, or a tensor where the cache keeps one.

    transformers calls the argument ``cache`` from 5.24 on.
    """
    cache = given.get("past_key_values", given.get("cache"))
    length = getattr(cache, "get_seq_length", None)
    past: int | Tensor = 0 if length is None else length()
    return past


def own_columns(
    name: str, tensor: Tensor, shape: tuple[int, int], past: int | Tensor, behind: int | None = None
) -> Tensor:
    """The columns of ``tensor`` [B, S'] that belong to a call's tokens [B, S], which follow ``past`` others.

    As transformers reads them: a column is a position in the cache, also where a static cache has room to
    spare. Positions beyond the last column are ``behind``; without it they are an error.
    """
    rows, count = shape
    width = tensor.shape[1]
    if width == count and tensor.shape[0] == rows:
        return tensor
    if tensor.shape[0] != rows or (width < count and behind is None):
        raise ValueError(
            f"{name}: found shape {tuple(tensor.shape)}, expected {rows} sequences of {count} tokens or more"
        )
    if isinstance(past, int) and past + count > width and behind is None:
        past = width - count  # a window of the cache
    own = torch.arange(count, device=tensor.device)
    place = own + (past.to(tensor.device) if isinstance(past, Tensor) else past)
    found = tensor.index_select(1, place.clamp(max=width - 1))
    return found if behind is None else torch.where(place < width, found, behind)


def real_keys(seen: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Tokens that are not padding, from an attention mask: seen bool [B or 1, 1 or heads, S, K], True where
    the query attends to the key -> bool [B, S].

    Padding is a key that no query attends to. Engines let padding in front of a prompt, which has nothing to
    attend to, attend to everything: if the first query of a sequence does, such rows are ignored. Of K > S
    keys the tokens' own end where the last query that attends furthest does, so that caches with spare
    memory are read too.
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
    """Packed sequences, (lengths int [N], ends with alignment padding int [N + 1]), if there are any:
    Megatron's ``PackedSeqParams``, or Hugging Face's ``cu_seq_lens_q``."""
    packed = given.get("packed_seq_params")
    ends = getattr(packed, "cu_seqlens_q", None) if packed is not None else given.get("cu_seq_lens_q")
    if ends is None:
        return None
    expect("packed sequences", ends, (None,), INTEGERS)
    padded = getattr(packed, "cu_seqlens_q_padded", None) if packed is not None else None
    return ends.diff(), ends if padded is None else padded


def packed_inside(outer: Modality, packed: Any) -> Modality | None:
    """The modality of sequences that a model has packed by itself: outer [B, S], padded -> [1, T].

    For the language model inside a multimodal one, which is called with what the outer model made.
    """
    packing = packing_of({"packed_seq_params": packed})
    if packing is None or outer.ids.shape[0] == 1:
        return None
    lengths, ends = packing
    rows = outer.ids.shape[0]
    if len(lengths) != rows:
        raise ValueError(
            f"packed sequences: found {len(lengths)}, the modality mask around them has {rows} sequences; "
            "set macs.modality around the model that is called with the packed tokens"
        )
    total = getattr(packed, "total_tokens", None)
    return outer.packed(lengths, ends, int(ends[-1]) if total is None else total)


def folded(modality: Modality, given: Mapping[str, Any]) -> Modality:
    """``PackedSeqParams.tokens_per_sample``: a layer gets [B, that many] of a row that holds B samples."""
    size = getattr(given.get("packed_seq_params"), "tokens_per_sample", None)
    if size is None or modality.ids.shape[1] <= size or modality.ids.shape[1] % size:
        return modality
    return modality.folded(size)
