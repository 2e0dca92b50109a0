"""What a policy did to the loads of a workload, and a line of the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from macs import LayerReport, Plan, Topology
from macs.adapters import loads_of

from ..common.workloads import Shape


@dataclass
class Done:
    """What a policy did in the steps of a workload: the record of each, summed over all ranks."""

    topology: Topology
    top_k: int
    records: list[Tensor] = field(default_factory=list)

    @property
    def report(self) -> LayerReport:
        return LayerReport(torch.stack(self.records), self.topology, self.top_k)

    @property
    def busiest(self) -> float:
        """Rows of the largest rank, over all steps."""
        return float(self.report.rows_of_ranks("after").amax(1).sum())


def row_of(
    workload: str, title: str, done: Done, vanilla: Done, turns: Sequence[float], base: Sequence[float]
) -> dict[str, Any]:
    """A line of the table: turns and base are milliseconds of every turn, of this policy and vanilla."""
    ratios = [mine / other for mine, other in zip(turns, base, strict=True)]
    ideal = done.busiest / vanilla.busiest
    steps = len(done.records)
    row = {
        "workload": workload,
        "policy": title,
        "turns": len(turns),
        "ms": statistics.median(turns) / steps,
        "spread": spread_of(turns) / steps,
        "ratio": statistics.median(ratios),
        "ratio_spread": spread_of(ratios),
        "ideal": ideal,
        "share": ideal / statistics.median(ratios),
    }
    return row | done.report.summary()


def spread_of(values: Sequence[float]) -> float:
    """Between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def sound(plan: Plan, shape: Shape) -> bool:
    """Whether a plan gives no token an expert twice, weighs nothing that is dropped, and counts its rows."""
    experts = plan.experts
    ordered = experts.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    weightless = bool((plan.weights[experts < 0] == 0).all())
    counted = torch.equal(plan.statistics.load_after, loads_of(experts, shape.experts))
    return weightless and counted and not bool(twice.any())
