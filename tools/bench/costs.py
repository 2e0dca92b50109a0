"""This machine's figures for the cost model, from calls that no workload makes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..common.cost_model import CostModel
from ..common.layers import Asked, device, layout_of, run_experts, together
from ..common.workloads import Batch, Shape, draw, features, stream, with_visual_share


@dataclass
class Costs:
    """This machine's figures, from calls that no workload makes: experts with as many rows each, exchanges
    between all, and two layers under even routing, of all tokens and of half. One ``sample`` between
    workloads, for the machine is not the same all the time; ``model`` takes medians."""

    shape: Shape
    ranks: int
    stock: Any
    asked: Asked
    seed: int
    samples: list[dict[str, list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.local, self.even = experts_of_rank(self.shape, self.ranks)
        self.counts = curve_rows(self.even)
        self.sample()
        self.samples.clear()  # the first one warmed up

    def sample(self) -> None:
        """Measure everything once, on all ranks at the same time."""
        hidden = self.shape.hidden
        even = run_experts(self.stock, [self.even] * self.local, hidden)
        first = not dist.is_initialized() or dist.get_rank() == 0
        self.samples.append(
            {
                "experts": [
                    together(run_experts(self.stock, [count] * self.local, hidden)) / self.local
                    for count in self.counts
                ],
                # While the others wait: processes of one CPU share its memory and its clock.
                "alone": [together(even if first else lambda: None), together(even)],
                "exchange": [together(work) for work in self._exchanges()],
                "layers": [together(work) for work in self._even_layers()],
            }
        )

    def _exchanges(self) -> list[Callable[[], Any]]:
        kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        works: list[Callable[[], Any]] = []
        for rows in self._exchanged():
            given = torch.zeros(rows * self.ranks, self.shape.hidden, dtype=kind, device=device())
            works.append(partial(dist.all_to_all_single, torch.empty_like(given), given))
        return works

    def _exchanged(self) -> list[int]:
        """Rows that go from one rank to another."""
        return [max(1, self.shape.tokens * self.shape.top_k // self.ranks // part) for part in (64, 8, 2, 1)]

    def _even_layers(self) -> list[Callable[[], Any]]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        works: list[Callable[[], Any]] = []
        for tokens in (self.shape.tokens // 2, self.shape.tokens):
            batch = draw("uniform", replace(self.shape, tokens=tokens), 0, rank, self.ranks, 1 + self.seed)
            hidden, _, logits = layout_of(batch, features(batch, self.shape.hidden, 0, rank))

            def work(hidden: Tensor = hidden, logits: Tensor = logits) -> Any:
                self.asked.logits = logits
                return self.stock(hidden)

            works.append(work)
        return works

    def model(self, planning: dict[str, float], origin: str) -> CostModel:
        """The figures, of all samples so far."""
        shape = self.shape
        found = {name: np.median([one[name] for one in self.samples], axis=0) for name in self.samples[0]}
        size = shape.hidden * next(self.stock.experts.parameters()).element_size()
        latency, rate = 0.0, float("nan")  # a single process exchanges nothing: not measured
        if self.ranks > 1:
            sent = [rows * (self.ranks - 1) * size for rows in self._exchanged()]
            slope, latency = np.polyfit(sent, found["exchange"], 1)
            rate = 1 / max(float(slope) * 1e6, 1e-9)
        alone, together_ms = found["alone"]
        model = CostModel(
            rows=self.counts,
            ms=np.maximum.accumulate(found["experts"]).tolist(),
            fixed_ms=0.0,
            row_ms=0.0,
            latency_ms=max(0.0, float(latency)),
            inside_gbs=rate,
            beyond_gbs=rate,
            node=self.ranks,
            row_bytes=size,
            alone=min(1.0, float(alone / together_ms)),
            hidden=shape.hidden,
            ffn=shape.ffn,
            tokens=shape.tokens,
            planner_ms=planning,
            origin=origin,
        )
        # What is left of a layer under even routing, at two sizes: a constant, and so much for every row.
        rows = np.array([shape.tokens // 2, shape.tokens]) * shape.top_k
        left = [
            spent - model.layer(np.full((self.ranks, shape.experts), count / shape.experts)).total
            for count, spent in zip(rows, found["layers"], strict=True)
        ]
        row_ms = max(0.0, float((left[1] - left[0]) / (rows[1] - rows[0])))
        return replace(model, row_ms=row_ms, fixed_ms=max(0.0, float(left[1] - row_ms * rows[1])))


def experts_of_rank(shape: Shape, ranks: int) -> tuple[int, int]:
    """Experts of a rank, and an expert's rows where all have as many."""
    return shape.experts // ranks, shape.tokens * shape.top_k * ranks // shape.experts


def curve_rows(even: int) -> list[float]:
    """Rows to time an expert with, from hardly any to four times an even share."""
    return [1.0, *sorted({max(2.0, even // part) for part in (16, 4, 2, 1)}), 2.0 * even + 2, 4.0 * even + 4]


def calibrating(shape: Shape, rank: int, seed: int) -> Batch:
    """A batch of no workload: half of it visual."""
    return with_visual_share(0.5)(shape, 0, rank, 1, stream("calibrating", seed, 0, rank))


def order_of(titles: Iterable[str], turn: int, step: int) -> list[str]:
    """In which order a step's policies run: another every time, the same on every rank."""
    found = list(titles)
    random.Random(f"{turn}|{step}").shuffle(found)
    return found
