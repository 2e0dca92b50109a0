"""What an expert-parallel MoE layer takes, from the rows that every source sends to every expert.

A layer has four parts, each as slow as its slowest rank: what a source does with its own tokens (router,
planner, permutation), the exchange there, the experts, the exchange back. The figures of a machine come
from measurement (``macs bench layer``), or are stated, and said to be.

Shapes: R ranks, as sources and as destinations; E experts, G = E / R a rank, neighbours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from .launches import AROUND, PLANS
from .workloads import VANILLA, Shape

CASE_OF = {
    "token drop": "token-drop",
    "expanded drop": "expanded-drop",
    "rank-balanced": "rank-balanced",
    "paper": "paper at 1.05",
    "macs safe": "safe",
    "*": "defaults",
}
"""The counted plan of every contender."""


def at_home(experts: int, ranks: int) -> np.ndarray:
    """Every expert on its own rank: neighbours together. [E, R]"""
    return np.repeat(np.eye(ranks), experts // ranks, 0)


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one layer."""

    source: float
    planner: float
    exchange: float
    experts: float

    @property
    def total(self) -> float:
        return self.source + self.planner + self.exchange + self.experts


@dataclass(frozen=True)
class CostModel:
    """A machine running a layer of one shape.

    rows, ms         an expert's time for so many rows, rising; straight lines between
    alone            what part of that it takes while the other ranks are idle: less than 1 where they share
                     a memory or a clock, as processes on one CPU do
    fixed_ms         what a layer takes however few its tokens
    row_ms           handling of a row, on its source and on its destination together
    latency_ms       of an exchange
    inside_gbs       10^9 bytes a second that a rank sends, or receives, within its node; beyond it
    beyond_gbs
    node             ranks of a node
    row_bytes        of one token's features as they are sent
    hidden, ffn      the layer's
    tokens           of a source, for which planner_ms is
    planner_ms       by policy ("*": any other), with what surrounds the plan in the engine; as many times as
                     much for as many times the tokens
    launches         kernels of the same, by policy, however many the tokens; launch_ms of one
    origin           where the figures come from
    """

    rows: list[float]
    ms: list[float]
    fixed_ms: float
    row_ms: float
    latency_ms: float
    inside_gbs: float
    beyond_gbs: float
    node: int
    row_bytes: int
    hidden: int
    ffn: int
    tokens: int
    alone: float = 1.0
    planner_ms: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    launch_ms: float = 0.0
    origin: str = "measured"

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights, which are as precise as the features."""
        return 3 * self.ffn * self.row_bytes

    def planning_ms(self, title: str, tokens: int) -> float:
        """Of a policy: what grows with the tokens of a source, and its launches; nothing for vanilla."""
        if title == VANILLA:
            return 0.0
        if title not in self.planner_ms and "*" not in self.planner_ms:
            raise ValueError(f"cost model: found no planner_ms of {title!r} among {sorted(self.planner_ms)}")
        growing = self.planner_ms.get(title, self.planner_ms.get("*", 0.0)) * tokens / self.tokens
        launches = self.launches.get(title, self.launches.get("*", 0))
        return growing + launches * self.launch_ms

    @property
    def sharing_ms(self) -> float:
        """Of the all-reduce by which the ranks share a bound (``Planner.shares_bound``), and its kernel: the
        latency of an exchange."""
        return self.latency_ms + 2 * self.launch_ms

    def expert_ms(self, rows: np.ndarray) -> np.ndarray:
        """Of experts that compute so many rows each, any shape."""
        slope = (self.ms[-1] - self.ms[-2]) / (self.rows[-1] - self.rows[-2])
        beyond = np.maximum(rows - self.rows[-1], 0) * slope
        return np.where(rows > 0, np.interp(rows, self.rows, self.ms) + beyond, 0.0)

    def experts_ms(self, rows: np.ndarray) -> float:
        """Of the slowest rank, all having begun together: rows [R, experts]."""
        each = self.expert_ms(rows).sum(1)
        slowest = each.max()
        others = (each.sum() - slowest) / (len(each) - 1) if len(each) > 1 else slowest
        return float(self.alone * slowest + (1 - self.alone) * others)

    def exchange_ms(self, sent: np.ndarray) -> float:
        """One exchange: sent [R, R] rows from source to destination."""
        ranks = len(sent)
        if ranks == 1:
            return 0.0
        place = np.arange(ranks) // self.node
        near = (place[:, None] == place) & ~np.eye(ranks, dtype=bool)
        far = place[:, None] != place

        def busiest(who: np.ndarray) -> float:
            there = np.where(who, sent, 0)
            return max(there.sum(0).max(), there.sum(1).max()) * self.row_bytes

        # Both networks work at once.
        slowest = max(busiest(near) / self.inside_gbs, busiest(far) / self.beyond_gbs)
        return self.latency_ms + slowest / 1e6

    def layer(
        self,
        requested: np.ndarray,
        planning: float = 0.0,
        share: np.ndarray | None = None,
        moving: float = 0.0,
    ) -> Breakdown:
        """Of a layer whose sources send so many rows: requested [R, E].

        planning, moving: ms for the plan, and for weights that are sent. share [E, R]: what part of an
        expert's rows every rank computes, if not all at home.
        """
        ranks, experts = requested.shape
        share = at_home(experts, ranks) if share is None else share
        sent = requested @ share
        # Of every rank the experts it has a part of.
        rows = (requested.sum(0)[:, None] * share).T
        handled = (sent.sum(1).max() + sent.sum(0).max()) / 2
        return Breakdown(
            source=self.fixed_ms + self.row_ms * handled,
            planner=planning,
            exchange=self.exchange_ms(sent) + self.exchange_ms(sent.T) + moving,
            experts=self.experts_ms(rows),
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostModel:
        values = json.loads(path.read_text())
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"cost model {path}: {error}") from error

    def check(self, shape: Shape) -> None:
        """Raise a ``ValueError`` if it is of another layer."""
        if (self.hidden, self.ffn) != (shape.hidden, shape.ffn):
            raise ValueError(
                f"cost model: found one of D {self.hidden}, FFN {self.ffn}, expected D {shape.hidden}, FFN "
                f"{shape.ffn}; measure that shape, or name the shape it is of"
            )


EAGER_MS, CAPTURED_MS = 4e-3, 1.5e-3
"""Stated of a launch that PyTorch and Triton make, and of one that a CUDA graph replays."""


def stated_h100(shape: Shape) -> CostModel:
    """An H100 as its makers and DeepEP's authors describe it, not measured here: bfloat16 grouped GEMM at
    half of 990 TFLOP/s, or at the 3.35 TB/s at which an expert's weights come from memory; exchanges at
    the 153 GB/s within a node and the 43 GB/s beyond that DeepEP reports of its first version on an H800;
    permutation at memory speed; a plan by its launches, as ``macs bench launches`` counts them, of 4 us each
    (captured 1.5 us, ``captured``), and by its bytes at memory speed: features read three times, and 400
    more a token."""
    memory, flops = 3.35e12, 0.5 * 990e12
    expert_bytes = 3 * shape.hidden * shape.ffn * 2
    least, a_row = expert_bytes / memory * 1e3, 6 * shape.hidden * shape.ffn / flops * 1e3
    turn = least / a_row
    return CostModel(
        rows=[0.0, turn, 100 * turn],
        ms=[least, least, 100 * least],
        fixed_ms=0.1,
        row_ms=8 * shape.hidden * 2 / memory * 1e3,
        latency_ms=0.03,
        inside_gbs=153.0,
        beyond_gbs=43.0,
        node=8,
        row_bytes=2 * shape.hidden,
        hidden=shape.hidden,
        ffn=shape.ffn,
        tokens=shape.tokens,
        planner_ms={"*": shape.tokens * (6 * shape.hidden + 400) / memory * 1e3},
        launches={title: PLANS[case] + AROUND for title, case in CASE_OF.items()},
        launch_ms=EAGER_MS,
        origin="stated, not measured: H100 data sheet, DeepEP's published bandwidths",
    )


def captured(model: CostModel) -> CostModel:
    """The same machine where a CUDA graph replays a plan; where launches have no figure of their own, as on
    a CPU, the machine itself."""
    return replace(model, launch_ms=min(model.launch_ms, CAPTURED_MS))


def on_network(model: CostModel, inside: float | None, beyond: float | None, node: int | None) -> CostModel:
    """The same machine in another cluster; none leaves a figure as it is."""
    given = {"inside_gbs": inside, "beyond_gbs": beyond, "node": node}
    return replace(model, **{name: value for name, value in given.items() if value is not None})


def break_even(shape: Shape, ranks: int, load: float, replayed: bool = False) -> int | None:
    """From how many tokens a rank on, in steps of 32, a plan that holds the load to 1.05 takes less
    time than it saves on ``stated_h100``, where that rank would have ``load`` times the mean; none if
    not up to 16384."""
    for tokens in range(32, 16384 + 1, 32):
        model = stated_h100(replace(shape, tokens=tokens))
        model = captured(model) if replayed else model

        def layer_ms(busiest: float, tokens: int = tokens, model: CostModel = model) -> float:
            others = (ranks - busiest) / (ranks - 1)
            of_rank = np.array([busiest] + [others] * (ranks - 1)) * tokens * shape.top_k
            requested = np.repeat(of_rank / ranks / (shape.experts // ranks), shape.experts // ranks)
            return model.layer(np.tile(requested, (ranks, 1))).total

        if layer_ms(load) - layer_ms(1.05) > model.planning_ms("macs", tokens) + model.sharing_ms:
            return tokens
    return None
