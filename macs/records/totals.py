"""Counters that last as long as the process: for whoever watches a model while it serves.

Every layer adds its steps to a row of its own on the device, in the launch that records the step. The last
layer then has all rows copied to the host, on the stream of the step and without waiting for it, so that
they can be read at any time, from any thread, without a call to the device; also where a CUDA graph replays
the step.

Shapes: L layers, E experts, R ranks.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..plan import scalar_of
from ..steps.contracts import LOADS, SCALARS
from ..topology import Topology

OWN: tuple[str, ...] = (
    "steps",
    "planned_steps",
    "rank_before",
    "rank_after",
    "expert_before",
    "expert_after",
)
"""Of a row, before the record's sums: steps that were recorded, and those in which a source planned; the rows
of each step's busiest rank and of its busiest expert, before and after planning."""

PAUSE = 1e-3
"""Seconds between two looks at what a GPU may be writing just now: a copy takes a hundredth of that."""


@dataclass(frozen=True)
class LayerTotals:
    """Sums over all steps of one layer since it was first counted: row int64 [22 + 3 E], on the host."""

    row: Tensor
    topology: Topology
    top_k: int

    def own(self, name: str) -> float:
        """One of ``OWN``."""
        return float(self.row[OWN.index(name)])

    def scalar(self, name: str) -> float:
        """The sum of one of ``SCALARS``."""
        return float(scalar_of(self.row[len(OWN) :], name))

    def loads(self, when: str) -> Tensor:
        """Assignments by expert "before" or "after" planning, or "visual", before: float64 [E]."""
        loads = self.row[len(OWN) + len(SCALARS) :].view(len(LOADS), -1)
        return loads[LOADS.index(f"load_{when}")].double()

    def since(self, before: LayerTotals) -> LayerTotals:
        """What was added since an earlier reading."""
        return LayerTotals(self.row - before.row, self.topology, self.top_k)

    def straggler(self, when: str) -> float:
        """As ``LayerReport.straggler``, over all steps: each weighs as many tokens as it has."""
        mean = self.scalar("tokens") * self.top_k / self.topology.num_ranks
        return self.own(f"rank_{when}") / mean if mean else float("nan")

    def imbalance(self, when: str) -> float:
        """As ``LayerReport.imbalance``, over all steps: each weighs as many assignments as it has."""
        mean = float(self.loads(when).mean())
        return self.own(f"expert_{when}") / mean if mean else float("nan")

    @property
    def balancedness(self) -> float:
        """The mean rank's rows over the busiest one's, after planning: 1 is even."""
        mean = float(self.loads("after").sum()) / self.topology.num_ranks
        busiest = self.own("rank_after")
        return mean / busiest if busiest else float("nan")


@dataclass(frozen=True)
class Totals:
    """One reading of all layers' counters. bypassed: steps that the last layer was given and that were left
    to the router because they were small, known without a look at them."""

    layers: tuple[LayerTotals, ...]
    bypassed: int

    @property
    def planned_steps(self) -> int:
        return int(self.layers[-1].own("planned_steps")) if self.layers else 0

    @property
    def bypassed_steps(self) -> int:
        """Steps in which nothing was planned: those of ``bypassed``, those that turned out, on the device, to
        have fewer valid tokens than ``min_tokens``, and those of a policy without plans (vanilla)."""
        if not self.layers:
            return self.bypassed
        last = self.layers[-1]
        return self.bypassed + int(last.own("steps") - last.own("planned_steps"))

    def since(self, before: Totals) -> Totals:
        """What was added since an earlier reading, of the same layers."""
        layers = tuple(now.since(then) for now, then in zip(self.layers, before.layers, strict=True))
        return Totals(layers, self.bypassed - before.bypassed)


@dataclass
class _Block:
    """Rows of the layers that were there when the first of them ran, behind one number, ``bypassed``."""

    rows: Tensor
    host: Tensor
    forms: Sequence[tuple[Topology, int]]
    parts: Sequence[Tensor]
    last: weakref.ref[Any]
    lock: Any = field(default_factory=threading.Lock)

    def publish(self) -> None:
        """Have the host's copy brought up to date, behind the work that the device was given."""
        if self.rows.device.type == "cpu":
            with self.lock:
                self.host.copy_(self.rows)
        else:
            self.host.copy_(self.rows, non_blocking=True)

    def read(self) -> Totals:
        with self.lock:
            found = self.host.clone()
            # A GPU writes without asking.
            while self.rows.device.type != "cpu":
                time.sleep(PAUSE)
                again = self.host.clone()
                if torch.equal(found, again):
                    break
                found = again
        sizes = [1, *(part.numel() for part in self.parts)]
        bypassed, *rows = found.split(sizes)
        layers = tuple(LayerTotals(row, *form) for row, form in zip(rows, self.forms, strict=True))
        return Totals(layers, int(bypassed))


class Counters:
    """The counters of a runtime's layers.

    ``prepare`` makes room for all layers there are, the first time one of them runs; ``row`` is what a layer
    adds its steps to; ``bypassed`` and ``publish`` are called by every layer, and heard from the last one.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        # A layer lives as long as the engine keeps it; what it counted stays.
        self._places: weakref.WeakKeyDictionary[Any, tuple[_Block, int]] = weakref.WeakKeyDictionary()

    def __contains__(self, layer: Any) -> bool:
        return layer in self._places

    def prepare(self, layers: Mapping[Any, tuple[Topology, int]], device: torch.device) -> None:
        """Make room for those of these layers, in their order, that have none: with topology and k each."""
        new = {layer: form for layer, form in layers.items() if layer not in self._places}
        if not new:
            return
        widths = [len(OWN) + len(SCALARS) + len(LOADS) * topology.num_experts for topology, _ in new.values()]
        with torch.inference_mode(False):  # as in ``LayerRecorder``
            rows = torch.zeros(1 + sum(widths), dtype=torch.int64, device=device)
            host = torch.zeros_like(rows, device="cpu", pin_memory=device.type == "cuda")
        block = _Block(rows, host, tuple(new.values()), rows[1:].split(widths), weakref.ref(list(new)[-1]))
        for place, layer in enumerate(new):
            self._places[layer] = block, place
        self._blocks.append(block)

    def row(self, layer: Any) -> Tensor:
        """What ``layer`` adds its steps to, on the device: see ``LayerTotals``."""
        block, place = self._places[layer]
        return block.parts[place]

    def publish(self, layer: Any) -> None:
        """A layer has added its step."""
        block, _ = self._places[layer]
        if layer is block.last():
            block.publish()

    def bypassed(self, layer: Any) -> None:
        """A layer was given a step that is too small to plan; two launches, of the last layer alone."""
        block, _ = self._places[layer]
        if layer is block.last():
            block.rows[:1] += 1
            block.publish()

    def read(self) -> Totals:
        """All counters as they were when the last layer had its latest step; waits for nobody."""
        found = [block.read() for block in self._blocks]
        return Totals(
            tuple(layer for one in found for layer in one.layers), sum(one.bypassed for one in found[-1:])
        )
