"""Which token is which, and in which order a layer has them.

Shapes: B sequences of S tokens, T = B S tokens of a layer, in the layer's own order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import INTEGERS, expect
from .steps.kernels.dispatch import fused

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3
KINDS = 4


@dataclass(frozen=True)
class Modality:
    """What is known of the tokens of a forward pass, as [B, S] tensors.

    kinds    int8: TEXT, IMAGE, VIDEO or AUDIO
    valid    bool: False for padding
    segments int64: the picture or clip a token belongs to; any number, the same within one; none: every
             unbroken run of one kind is one. Read only where weights are normalised by image
    exempt   bool: tokens that are never dropped nor rerouted
    held     whether it lies in ``ModalityBuffers``, where a captured CUDA graph may read it
    states_valid  whether somebody said which tokens are padding; otherwise what comes with a call may
    """

    kinds: Tensor
    valid: Tensor
    segments: Tensor | None
    exempt: Tensor
    held: bool = False
    states_valid: bool = False
    _layouts: dict[Layout, Tokens] = field(default_factory=dict, repr=False, compare=False)
    _parts: dict[tuple[int, int], Modality] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        mask: Tensor,
        *,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        exempt: Tensor | None = None,
    ) -> Modality:
        """From a mask [B, S]: bool (True is an image token) or integers (kinds).

        Without ``segments`` every unbroken run of one kind in a sequence is one picture.
        A wrong shape, dtype or device is an error that names the argument; so is an unknown kind in a
        mask on the CPU (on a GPU, where looking would wait for it, it becomes the nearest known one).
        """
        expect("modality mask", mask, (None, None), (torch.bool, *INTEGERS))
        shape, device = tuple(mask.shape), mask.device
        if mask.device.type == "cpu" and mask.numel():
            low, high = int(mask.min()), int(mask.max())
            if low < 0 or high >= KINDS:
                raise ValueError(
                    f"modality mask: found kinds from {low} to {high}, expected 0 to {KINDS - 1}"
                )
        kinds = (mask if mask.dtype == torch.bool else mask.clamp(0, KINDS - 1)).to(torch.int8)
        if segments is not None:
            expect("segments", segments, shape, INTEGERS, device)
        for name, flags in (("valid", valid), ("exempt", exempt)):
            if flags is not None:
                expect(name, flags, shape, (torch.bool,), device)
        return cls(
            kinds=kinds,
            valid=torch.ones_like(mask, dtype=torch.bool) if valid is None else valid,
            segments=None if segments is None else segments.long(),
            exempt=torch.zeros_like(mask, dtype=torch.bool) if exempt is None else exempt,
            states_valid=valid is not None,
        )

    @property
    def device(self) -> torch.device:
        return self.kinds.device

    @property
    def pictures(self) -> Tensor:
        """``segments``, or what stands for them where there are none: int64 [B, S]."""
        return runs(self.kinds) if self.segments is None else self.segments

    def with_valid(self, valid: Tensor) -> Modality:
        """The same tokens, of which those outside ``valid`` bool [B, S] are padding."""
        expect("valid", valid, tuple(self.kinds.shape), (torch.bool,), self.kinds.device)
        return self._changed(valid=valid, states_valid=True)

    def _changed(self, **fields: Any) -> Modality:
        """A copy that shares no layout with this one, and lies in no buffer."""
        return replace(self, held=False, _layouts={}, _parts={}, **fields)

    def folded(self, size: int) -> Modality:
        """A row of samples, ``size`` tokens each, as a sequence each: [B, n size] -> [B n, size]."""

        def samples(values: Tensor) -> Tensor:
            return values.reshape(-1, size)

        return self._changed(
            kinds=samples(self.kinds),
            valid=samples(self.valid),
            segments=None if self.segments is None else samples(self.segments),
            exempt=samples(self.exempt),
        )

    def packed(self, lengths: Tensor, ends: Tensor, count: int) -> Modality:
        """As models that take padding out by themselves: [B, S] -> [1, count].

        lengths int [B]: valid tokens of each sequence. ends int [B + 1]: where each begins and the last one
        ends, with what fills it up. What is filled up is padding.
        """
        rows, columns = self.kinds.shape
        index, place = placed_in(ends, count)
        inside = index < rows
        index = index.clamp(max=max(0, rows - 1))
        real = inside & (place < lengths[index])
        order = torch.argsort((~self.valid).to(torch.int8), dim=1, stable=True)  # valid ones first
        origin = order[index, place.clamp(0, max(0, columns - 1))]

        def taken(values: Tensor) -> Tensor:
            return values[index, origin][None]

        return self._changed(
            kinds=torch.where(real, taken(self.kinds), TEXT).to(torch.int8),
            valid=taken(self.valid) & real,
            segments=taken(self.pictures),
            exempt=taken(self.exempt) & real,
            states_valid=True,
        )

    def columns(self, first: int, count: int) -> Modality:
        """``count`` tokens of every sequence from token ``first`` on, as engines divide sequences that are
        too long for one call or one rank; made once for all layers of a forward pass."""
        if (first, count) == (0, self.kinds.shape[1]):
            return self
        if (first, count) not in self._parts:
            taken = slice(first, first + count)
            self._parts[first, count] = Modality(
                kinds=self.kinds[:, taken],
                valid=self.valid[:, taken],
                segments=None if self.segments is None else self.segments[:, taken],
                exempt=self.exempt[:, taken],
                held=self.held,
                states_valid=self.states_valid,
            )
        return self._parts[first, count]

    def expanded(self, repeats: Tensor, length: int) -> Modality:
        """As engines put the features of a picture where one token stood: [B, S] -> [B, length].

        repeats int64 [B, S]: how many tokens come of each, all of its kind and in a segment of their own.
        Sequences that end before ``length`` are padded, those beyond it cut off.
        """
        expect("repeats", repeats, tuple(self.kinds.shape), (torch.int64,), self.kinds.device)
        rows, columns = self.kinds.shape
        ends = repeats.cumsum(1)
        place = torch.arange(length, device=ends.device).expand(rows, -1).contiguous()
        origin = torch.searchsorted(ends, place, right=True)
        real = origin < columns
        origin = origin.clamp(max=max(0, columns - 1))
        offset = torch.arange(rows, device=ends.device)[:, None] * columns
        return Modality(
            kinds=torch.where(real, self.kinds.gather(1, origin), TEXT).to(torch.int8),
            valid=self.valid.gather(1, origin) & real,
            segments=origin + offset,
            exempt=self.exempt.gather(1, origin) & real,
            states_valid=self.states_valid,
        )

    def batch_major(self, sources: int = 1, segmented: bool = False) -> Tokens:
        """The tokens in the order b S + s, as Hugging Face and DeepSpeed lay them out, of sequences that are
        divided evenly among so many sources; segmented: with the picture of each. Made once for all layers of
        a forward pass."""
        return self._layout(Layout(False, sources, segmented))

    def sequence_major(self, sources: int = 1, segmented: bool = False) -> Tokens:
        """The tokens in the order s B + b, as Megatron lays them out; otherwise as ``batch_major``."""
        return self._layout(Layout(True, sources, segmented))

    def _layout(self, layout: Layout) -> Tokens:
        if layout not in self._layouts:
            self._layouts[layout] = lay_out(self, layout)
        return self._layouts[layout]


def placed_in(ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of ``count`` packed tokens, the sequence of each (N: none any more) and its place in it, int64 [count].

    ends int [N + 1]: where each of N sequences begins, and the last one ends.
    """
    token = torch.arange(count, device=ends.device)
    ends = ends.to(torch.int64).contiguous()
    index = (torch.searchsorted(ends, token, right=True) - 1).clamp(0, len(ends) - 1)
    return index, token - ends[index]


