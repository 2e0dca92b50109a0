"""Load and imbalance of a layer: recorded on the device, read on request.

*Load* is the largest rank's rows over the mean of the router's choice, T k / R: dropping does not flatter it.
*Imbalance* is the largest expert's rows over the mean expert's.

Shapes: N recorded steps, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..steps.combine import PlanStatistics, load_of, scalar_of
from ..steps.contracts import Field, record_size
from ..steps.record import Totals, append
from ..topology import Topology


def relative_load(busiest: Tensor, tokens: Tensor, top_k: int, ranks: int) -> Tensor:
    """Rows of the largest rank over the mean of the router's choice, tokens k / R; NaN without tokens.

    busiest and tokens of one shape, for one step or summed over steps.
    """
    return busiest.double() / (tokens.double() * top_k / ranks)


def relative_imbalance(busiest: Tensor, loads: Tensor) -> Tensor:
    """Rows of the busiest expert [...] over the mean of loads [..., E]; NaN without rows."""
    return busiest.double() / loads.double().mean(-1)


class LayerRecorder:
    """Keeps the records of a layer's latest steps in one ring of device memory.

    ``record`` copies into a fixed buffer: no host synchronisation, no new memory, safe inside a captured CUDA
    graph.
    """

    def __init__(self, topology: Topology, top_k: int, steps: int = 1024) -> None:
        self.topology = topology
        self.top_k = top_k
        self.steps = steps
        self._ring: Tensor | None = None
        self._count: Tensor | None = None

    @property
    def started(self) -> bool:
        """Whether a step was recorded."""
        return self._count is not None and int(self._count) > 0

    def prepare(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ring and the number of recorded steps; allocated on first use."""
        if self._ring is None or self._count is None:
            # Ordinary tensors even where an engine records in inference mode: they outlive it.
            with torch.inference_mode(False):
                width = record_size(self.topology.num_experts)
                self._ring = torch.zeros(self.steps, width, dtype=torch.int64, device=device)
                self._count = torch.zeros(1, dtype=torch.int64, device=device)
        return self._ring, self._count

    def record(self, statistics: PlanStatistics, totals: Totals | None = None) -> None:
        """Add one step, and add it to a layer's ``totals``, in the same launch."""
        append(statistics.record, *self.prepare(statistics.record.device), totals)

    def clear(self) -> None:
        """Forget every step."""
        if self._count is not None:
            self._count.zero_()

    def read(self, group: dist.ProcessGroup | None = None) -> LayerReport:
        """The recorded steps, oldest first, summed over the group's members if one is given.

        Synchronises. With a group, every member must call it after the same number of steps; different
        numbers are a ``ValueError`` on all of them.
        """
        count = 0 if self._count is None else int(self._count)
        if group is not None:
            count = _equal_count(count, group)
        if self._ring is None or (group is not None and count == 0):  # then on every member alike
            raise ValueError(
                "load: no step was recorded; was the model run, in eval() mode, on min_tokens or more?"
            )
        ring = self._ring.clone()
        if group is not None and count > 0:
            dist.all_reduce(ring, group=group)
        if count > self.steps:
            ring = ring.roll(-(count % self.steps), 0)
        return LayerReport(ring[: min(count, self.steps)].cpu(), self.topology, self.top_k)


def _equal_count(count: int, group: dist.ProcessGroup) -> int:
    """The number that every member of the group has; if they differ, a ``ValueError`` on each."""
    nccl = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    limits = torch.tensor([count, -count], device=device)
    dist.all_reduce(limits, op=dist.ReduceOp.MAX, group=group)
    most, least = int(limits[0]), -int(limits[1])
    if most != least:
        raise ValueError(
            f"load: the group's members recorded {least} to {most} steps, expected equally many; read every "
            "rank's own report, without a group"
        )
    return count


