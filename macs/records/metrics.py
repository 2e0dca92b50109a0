"""Per-layer load statistics: gathered on the device, read out when someone asks.

Shapes: N recorded steps, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..plan import PlanStatistics, load_of, scalar_of
from ..steps.contracts import LOADS, SCALARS
from ..steps.kernels.dispatch import fused
from ..topology import Topology
from .totals import OWN, Row


class LayerRecorder:
    """Keeps the statistics of a layer's latest steps in one ring of device memory.

    ``record`` is a copy into a fixed buffer: no host synchronisation, no new memory, safe inside a
    captured CUDA graph.
    """

    def __init__(self, topology: Topology, top_k: int, steps: int = 1024) -> None:
        self.topology = topology
        self.top_k = top_k
        self.steps = steps
        self._width = len(SCALARS) + len(LOADS) * topology.num_experts
        self._ring: Tensor | None = None
        self._next: Tensor | None = None

    @property
    def started(self) -> bool:
        """Whether there is anything to read."""
        return self._next is not None and int(self._next) > 0

    def prepare(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ring, and the number of the next step in it; made here the first time."""
        if self._ring is None or self._next is None:
            # Ordinary tensors even where an engine records in inference mode: they outlive it.
            with torch.inference_mode(False):
                self._ring = torch.zeros(self.steps, self._width, dtype=torch.int64, device=device)
                self._next = torch.zeros(1, dtype=torch.int64, device=device)
        return self._ring, self._next

    def record(self, statistics: PlanStatistics, totals: Row | None = None) -> None:
        """Add one step; also to a layer's ``totals``, in the same launch."""
        append(statistics.record, *self.prepare(statistics.record.device), totals)

    def clear(self) -> None:
        """Forget every step."""
        if self._next is not None:
            self._next.zero_()

    def read(self, group: dist.ProcessGroup | None = None) -> LayerReport:
        """The recorded steps, oldest first, summed over the group's members if one is given.

        Synchronises. With a group, every member must call it, after the same number of steps: what ranks
        that recorded different steps have is not to be added, and is a ``ValueError`` on all of them.
        """
        count = 0 if self._next is None else int(self._next)
        if group is not None:
            count = _agreed(count, group)
        if self._ring is None:
            raise ValueError(NOTHING_RECORDED)
        ring = self._ring.clone()
        if group is not None and count > 0:
            dist.all_reduce(ring, group=group)
        if count > self.steps:
            ring = ring.roll(-(count % self.steps), 0)
        return LayerReport(ring[: min(count, self.steps)].cpu(), self.topology, self.top_k)


@fused
def append(record: Tensor, ring: Tensor, following: Tensor, totals: Row | None = None) -> None:
    """Put a record int64 [N] into the row of ring [steps, N] that follows, and count it: int64 [1].

    Adds it to the layer's totals, too, if they are given.
    """
    ring.index_copy_(0, following % len(ring), record[None])
    following += 1
    if totals is not None:
        loads = torch.stack([load_of(record, "load_before"), load_of(record, "load_after")])
        by_rank = loads[:, totals.experts_of_rank].sum(2).amax(1)
        planned = (record[list(SCALARS).index("planned")] > 0).long()
        own = torch.stack([torch.ones_like(planned), planned, *by_rank, *loads.amax(1)])
        totals.sums[: len(OWN)] += own
        totals.sums[len(OWN) :] += record


NOTHING_RECORDED = "metrics: no step was recorded; was the model run, in eval() mode, on min_tokens or more?"


