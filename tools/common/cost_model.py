"""What an expert-parallel MoE layer takes, from the rows that every source sends to every expert.

A layer has four parts, each as slow as its slowest rank: what a source does with its own tokens (router,
planner, permutation), the exchange there, the experts, the exchange back. The figures of a machine are
measured here (``macs bench layer``), or fitted to published measurements (``macs_tools.hardware``).

Shapes: R ranks, as sources and as destinations; E experts, G = E / R a rank, neighbours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from .workloads import VANILLA, Shape


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
    seen_ms          of an assignment of a token that a rank received, whether its expert is there or not
    once             whether a token is sent once to every rank that has experts of it, and between nodes once
                     to every node (DeepEP), or once for each of its assignments
    top_k            experts of a token, needed if so
    latency_ms       of an exchange
    inside_gbs       10^9 bytes a second that a rank sends, or receives, within its node; beyond it
    beyond_gbs
    node             ranks of a node
    row_bytes        of one token's features as they are sent
    weight_bytes     of an element of the experts' weights (default: as the features)
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
    weight_bytes: float | None = None
    alone: float = 1.0
    seen_ms: float = 0.0
    once: bool = False
    top_k: int = 1
    planner_ms: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    launch_ms: float = 0.0
    origin: str = "measured"

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights."""
        element = self.row_bytes / self.hidden if self.weight_bytes is None else self.weight_bytes
        return round(3 * self.hidden * self.ffn * element)

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

    def experts_ms(self, rows: np.ndarray, received: np.ndarray | float = 0.0) -> float:
        """Of the slowest rank, all having begun together: rows [R, experts], received [R] token copies."""
        each = self.expert_ms(rows).sum(1) + self.seen_ms * self.top_k * received
        slowest = each.max()
        others = (each.sum() - slowest) / (len(each) - 1) if len(each) > 1 else slowest
        return float(self.alone * slowest + (1 - self.alone) * others)

    def copies(self, assigned: np.ndarray, tokens: int) -> np.ndarray:
        """Of each source's tokens those that a place gets, for so many assignments there, any shape: all of
        them, or, sent ``once``, as many as have one if each of a token's k is there by the same chance."""
        if not self.once:
            return assigned
        chance = np.clip(assigned / (tokens * self.top_k), 0, 1)
        return np.asarray(tokens * (1 - (1 - chance) ** self.top_k))

    def exchange_ms(self, assigned: np.ndarray, tokens: int | None = None) -> float:
        """One exchange: assigned [R, R] from source to destination, of so many tokens a source."""
        ranks = len(assigned)
        if ranks == 1:
            return 0.0
        tokens = self.tokens if tokens is None else tokens
        place, own = np.arange(ranks) // self.node, np.eye(ranks, dtype=bool)
        far, sent = place[:, None] != place, self.copies(assigned, tokens)
        if self.once:
            # A node's copy comes to one of its ranks, all alike, which hands it to the others.
            nodes = place[:: self.node]
            by_node = np.stack([assigned[:, place == node].sum(1) for node in nodes], 1)
            between = np.where(place[:, None] == nodes, 0, self.copies(by_node, tokens))
            within, arriving = np.where(own, 0, sent), between.sum(0).max() / min(self.node, ranks)
        else:
            within, between = np.where(far | own, 0, sent), np.where(far, sent, 0)
            arriving = between.sum(0).max()
        inside = max(within.sum(0).max(), within.sum(1).max()) / self.inside_gbs
        beyond = max(arriving, between.sum(1).max()) / self.beyond_gbs
        # Both networks work at once.
        return self.latency_ms + max(inside, beyond) * self.row_bytes / 1e6

    def layer(
        self,
        requested: np.ndarray,
        planning: float = 0.0,
        share: np.ndarray | None = None,
        moving: float = 0.0,
        tokens: int | None = None,
    ) -> Breakdown:
        """Of a layer whose sources send so many rows: requested [R, E].

        planning, moving: ms for the plan, and for weights that are sent. share [E, R]: what part of an
        expert's rows every rank computes, if not all at home. tokens: of a source, if not ``self.tokens``.
        """
        ranks, experts = requested.shape
        tokens = self.tokens if tokens is None else tokens
        share = at_home(experts, ranks) if share is None else share
        assigned = requested @ share
        # Of every rank the experts it has a part of.
        rows = (requested.sum(0)[:, None] * share).T
        handled = (assigned.sum(1).max() + assigned.sum(0).max()) / 2
        return Breakdown(
            source=self.fixed_ms + self.row_ms * handled,
            planner=planning,
            exchange=2 * self.exchange_ms(assigned, tokens) + moving,
            experts=self.experts_ms(rows, self.copies(assigned, tokens).sum(0)),
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


CAPTURED_MS = 1.5e-3
"""Guessed of a launch that a CUDA graph replays."""


def captured(model: CostModel) -> CostModel:
    """The same machine where a CUDA graph replays a plan; where launches have no figure of their own, as on
    a CPU, the machine itself."""
    return replace(model, launch_ms=min(model.launch_ms, CAPTURED_MS))


def at_load(shape: Shape, ranks: int, load: float, tokens: int) -> np.ndarray:
    """Rows [R, E] of sources with so many tokens, of which the first rank gets ``load`` times the mean and
    the others the rest; even within a rank."""
    others = (ranks - load) / (ranks - 1) if ranks > 1 else 1.0
    of_rank = np.array([load] + [others] * (ranks - 1)) * tokens * shape.top_k
    requested = np.repeat(of_rank / ranks / (shape.experts // ranks), shape.experts // ranks)
    return np.tile(requested, (ranks, 1))


def break_even(model: CostModel, shape: Shape, ranks: int, load: float, balanced: float = 1.05) -> int | None:
    """From how many tokens a rank on, in steps of 32, a plan that holds the load to ``balanced`` takes less
    time than it saves, where a rank would have ``load`` times the mean; none if not up to 16384."""
    for tokens in range(32, 16384 + 1, 32):
        before, after = (
            model.layer(at_load(shape, ranks, one, tokens), tokens=tokens).total for one in (load, balanced)
        )
        if before - after > model.planning_ms("macs", tokens) + model.sharing_ms:
            return tokens
    return None