def runs(kinds: Tensor) -> Tensor:
    """Number the unbroken runs of equal kinds, kinds [B, S] -> int64 [B, S], none across rows."""
    starts = torch.ones_like(kinds, dtype=torch.bool)
    starts[:, 1:] = kinds[:, 1:] != kinds[:, :-1]
    return starts.flatten().cumsum(0).view(kinds.shape) - 1


@dataclass(frozen=True)
class Tokens:
    """The tokens of one MoE layer on one process, each field [T], in the layer's order.

    kinds int8, valid bool, exempt bool as in ``Modality``;
    segment int64 in 0..T-1: the picture, where asked for;
    position int64: the token's place in batch-major order (b S + s), a permutation of 0..T-1, which
    settles ties alike in every layout;
    source int64: which of the topology's sources the token came from.
    """

    kinds: Tensor
    valid: Tensor
    exempt: Tensor
    segment: Tensor | None
    position: Tensor
    source: Tensor

    @classmethod
    def all_text(cls, count: int, device: torch.device | str) -> Tokens:
        """``count`` valid text tokens of one source, in batch-major order."""
        index = torch.arange(count, device=device)
        zero = torch.zeros_like(index)
        return cls(zero.to(torch.int8), zero == 0, zero != 0, zero, index, zero)

    def only(self, used: Tensor) -> Tokens:
        """These tokens, of which only those in ``used`` bool [T] are no padding."""
        return replace(self, valid=self.valid & used)

    def with_text_exempt(self) -> Tokens:
        """The same with every text token exempt."""
        return replace(self, exempt=torch.where(self.kinds == TEXT, self.valid, self.exempt))

    @property
    def device(self) -> torch.device:
        return self.kinds.device

    @property
    def visual(self) -> Tensor:
        """Valid tokens whose features are weighed: every kind but text. bool [T]"""
        return (self.kinds != TEXT) & self.valid


class Layout(NamedTuple):
    """In which order a layer has its tokens, of how many sources, and whether it asks for their pictures."""

    sequence_major: bool
    sources: int
    segmented: bool


def lay_out(modality: Modality, layout: Layout) -> Tokens:
    """The tokens of a modality as a layer has them."""
    kinds, valid, exempt, position, source = ordered(modality, layout.sequence_major, layout.sources)
    segment = numbered(modality.pictures)[position] if layout.segmented else None
    return Tokens(kinds, valid, exempt, segment, position, source)


@fused
def ordered(modality: Modality, sequence_major: bool, sources: int) -> tuple[Tensor, ...]:
    """kinds, valid, exempt, position and source of ``Tokens``."""
    rows, columns = modality.kinds.shape
    position = torch.arange(rows * columns, device=modality.device)
    if sequence_major:
        position = position.view(rows, columns).t().flatten()

    def told(values: Tensor) -> Tensor:
        return (values.t() if sequence_major else values).flatten()

    source = (position // max(1, columns)) * sources // max(1, rows)
    return told(modality.kinds), told(modality.valid), told(modality.exempt), position, source


def numbered(segments: Tensor) -> Tensor:
    """Segments int64 [B, S] as numbers 0..T-1, int64 [T]: they are only told apart, so a rank among them will
    do, whatever numbers the user chose."""
    values, order = torch.sort(segments.flatten(), stable=True)
    starts = torch.zeros_like(values)
    starts[1:] = (values[1:] != values[:-1]).long()
    return torch.empty_like(values).scatter_(0, order, starts.cumsum(0))
