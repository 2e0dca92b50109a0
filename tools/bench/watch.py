"""What a call allocates and calls."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """What a call allocates: bytes alive at most, elements of the largest tensor, operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = self.largest = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage().data_ptr() for one in tensors_in((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        for one in tensors_in(out):
            place = one.untyped_storage().data_ptr()
            if place in before and place not in self.alive:
                continue  # a view of what was there
            self.largest = max(self.largest, one.numel())
            if not self.alive[place]:
                self.sizes[place] = one.untyped_storage().nbytes()
                self.now += self.sizes[place]
                self.peak = max(self.peak, self.now)
            self.alive[place] += 1
            weakref.finalize(one, self._gone, place)
        return out

    def _gone(self, place: int) -> None:
        self.alive[place] -= 1
        if not self.alive[place]:
            self.now -= self.sizes[place]
            del self.alive[place]


def tensors_in(value: Any) -> list[Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, Tensor)]
