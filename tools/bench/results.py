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
    """What a policy did in the steps of a workload: of each its record, and the rows sent to others, both
    summed over all ranks."""

    topology: Topology
    top_k: int
    records: list[Tensor] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    def add(self, record: Tensor, sent: Tensor) -> None:
        """One more step."""
        self.records.append(record.cpu())
        self.sent.append(float(sent))

    @property
    def report(self) -> LayerReport:
        return LayerReport(torch.stack(self.records), self.topology, self.top_k)

    @property
    def busiest(self) -> float:
        """Rows of the largest rank, over all steps."""
        return float(self.report.rows_of_ranks("after").amax(1).sum())

    @property
    def busiest_expert(self) -> float:
        """Rows of the busiest expert over vanilla's mean expert's."""
        report = self.report
        mean = report.tokens.sum() * self.top_k / self.topology.num_experts
        return float(report.rows_of_experts("after").amax(1).sum() / mean)

    def figures(self) -> dict[str, float]:
        """What the table shows of it."""
        report = self.report
        return {
            **report.summary(),
            "load": float(report.load("after").mean()),
            "busiest_expert": self.busiest_expert,
            "sent": sum(self.sent) / float((report.kept + report.rerouted + report.dropped).sum()),
        }


def sent_by(plan: Plan, topology: Topology, rank: int) -> Tensor:
    """Rows that leave a source rank."""
    ranks = torch.tensor(topology.expert_rank, device=plan.experts.device)
    goes = plan.experts >= 0
    return (goes & (ranks[plan.experts.clamp(min=0)] != rank)).sum()


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
    return row | done.figures()


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
