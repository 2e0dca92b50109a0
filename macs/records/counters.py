"""Counters that last as long as the process, for monitoring a model while it serves.

Every layer adds its steps to a row on the device, in the launch that records the step. At the end of a
forward pass all rows are copied to the host, asynchronously and on the stream of the step. So they can be
read at any time, from any thread, without a call to the device, also where a CUDA graph replays the step.

Shapes: E experts, R ranks.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..steps.combine import load_of, scalar_of
from ..steps.contracts import Field, record_size
from ..steps.record import TOTALS, Totals
from ..topology import Topology
from .load import relative_imbalance, relative_load


@dataclass(frozen=True)
class LayerTotals:
    """Sums over all steps of one layer since it was first counted: row int64 [23 + 3 E], on the host."""

    row: Tensor
    topology: Topology
    top_k: int

    def total(self, name: str) -> float:
        """One of ``TOTALS``."""
        return float(self.row[TOTALS.index(name)])

    def scalar(self, name: str) -> float:
        """The sum of a scalar of ``PlanStatistics``."""
        return float(scalar_of(self.row[len(TOTALS) :], name))

    def rows_of_experts(self, stage: str) -> Tensor:
        """As ``LayerReport.rows_of_experts``, summed: float64 [E]."""
        return load_of(self.row[len(TOTALS) :], f"load_{stage}").double()

    def since(self, before: LayerTotals) -> LayerTotals:
        """What was added since an earlier reading."""
        return LayerTotals(self.row - before.row, self.topology, self.top_k)

    def load(self, stage: str) -> float:
        """``relative_load`` over all steps, each weighted by its tokens."""
        busiest, tokens = torch.tensor([self.total(f"rank_{stage}"), self.scalar("tokens")])
        return float(relative_load(busiest, tokens, self.top_k, self.topology.num_ranks))

    def imbalance(self, stage: str) -> float:
        """``relative_imbalance`` over all steps, each weighted by its assignments."""
        busiest = torch.tensor(self.total(f"expert_{stage}"))
        return float(relative_imbalance(busiest, self.rows_of_experts(stage)))

    def actions(self) -> dict[str, dict[str, float]]:
        """Assignments by modality and action: kept, rerouted or dropped."""
        every = {action: self.scalar(action) for action in ("kept", "rerouted", "dropped")}
        visual = {action: self.scalar(f"visual_{action}") for action in every}
        return {"text": {action: every[action] - visual[action] for action in every}, "visual": visual}


@dataclass(frozen=True)
class Reading:
    """One reading of all layers' counters.

    leading: for each block of layers that began to run together, the one with the most steps, which counts
    the block's forward passes and tokens. bypassed: steps left to the router because they were small. blocks:
    identities of the blocks.
    """

    layers: tuple[LayerTotals, ...] = ()
    leading: tuple[int, ...] = ()
    bypassed: int = 0
    blocks: tuple[int, ...] = ()

    @property
    def leaders(self) -> list[LayerTotals]:
        return [self.layers[index] for index in self.leading]

    @property
    def planned_steps(self) -> int:
        return sum(int(layer.total("planned_steps")) for layer in self.leaders)

    @property
    def bypassed_steps(self) -> int:
        """Steps in which nothing was planned: those of ``bypassed``, those with fewer valid tokens than
        ``min_tokens``, and those of a policy without plans (vanilla)."""
        unplanned = (layer.total("steps") - layer.total("planned_steps") for layer in self.leaders)
        return self.bypassed + sum(map(int, unplanned))

    def since(self, before: Reading) -> Reading:
        """What was added since an earlier reading of the same blocks."""
        layers = tuple(now.since(then) for now, then in zip(self.layers, before.layers, strict=True))
        return Reading(layers, self.leading, self.bypassed - before.bypassed, self.blocks)


@dataclass
class _Block:
    """Rows of the layers that were there when the first of them ran, after one number, ``bypassed``.

    final: index of the layer that ended the last forward pass. ran: index of the layer that ran last.
    """

    rows: Tensor
    host: Tensor
    layers: Sequence[weakref.ref[Any]]
    shapes: Sequence[tuple[Topology, int]]
    parts: Sequence[Totals]
    final: int
    ran: int | None = None

    @property
    def alive(self) -> bool:
        return any(layer() is not None for layer in self.layers)

    def runs(self, index: int) -> bool:
        """Note that a layer runs; whether it is the first of a forward pass."""
        begins = self.ran is None or index <= self.ran
        if begins and self.ran is not None:  # the pass before ended there
            if self.ran < self.final:
                self.publish()
            self.final = self.ran
        self.ran = index
        return begins

    def publish(self) -> None:
        """Copy the rows to the host, behind the work queued on the device."""
        self.host.copy_(self.rows, non_blocking=True)

    def snapshot(self) -> Tensor:
        """A copy of the numbers on the host, not of one half before and one half after a ``publish``."""
        copy = self.host.clone()
        while not torch.equal(copy, again := self.host.clone()):
            copy = again
        return copy


class Counters:
    """The counters of a runtime's layers.

    ``prepare`` allocates them when a layer first runs, ``row`` is where a layer adds its steps, ``publish``
    and ``bypassed`` are called by every layer and act where a forward pass ends. The counts of layers are
    dropped when none of their block is left.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._blocks: list[_Block] = []
        self._index: weakref.WeakKeyDictionary[Any, tuple[_Block, int]] = weakref.WeakKeyDictionary()

    @property
    def forked(self) -> bool:
        """Whether this is another process than that which began to count."""
        return self._process != os.getpid()

    def check_process(self) -> None:
        """Raise a ``RuntimeError`` in a forked process, whose counts nobody could read."""
        if self.forked:
            raise RuntimeError(
                "serve_metrics: found a process forked after it, whose steps its endpoint does not count; "
                "expected serve_metrics in every worker, each with its own port (in post_fork of gunicorn)"
            )

    def __contains__(self, layer: Any) -> bool:
        return layer in self._index

    def prepare(self, layers: Mapping[Any, tuple[Topology, int]], device: torch.device) -> None:
        """Allocate counters for the layers that have none, given topology and k of each."""
        new = {layer: shape for layer, shape in layers.items() if layer not in self._index}
        if not new:
            return
        widths = [len(TOTALS) + record_size(topology.num_experts) for topology, _ in new.values()]
        with torch.inference_mode(False):  # as in ``LayerRecorder``
            rows = torch.zeros(1 + sum(widths), dtype=torch.int64, device=device)
            host = torch.zeros_like(rows, device="cpu", pin_memory=device.type == "cuda")
            maps = [torch.tensor(topology.experts_of_rank(), device=device) for topology, _ in new.values()]
        parts = [Totals(*part) for part in zip(rows[1:].split(widths), maps, strict=True)]
        references = [weakref.ref(layer) for layer in new]
        block = _Block(rows, host, references, tuple(new.values()), parts, len(new) - 1)
        for index, layer in enumerate(new):
            self._index[layer] = block, index
        self._blocks = [*(block_ for block_ in self._blocks if block_.alive), block]

    def row(self, layer: Any) -> Totals:
        """Where ``layer`` adds its steps."""
        block, index = self._index[layer]
        return block.parts[index]

    def publish(self, layer: Any, continued: Tensor | None = None) -> None:
        """To be called when a layer has added its step.

        continued: the record of a further part of the step before, which is not counted again.
        """
        block, index = self._index[layer]
        if continued is None:
            block.runs(index)
        else:
            steps = block.parts[index].sums
            steps[TOTALS.index("steps")] -= 1
            steps[TOTALS.index("planned_steps")] -= (continued[Field.PLANNED] > 0).long()
        if index >= block.final:
            block.publish()

    def bypassed(self, layer: Any) -> None:
        """To be called when a layer gets a step too small to plan; a launch in the first and last layer."""
        block, index = self._index[layer]
        if block.runs(index):
            block.rows[:1] += 1
        if index >= block.final:
            block.publish()

    def layers(self) -> list[Any]:
        """The layers of a reading, in its order; none for a layer that is gone."""
        return [layer() for block in self._blocks if block.alive for layer in block.layers]

    def read(self) -> Reading:
        """All counters as they were when a forward pass last ended; does not wait.

        A reading while a GPU copies them may have some layers one pass ahead.
        """
        layers: list[LayerTotals] = []
        leading, blocks, bypassed = [], [], 0
        for block in [block for block in self._blocks if block.alive]:
            first, *rows = block.snapshot().split([1, *(len(part.sums) for part in block.parts)])
            totals = [LayerTotals(row, *shape) for row, shape in zip(rows, block.shapes, strict=True)]
            steps = [layer.total("steps") for layer in totals]
            # The last of those with the most: no other has ended more passes.
            leading.append(len(layers) + max(range(len(steps)), key=lambda index: (steps[index], index)))
            layers += totals
            bypassed += int(first)
            blocks.append(id(block))
        return Reading(tuple(layers), tuple(leading), bypassed, tuple(blocks))