def _agreed(count: int, group: dist.ProcessGroup) -> int:
    """The number that every member of the group has; if they differ, a ``ValueError`` on each."""
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu(group) else torch.device("cpu")
    bounds = torch.tensor([count, -count], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    most, least = int(bounds[0]), -int(bounds[1])
    if most != least:
        raise ValueError(
            f"metrics: the group's members recorded from {least} to {most} steps, expected as many each; "
            "read every rank's own report, without a group"
        )
    return count


def on_gpu(group: dist.ProcessGroup) -> bool:
    """Whether the group's collectives want tensors on a GPU."""
    return dist.get_backend(group) == "nccl"


@dataclass(frozen=True)
class LayerReport:
    """Recorded steps of a layer, on the CPU: rows int64 [N, scalars + 3 E]."""

    rows: Tensor
    topology: Topology
    top_k: int

    def __getattr__(self, name: str) -> Tensor:
        """Scalar ``name`` of ``PlanStatistics`` for every step, float64 [N]."""
        if name not in SCALARS:
            raise AttributeError(f"LayerReport has no {name!r}; scalars: {', '.join(SCALARS)}")
        return scalar_of(self.rows, name)

    @property
    def prefill(self) -> LayerReport:
        """The steps in which some source planned, or, under vanilla, the largest ones."""
        largest = self.tokens == self.tokens.max()
        chosen = (self.planned > 0) if bool((self.planned > 0).any()) else largest
        return LayerReport(self.rows[chosen], self.topology, self.top_k)

    def loads(self, when: str) -> Tensor:
        """Assignments by expert "before" or "after" planning, [N, E]; "visual": of visual tokens, before."""
        return load_of(self.rows, f"load_{when}").double()

    def rank_loads(self, when: str) -> Tensor:
        """Assignments by rank, [N, R]."""
        loads = self.loads(when)
        ranks = torch.tensor(self.topology.expert_rank)
        return loads.new_zeros(len(loads), self.topology.num_ranks).index_add(1, ranks, loads)

    def straggler(self, when: str) -> Tensor:
        """Largest rank's rows over the vanilla mean T k / R, [N]; dropping does not flatter it."""
        mean = self.tokens * self.top_k / self.topology.num_ranks
        return self.rank_loads(when).amax(1) / mean.clamp(min=1)

    def imbalance(self, when: str) -> Tensor:
        """Largest expert's load over the mean load of the experts, [N]."""
        loads = self.loads(when)
        return loads.amax(1) / loads.mean(1).clamp(min=1e-9)

    def summary(self) -> dict[str, float]:
        """Every figure of ``METRICS``, by its name: means over the steps."""
        return {name: metric.of(self) for name, metric in METRICS.items()}

    def shares(self) -> dict[str, float]:
        """Shares of all assignments and of all combine weight, over all steps."""
        count = (self.kept + self.rerouted + self.dropped).sum().clamp(min=1)
        mass = (self.kept_mass + self.rerouted_mass + self.dropped_mass).sum().clamp(min=1e-30)
        return {
            "kept": float(self.kept.sum() / count),
            "rerouted": float(self.rerouted.sum() / count),
            "dropped": float(self.dropped.sum() / count),
            "kept_mass": float(self.kept_mass.sum() / mass),
            "rerouted_mass": float(self.rerouted_mass.sum() / mass),
            "dropped_mass": float(self.dropped_mass.sum() / mass),
        }

    @property
    def visual_ratio(self) -> Tensor:
        """R_v of every step, [N]; 0.5 where there was no weight."""
        return torch.where(self.weight > 0, self.visual_weight / self.weight.clamp(min=1e-30), 0.5)


@dataclass(frozen=True)
class Metric:
    """A figure of a layer: its title in tables and plots, where it comes from, and how it is written."""

    title: str
    of: Callable[[LayerReport], float]
    form: str = ".3f"


def _mean(name: str, *given: Any) -> Callable[[LayerReport], float]:
    """Of a figure that a report has for every step, over the steps."""

    def of(report: LayerReport) -> float:
        value = getattr(report, name)
        return float((value(*given) if given else value).mean())

    return of


def _share(name: str) -> Callable[[LayerReport], float]:
    return lambda report: report.shares()[name]


METRICS: dict[str, Metric] = {
    "imbalance_before": Metric("busiest expert, before", _mean("imbalance", "before"), ".2f"),
    "imbalance_after": Metric("busiest expert, after", _mean("imbalance", "after"), ".2f"),
    "straggler_before": Metric("busiest rank, before", _mean("straggler", "before")),
    "straggler_after": Metric("busiest rank, after", _mean("straggler", "after")),
    "rerouted": Metric("rerouted", _share("rerouted"), ".1%"),
    "dropped": Metric("dropped", _share("dropped"), ".1%"),
    "kept_mass": Metric("kept mass", _share("kept_mass")),
    "visual_ratio": Metric("R_v", _mean("visual_ratio")),
}
"""What tables, plots and exporters show of a layer, in this order. A busiest rank is measured in vanilla's
mean rank, a busiest expert in the mean expert; rerouted and dropped are shares of the assignments, kept mass
is the share of their combine weight; R_v is the visual share of the semantic weight."""


def summarized(reports: Sequence[LayerReport]) -> dict[str, float]:
    """``METRICS`` of several layers: the means of theirs."""
    each = [report.summary() for report in reports]
    return {name: sum(one[name] for one in each) / len(each) for name in METRICS}
