"""Counters that last as long as the process: for whoever watches a model while it serves.

Every layer adds its steps to a row of its own on the device, in the launch that records the step. Where a
forward pass ends, all rows are copied to the host, on the stream of the step and without waiting for it. So
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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import load_of, scalar_of
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


class Row(NamedTuple):
    """Where a layer's steps are added up, on the device: sums int64 [22 + 3 E], see ``LayerTotals``; the
    experts of every rank int64 [R, G]."""

    sums: Tensor
    experts_of_rank: Tensor


TRIES, PAUSE = 20, 1e-3
"""How often to look at what a GPU may be writing just now, and seconds between: a copy takes a hundredth of
that."""


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
        return load_of(self.row[len(OWN) :], f"load_{when}").double()

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
    """One reading of all layers' counters.

    leading: of each block of layers that began to run together, the one with the most steps, which speaks
    for the block where forward passes and tokens are counted. bypassed: steps that were left to the router
    because they were small, known without a look at them. blocks: which blocks these are.
    """

    layers: tuple[LayerTotals, ...] = ()
    leading: tuple[int, ...] = ()
    bypassed: int = 0
    blocks: tuple[int, ...] = ()

    @property
    def leaders(self) -> list[LayerTotals]:
        return [self.layers[place] for place in self.leading]

    @property
    def planned_steps(self) -> int:
        return sum(int(one.own("planned_steps")) for one in self.leaders)

    @property
    def bypassed_steps(self) -> int:
        """Steps in which nothing was planned: those of ``bypassed``, those that turned out, on the device, to
        have fewer valid tokens than ``min_tokens``, and those of a policy without plans (vanilla)."""
        return self.bypassed + sum(int(one.own("steps") - one.own("planned_steps")) for one in self.leaders)

    def since(self, before: Totals) -> Totals:
        """What was added since an earlier reading of the same blocks."""
        layers = tuple(now.since(then) for now, then in zip(self.layers, before.layers, strict=True))
        return Totals(layers, self.leading, self.bypassed - before.bypassed, self.blocks)


@dataclass
class _Block:
    """Rows of the layers that were there when the first of them ran, behind one number, ``bypassed``.

    final: the place of the layer that ends a forward pass, the last one until passes turn out to end before;
    ran: of the layer that ran last.
    """

    rows: Tensor
    host: Tensor
    layers: Sequence[weakref.ref[Any]]
    forms: Sequence[tuple[Topology, int]]
    parts: Sequence[Row]
    final: int
    ran: int = -1
    lock: Any = field(default_factory=threading.Lock)
    seen: Tensor | None = None

    @property
    def alive(self) -> bool:
        return any(layer() is not None for layer in self.layers)

    def ends(self, place: int) -> bool:
        """Whether the layer that ran now ends the forward pass, as far as one knows."""
        if place <= self.ran:  # another pass has begun: the one before ended there
            if self.ran < self.final:
                self.publish()
            self.final = self.ran
        self.ran = place
        return place >= self.final

    def publish(self) -> None:
        """Have the host's copy brought up to date, behind the work that the device was given."""
        if self.rows.device.type == "cpu":
            with self.lock:
                self.host.copy_(self.rows)
        else:
            self.host.copy_(self.rows, non_blocking=True)

    def read(self) -> Tensor:
        """The host's copy, [numbers]; where a GPU does not stop writing, the one that was read before."""
        with self.lock:
            for _ in range(1 if self.rows.device.type == "cpu" else TRIES):
                found = self.host.clone()
                if self.rows.device.type == "cpu" or torch.equal(found, self.host):
                    self.seen = found
                    break
                time.sleep(PAUSE)
            return torch.zeros_like(self.host) if self.seen is None else self.seen


class Counters:
    """The counters of a runtime's layers.

    ``prepare`` makes room for layers, the first time one of them runs; ``row`` is what a layer adds its steps
    to; ``publish`` and ``bypassed`` are called by every layer, and do something where a forward pass ends.
    What layers counted goes when none of those that began with them is left, as a process's counters do.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
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
            maps = [torch.tensor(topology.experts_of_rank(), device=device) for topology, _ in new.values()]
        references = [weakref.ref(layer) for layer in new]
        parts = [Row(*one) for one in zip(rows[1:].split(widths), maps, strict=True)]
        block = _Block(rows, host, references, tuple(new.values()), parts, len(new) - 1)
        for place, layer in enumerate(new):
            self._places[layer] = block, place
        self._blocks = [*(one for one in self._blocks if one.alive), block]

    def row(self, layer: Any) -> Row:
        """What ``layer`` adds its steps to."""
        block, place = self._places[layer]
        return block.parts[place]

    def publish(self, layer: Any) -> None:
        """A layer has added its step."""
        block, place = self._places[layer]
        if block.ends(place):
            block.publish()

    def bypassed(self, layer: Any) -> None:
        """A layer was given a step that is too small to plan; two launches, of the last layer alone."""
        block, place = self._places[layer]
        if block.ends(place):
            block.rows[:1] += 1
            block.publish()

    def layers(self) -> list[Any]:
        """The layers of a reading, in its order; none where one is gone."""
        return [layer() for block in self._blocks if block.alive for layer in block.layers]

    def read(self) -> Totals:
        """All counters as they were when a forward pass last ended; waits for nobody."""
        layers: list[LayerTotals] = []
        leading, blocks, bypassed = [], [], 0
        for block in [one for one in self._blocks if one.alive]:
            own, *rows = block.read().split([1, *(len(part.sums) for part in block.parts)])
            found = [LayerTotals(row, *form) for row, form in zip(rows, block.forms, strict=True)]
            steps = [one.own("steps") for one in found]
            # The last of those with the most: no other has ended more passes.
            leading.append(len(layers) + max(range(len(found)), key=lambda place: (steps[place], place)))
            layers += found
            bypassed += int(own)
            blocks.append(id(block))
        return Totals(tuple(layers), tuple(leading), bypassed, tuple(blocks))
