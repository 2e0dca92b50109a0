"""Wall time of the MoE layers of a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from macs_tools.common.clock import settle


class LayerClock:
    """Wall time of a model's MoE layers in prompts (calls on more than one token a sequence)."""

    def __init__(self, model: nn.Module, kind: type[nn.Module], length_axis: int) -> None:
        """``kind`` of layer, called with hidden states whose ``length_axis`` counts a sequence's tokens."""
        self.layers = [module for module in model.modules() if isinstance(module, kind)]
        self.length_axis = length_axis

    @contextmanager
    def running(self) -> Iterator[list[float]]:
        """Yields a list that holds, on leaving, the milliseconds of every call of a layer."""
        times: list[float] = []
        started: list[float] = []

        def before(module: nn.Module, args: tuple) -> None:
            settle()
            started.append(time.perf_counter())

        def after(module: nn.Module, args: tuple, output: object) -> None:
            settle()
            elapsed = (time.perf_counter() - started.pop()) * 1e3
            if args[0].shape[self.length_axis] > 1:
                times.append(elapsed)

        handles = [layer.register_forward_pre_hook(before) for layer in self.layers]
        handles += [layer.register_forward_hook(after) for layer in self.layers]
        try:
            yield times
        finally:
            for handle in handles:
                handle.remove()