@dataclass(frozen=True)
class LayerReport:
    """Recorded steps of a layer, on the CPU: records int64 [N, 17 + 3 E]."""

    records: Tensor
    topology: Topology
    top_k: int

    def __getattr__(self, name: str) -> Tensor:
        """The scalar of ``PlanStatistics`` of that name for every step, float64 [N]."""
        if name.upper() not in Field.__members__:
            raise AttributeError(
                f"LayerReport has no {name!r}; scalars: {', '.join(Field.__members__).lower()}"
            )
        return scalar_of(self.records, name)

    @property
    def prefill(self) -> LayerReport:
        """The steps in which a source planned or, under vanilla, the largest ones."""
        largest = self.tokens == self.tokens.max()
        chosen = (self.planned > 0) if bool((self.planned > 0).any()) else largest
        return LayerReport(self.records[chosen], self.topology, self.top_k)

    def rows_of_experts(self, stage: str) -> Tensor:
        """Assignments of each expert "before" or "after" planning, or "visual" before, float64 [N, E]."""
        return load_of(self.records, f"load_{stage}").double()

    def rows_of_ranks(self, stage: str) -> Tensor:
        """Assignments of each rank, float64 [N, R]."""
        by_expert = self.rows_of_experts(stage)
        ranks = torch.tensor(self.topology.expert_rank)
        return by_expert.new_zeros(len(by_expert), self.topology.num_ranks).index_add(1, ranks, by_expert)

    def load(self, stage: str) -> Tensor:
        """``relative_load`` of every step, [N]."""
        busiest = self.rows_of_ranks(stage).amax(1)
        return relative_load(busiest, self.tokens, self.top_k, self.topology.num_ranks).nan_to_num(0.0)

    def imbalance(self, stage: str) -> Tensor:
        """``relative_imbalance`` of every step, [N]."""
        by_expert = self.rows_of_experts(stage)
        return relative_imbalance(by_expert.amax(1), by_expert).nan_to_num(0.0)

    def share(self, name: str) -> float:
        """Share over all steps: of all assignments, or of all combine weight (names that end in _mass)."""
        suffix = "_mass" if name.endswith("_mass") else ""
        total = sum(float(getattr(self, action + suffix).sum()) for action in ("kept", "rerouted", "dropped"))
        return float(getattr(self, name).sum()) / max(total, 1e-30)

    @property
    def visual_ratio(self) -> Tensor:
        """R_v of every step, [N]; 0.5 where there was no weight."""
        return torch.where(self.weight > 0, self.visual_weight / self.weight.clamp(min=1e-30), 0.5)

    def summary(self) -> dict[str, float]:
        """Every figure of ``METRICS`` by name: means over the steps."""
        return {name: metric.of(self) for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Metric:
    """A figure of a layer: its title in tables and plots, its function, its format."""

    title: str
    of: Callable[[LayerReport], float]
    form: str = ".3f"


def _mean(name: str, *arguments: Any) -> Callable[[LayerReport], float]:
    def of(report: LayerReport) -> float:
        value = getattr(report, name)
        return float((value(*arguments) if arguments else value).mean())

    return of


METRICS: dict[str, Metric] = {
    "load_before": Metric("load, before", _mean("load", "before")),
    "load_after": Metric("load, after", _mean("load", "after")),
    "imbalance_before": Metric("imbalance, before", _mean("imbalance", "before"), ".2f"),
    "imbalance_after": Metric("imbalance, after", _mean("imbalance", "after"), ".2f"),
    "rerouted": Metric("rerouted", lambda report: report.share("rerouted"), ".1%"),
    "dropped": Metric("dropped", lambda report: report.share("dropped"), ".1%"),
    "kept_mass": Metric("kept mass", lambda report: report.share("kept_mass")),
    "visual_ratio": Metric("R_v", _mean("visual_ratio")),
}
"""Figures of a layer in tables, plots and files, in this order. Rerouted and dropped are shares of the
assignments, kept mass of their combine weight; R_v is the visual share of the semantic weight."""


def summarized(reports: Sequence[LayerReport]) -> dict[str, float]:
    """``METRICS``, means over several layers."""
    each = [report.summary() for report in reports]
    return {name: sum(one[name] for one in each) / len(each) for name in METRICS}
