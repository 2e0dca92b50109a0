"""Which token is of which modality, and in which order a layer has the tokens.

Shapes: B sequences of S tokens, T = B S tokens of a layer, in the layer's own order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import INTEGERS, expect
from .steps.kernels.dispatch import kernels_enabled

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3
MODALITIES = 4


@dataclass(frozen=True)
class Modality:
    """The modality of every token of a forward pass, as [B, S] tensors.

    ids      int8: TEXT, IMAGE, VIDEO or AUDIO
    valid    bool: False for padding
    exempt   bool: tokens that are never dropped or rerouted
    held     whether it lies in ``ModalityBuffers``, where a captured CUDA graph may read it
    states_valid  whether ``valid`` was given; if not, the arguments of a model's call may provide it
    """

    ids: Tensor
    valid: Tensor
    exempt: Tensor
    held: bool = False
    states_valid: bool = False
    _layouts: dict[tuple[bool, int], Tokens] = field(default_factory=dict, repr=False, compare=False)
    _parts: dict[tuple[int, int], Modality] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, mask: Tensor, *, valid: Tensor | None = None, exempt: Tensor | None = None) -> Modality:
        """From a mask [B, S]: bool (True is an image token) or modality ids.

        A wrong shape, dtype or device is an error that names the argument. So is an unknown id in a mask on
        the CPU; on a GPU, where checking it would synchronise, it becomes the nearest known one.
        """
        expect("modality mask", mask, (None, None), (torch.bool, *INTEGERS))
        shape, device = tuple(mask.shape), mask.device
        if mask.device.type == "cpu" and mask.numel():
            low, high = int(mask.min()), int(mask.max())
            if low < 0 or high >= MODALITIES:
                raise ValueError(f"modality mask: found ids {low} to {high}, expected 0 to {MODALITIES - 1}")
        for name, flags in (("valid", valid), ("exempt", exempt)):
            if flags is not None:
                expect(name, flags, shape, (torch.bool,), device)
        return cls(
            ids=(mask if mask.dtype == torch.bool else mask.clamp(0, MODALITIES - 1)).to(torch.int8),
            valid=torch.ones_like(mask, dtype=torch.bool) if valid is None else valid,
            exempt=torch.zeros_like(mask, dtype=torch.bool) if exempt is None else exempt,
            states_valid=valid is not None,
        )

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def with_valid(self, valid: Tensor) -> Modality:
        """The same tokens; those outside ``valid`` bool [B, S] are padding."""
        expect("valid", valid, tuple(self.ids.shape), (torch.bool,), self.device)
        return self._changed(valid=valid, states_valid=True)

    def _changed(self, **fields: Any) -> Modality:
        """A copy outside of any buffer, without the layouts made of this one."""
        return replace(self, held=False, _layouts={}, _parts={}, **fields)

    def folded(self, size: int) -> Modality:
        """Rows of several samples, ``size`` tokens each, as one sequence each: [B, n size] -> [B n, size]."""
        return self._changed(
            **{name: getattr(self, name).reshape(-1, size) for name in ("ids", "valid", "exempt")}
        )

    def packed(self, lengths: Tensor, ends: Tensor, count: int) -> Modality:
        """As models that remove padding by themselves: [B, S] -> [1, count].

        lengths int [B]: valid tokens of each sequence. ends int [B + 1]: where each begins and the last one
        ends, with its alignment padding, which is padding here.
        """
        rows, columns = self.ids.shape
        index, place = locate_in(ends, count)
        inside = index < rows
        index = index.clamp(max=max(0, rows - 1))
        real = inside & (place < lengths[index])
        order = torch.argsort((~self.valid).to(torch.int8), dim=1, stable=True)  # valid ones first
        origin = order[index, place.clamp(0, max(0, columns - 1))]
        return self._changed(
            ids=torch.where(real, self.ids[index, origin], TEXT).to(torch.int8)[None],
            valid=(self.valid[index, origin] & real)[None],
            exempt=(self.exempt[index, origin] & real)[None],
            states_valid=True,
        )

    def columns(self, first: int, count: int) -> Modality:
        """``count`` tokens of every sequence from token ``first`` on, as engines divide long sequences among
        calls or ranks; made once for all layers of a forward pass."""
        if (first, count) == (0, self.ids.shape[1]):
            return self
        if (first, count) not in self._parts:
            part = slice(first, first + count)
            self._parts[first, count] = Modality(
                self.ids[:, part], self.valid[:, part], self.exempt[:, part], self.held, self.states_valid
            )
        return self._parts[first, count]

    def expanded(self, repeats: Tensor, length: int) -> Modality:
        """As engines replace one token by the features of a picture: [B, S] -> [B, length].

        repeats int64 [B, S]: number of tokens that each becomes, all of its modality. Sequences that end
        before ``length`` are padded, longer ones are cut.
        """
        expect("repeats", repeats, tuple(self.ids.shape), (torch.int64,), self.device)
        rows, columns = self.ids.shape
        ends = repeats.cumsum(1)
        place = torch.arange(length, device=ends.device).expand(rows, -1).contiguous()
        origin = torch.searchsorted(ends, place, right=True)
        real = origin < columns
        origin = origin.clamp(max=max(0, columns - 1))
        return self._changed(
            ids=torch.where(real, self.ids.gather(1, origin), TEXT).to(torch.int8),
            valid=self.valid.gather(1, origin) & real,
            exempt=self.exempt.gather(1, origin) & real,
        )

    def tokens(self, sequence_major: bool = False, sources: int = 1) -> Tokens:
        """The tokens in the order b S + s, as in Hugging Face and DeepSpeed, or s B + b, as in Megatron, of
        sequences divided evenly among ``sources``; made once for all layers of a forward pass."""
        layout = sequence_major, sources
        if layout not in self._layouts:
            self._layouts[layout] = Tokens(*ordered(self, *layout))
        return self._layouts[layout]


def locate_in(ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sequence of each of ``count`` packed tokens (N: after the last) and its index there, int64 [count].

    ends int [N + 1]: where each of N sequences begins, and the last one ends.
    """
    token = torch.arange(count, device=ends.device)
    ends = ends.to(torch.int64).contiguous()
    index = (torch.searchsorted(ends, token, right=True) - 1).clamp(0, len(ends) - 1)
    return index, token - ends[index]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one MoE layer on one process, each field [T], in the layer's order.

    modality int8, valid bool, exempt bool: as in ``Modality``
    position int64: the token's index in batch-major order (b S + s), a permutation of 0..T-1, which breaks
    ties alike in every layout
    source   int64: index of the topology's source that the token came from
    """

    modality: Tensor
    valid: Tensor
    exempt: Tensor
    position: Tensor
    source: Tensor

    @classmethod
    def all_text(cls, count: int, device: torch.device | str) -> Tokens:
        """``count`` valid text tokens of one source, in batch-major order."""
        index = torch.arange(count, device=device)
        zero = torch.zeros_like(index)
        return cls(zero.to(torch.int8), zero == 0, zero != 0, index, zero)

    def only(self, used: Tensor) -> Tokens:
        """The same; tokens outside ``used`` bool [T] are padding."""
        return replace(self, valid=self.valid & used)

    def with_text_exempt(self) -> Tokens:
        """The same; every text token is exempt."""
        return replace(self, exempt=torch.where(self.modality == TEXT, self.valid, self.exempt))

    @property
    def device(self) -> torch.device:
        return self.modality.device

    @property
    def visual(self) -> Tensor:
        """Valid tokens that are weighed by their features: all but text. bool [T]"""
        return torch.logical_and(self.modality, self.valid)  # TEXT is 0


def ordered(modality: Modality, sequence_major: bool, sources: int) -> tuple[Tensor, ...]:
    """The fields of ``Tokens``, in their order."""
    if kernels_enabled(modality.device):
        from .steps.kernels import tokens as kernels

        return kernels.ordered(modality, sequence_major, sources)
    rows, columns = modality.ids.shape
    position = torch.arange(rows * columns, device=modality.device)
    if sequence_major:
        position = position.view(rows, columns).t().flatten()

    def flat(values: Tensor) -> Tensor:
        return (values.t() if sequence_major else values).flatten()

    source = (position // max(1, columns)) * sources // max(1, rows)
    return flat(modality.ids), flat(modality.valid), flat(modality.exempt), position, source
