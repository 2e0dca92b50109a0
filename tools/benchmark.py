"""What MACS costs and what it gains, beside the baselines and beside what is possible.

    python tools/benchmark.py planner        # the planner alone: its parts, its share of a layer, its memory
    python tools/benchmark.py layer          # Megatron's real MoE layer on two expert-parallel processes
    python tools/benchmark.py virtual-ep     # one process computes every rank's real rows in turn
    python tools/benchmark.py generate       # prompts through Megatron's static engine

Every policy runs on the same inputs in the same turns, one after the other, first come first in turn; the
time of a step is its slowest rank's. A policy is timed only after its output has been checked against
the same plan computed by another dispatcher (in virtual-ep, where no layer runs whole, its plan against
its bounds). Ratios are to vanilla, stock Megatron, in the same turn. The ideal ratio is that of the busiest
ranks' rows; its share is the ideal ratio over the measured one.

Shapes: T tokens of a source rank, D features, E experts, k experts a token, R ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from clock import clocked, milliseconds
from cost_model import CostModel
from moe_layers import (
    Asked,
    Oracle,
    Side,
    around_plan,
    build_layer,
    device,
    engine,
    force,
    join,
    layout_of,
    median_of,
    over_ranks,
    run_experts,
    same_output,
    together,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import (
    NOTHING_OVER,
    SHAPES,
    VANILLA,
    WORKLOADS,
    Batch,
    Contender,
    Shape,
    contenders,
    draw,
    features,
    load_recordings,
    loosened,
    replay,
    stream,
    with_visual_share,
)

from macs import (
    IMAGE,
    STEPS,
    Modality,
    Plan,
    PlanStatistics,
    Tokens,
    Topology,
    build_policy,
    has_triton,
    kernels,
    loads_of,
    watching_steps,
)
from macs.files import output_file, output_folder
from macs.steps.contracts import Sums
from macs.steps.weighting import Weighting, semantic_weights


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("planner", "layer", "virtual-ep", "generate"))
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--tokens", type=int, help="of a source rank, instead of the shape's")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--policies", nargs="+", help="titles to run beside vanilla (default: all)")
    parser.add_argument("--straggler", type=float, default=1.05, help="bound on the busiest rank")
    parser.add_argument(
        "--ladder", nargs="*", type=float, default=[], help="further bounds for token drop and expanded drop"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes, or ranks played in turn")
    parser.add_argument("--threads", type=int, help="of each process (default: all cores, divided)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a workload")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recordings", nargs="+", type=Path, help="one file for each source rank, instead")
    parser.add_argument("--layer", type=int, default=0, help="layer of the recordings")
    parser.add_argument("--json", type=output_file, help="append the result, one line")
    parser.add_argument("--cost-model", type=Path, help="figures for what virtual-ep cannot measure")
    parser.add_argument("--save-cost-model", type=Path, help="write this machine's, for simulate.py")
    parser.add_argument("--plots", type=output_folder, help="folder for plots")
    arguments = parser.parse_args(given)
    arguments.shape_name, arguments.shape = arguments.shape, SHAPES[arguments.shape]
    if arguments.mode == "planner" and arguments.shape_name == "cpu":
        arguments.shape = replace(arguments.shape, tokens=4096)
    if arguments.tokens:
        arguments.shape = replace(arguments.shape, tokens=arguments.tokens)
    if arguments.recordings:
        if arguments.mode not in ("layer", "virtual-ep"):
            parser.error(f"--recordings: found mode {arguments.mode}, expected layer or virtual-ep")
        recordings = load_recordings(arguments.recordings)
        arguments.played = replay(recordings, arguments.layer, arguments.shape.tokens)
        arguments.ranks, arguments.workloads = len(recordings), ["recording"]
        arguments.shape = replace(
            arguments.shape,
            experts=recordings[0].num_experts,
            top_k=recordings[0].top_k,
            tokens=len(arguments.played[0][0].kinds),
        )
    for name in ("ranks", "steps", "repeats", "threads", "tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: found {value}, expected 1 or more")
    if arguments.mode != "planner" and arguments.shape.experts % arguments.ranks:
        parser.error(
            f"--ranks: found {arguments.ranks}, expected a divisor of the {arguments.shape.experts} experts"
        )
    if arguments.threads is None:
        processes = arguments.ranks if arguments.mode in ("layer", "generate") else 1
        arguments.threads = max(1, (os.cpu_count() or 1) // processes)
    known_titles = contenders(arguments.straggler)
    for title in arguments.policies or ():
        if title not in known_titles:
            parser.error(f"--policies: found {title!r}, expected some of {', '.join(known_titles)}")
    return arguments


def running(arguments: argparse.Namespace) -> dict[str, Contender]:
    """The policies asked for, vanilla first."""
    chosen = contenders(arguments.straggler)
    titles = [VANILLA, *(arguments.policies or list(chosen)[1:])]
    found = {title: chosen[title] for title in dict.fromkeys(titles)}
    for title in ("token drop", "expanded drop"):
        if title in found:
            found.update(loosened(title, chosen[title], bound) for bound in arguments.ladder)
    return found


def steps_of(arguments: argparse.Namespace, workload: str) -> Callable[[int, int], Batch]:
    """The batch of a step and source rank."""
    if arguments.recordings:
        batches = arguments.played
        return lambda step, rank: batches[step % len(batches)][rank]
    return lambda step, rank: draw(workload, arguments.shape, step, rank, arguments.ranks, arguments.seed)


# What a policy did.


@dataclass
class Done:
    """Loads of a policy over the steps of a workload: sums over all ranks, of every step."""

    ranks: int
    top_k: int
    experts: list[np.ndarray]  # rows of each expert after planning, [E] a step
    tokens: float = 0.0
    sent: float = 0.0
    kept: float = 0.0
    rerouted: float = 0.0
    dropped: float = 0.0
    kept_mass: float = 0.0
    mass: float = 0.0

    def add(self, packed: Tensor, experts: int, sent: Tensor) -> None:
        """One step: its statistics, packed, and the rows sent to others, of all ranks together."""
        names = PlanStatistics.scalar_names()
        scalars = dict(zip(names, packed[: len(names)].tolist(), strict=True))
        self.experts.append(packed[-experts:].cpu().numpy())
        for name in ("tokens", "kept", "rerouted", "dropped", "kept_mass"):
            setattr(self, name, getattr(self, name) + scalars[name])
        self.mass += scalars["kept_mass"] + scalars["rerouted_mass"] + scalars["dropped_mass"]
        self.sent += float(sent)

    @property
    def busiest(self) -> float:
        """Rows of the busiest rank, over all steps."""
        return float(sum(step.reshape(self.ranks, -1).sum(1).max() for step in self.experts))

    @property
    def straggler(self) -> float:
        """Those over vanilla's mean rank's."""
        return self.busiest / (self.tokens * self.top_k / self.ranks)

    @property
    def busiest_expert(self) -> float:
        """Rows of the busiest expert over vanilla's mean expert's."""
        mean = self.tokens * self.top_k / len(self.experts[0])
        return float(sum(step.max() for step in self.experts)) / mean

    def shares(self) -> dict[str, float]:
        count = self.kept + self.rerouted + self.dropped
        return {
            "dropped": self.dropped / count,
            "rerouted": self.rerouted / count,
            "kept_mass": self.kept_mass / self.mass,
            "sent": self.sent / count,
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
    steps = len(done.experts)
    row = {
        "workload": workload,
        "policy": title,
        "turns": len(turns),
        "ms": statistics.median(turns) / steps,
        "spread": _spread(turns) / steps,
        "ratio": statistics.median(ratios),
        "ratio_spread": _spread(ratios),
        "ideal": ideal,
        "share": ideal / statistics.median(ratios),
        "straggler": done.straggler,
        "busiest_expert": done.busiest_expert,
    }
    return row | done.shares()


def _spread(values: Sequence[float]) -> float:
    """Between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def table_of(rows: Sequence[dict[str, Any]], caption: str) -> Table:
    table = Table(caption=caption, caption_justify="left")
    titles = ("workload", "policy", "ms", "time / vanilla", "ideal", "share of ideal", "busiest rank")
    titles += ("busiest expert", "sent", "dropped", "rerouted", "kept mass")
    for title in titles:
        table.add_column(title, justify="left" if title in ("workload", "policy") else "right")
    last = None
    for row in rows:
        if last not in (None, row["workload"]):
            table.add_section()
        first = "" if row["workload"] == last else row["workload"]
        last = row["workload"]
        if "failed" in row:
            table.add_row(first, row["policy"], f"not timed: {row['failed']}")
            continue
        table.add_row(
            first,
            row["policy"],
            f"{row['ms']:.1f}",
            f"{row['ratio']:.3f}" + (f" ± {row['ratio_spread'] / 2:.3f}" if row["turns"] > 1 else ""),
            f"{row['ideal']:.3f}",
            f"{row['share']:.0%}",
            f"{row['straggler']:.3f}",
            f"{row['busiest_expert']:.2f}",
            f"{row['sent']:.1%}",
            f"{row['dropped']:.1%}",
            f"{row['rerouted']:.1%}",
            f"{row['kept_mass']:.3f}",
        )
    return table


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What it ran on, with what."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron": megatron.core.__version__,
        "triton": has_triton(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "CPU"


# layer: all ranks at once.


class Collectives(TorchDispatchMode):
    """Counts the collectives within its block, whoever calls them, and the elements they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            self.counts[name] += 1
            self.counts[f"{name} elements"] += sum(one.numel() for one in _tensors((args, kwargs)))
        return func(*args, **(kwargs or {}))


def layer_rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """One expert-parallel rank of the layer benchmark; the first writes what was found."""
    _quietly(arguments)
    with engine(), torch.inference_mode():
        join(rank, arguments.ranks, folder)
        found = _layer_rank(rank, arguments)
        if rank == 0:
            (Path(folder) / "found.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()


Step = tuple[Tensor, Modality, Tensor]
"""hidden [T, 1, D], modality, and the logits that the router is to see."""


def _layer_rank(rank: int, arguments: argparse.Namespace) -> dict[str, Any]:
    shape, asked = arguments.shape, Asked()
    stock = build_layer(shape, None)
    force(stock, asked)
    oracle = Oracle(shape, stock)
    sides = {title: Side(shape, one, stock, asked) for title, one in running(arguments).items()}
    rows: list[dict[str, Any]] = []
    same: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), disable=rank > 0) as progress:
        bar = progress.add_task("measuring", total=len(arguments.workloads) * arguments.repeats)
        costs = Costs(shape, arguments.ranks, stock, asked, arguments.seed)
        for workload in arguments.workloads:
            costs.sample()
            batch_of = steps_of(arguments, workload)
            batches = [batch_of(step, rank) for step in range(arguments.steps)]
            steps = [
                layout_of(batch, features(batch, shape.hidden, step, rank, arguments.seed))
                for step, batch in enumerate(batches)
            ]
            done = {title: Done(arguments.ranks, shape.top_k, []) for title in sides}
            good = dict.fromkeys(sides, True)
            for step, batch in zip(steps, batches, strict=True):
                asked.logits = step[2]
                for title, side in sides.items():
                    good[title] &= _checked(side, step, batch, stock, oracle, done[title])
            good = {title: everywhere(value) for title, value in good.items()}
            works = {VANILLA: lambda hidden, modality: stock(hidden)}
            works |= {title: side for title, side in sides.items() if title != VANILLA and good[title]}
            turns: dict[str, list[float]] = {title: [] for title in works}
            for turn in range(arguments.repeats):
                spent = dict.fromkeys(works, 0.0)
                for number, (hidden, modality, asked.logits) in enumerate(steps):
                    for title in order_of(works, turn, number):
                        spent[title] += together(partial(works[title], hidden, modality))
                for title, value in spent.items():
                    turns[title].append(value)
                progress.advance(bar)
            for title in sides:
                if good[VANILLA] and title in works:
                    base = turns[VANILLA]
                    rows.append(row_of(workload, title, done[title], done[VANILLA], turns[title], base))
                else:
                    rows.append({"workload": workload, "policy": title, "failed": "wrong output"})
            if NOTHING_OVER in sides and not same:
                asked.logits = steps[0][2]
                same = _nothing_more(stock, sides[NOTHING_OVER], *steps[0][:2])
        # Planners on a batch of no workload, in which as much is over capacity as in a middling one.
        batch = calibrating(shape, rank, arguments.seed)
        hidden, modality, asked.logits = layout_of(batch, features(batch, shape.hidden, 0, rank))
        planning = {}
        for title, side in list(sides.items())[1:]:
            side(hidden, modality)
            planning[title] = median_of(side.planning(), 5)
        origin = f"measured: {arguments.ranks} processes, {machine(arguments)['device']}"
        costs.sample()
        model = costs.model(planning, origin)
        speeds = dict(zip(arguments.workloads, costs.slowness(), strict=True))
    return {"rows": rows, "under_capacity": same, "cost_model": asdict(model), "slowness": speeds}


def _checked(side: Side, step: Step, batch: Batch, stock: Any, oracle: Oracle, done: Done) -> bool:
    """Whether a layer was routed as asked, made a sound plan, and computed what the plan says; what it did
    is added to ``done``. Vanilla's output must be stock Megatron's, too."""
    hidden, modality, _ = step
    side.runtime.recording = True  # for the plan to say what it did; not where it is timed
    output, plan = side(hidden, modality), side.plan
    side.runtime.recording = False
    assert plan is not None
    topology = side.macs.topology
    sent = over_ranks(sent_by(plan, topology, topology.sources[0]))
    done.add(over_ranks(plan.statistics.record), side.shape.experts, sent)
    routed = torch.equal(plan.statistics.load_before.cpu(), loads_of(batch.experts, side.shape.experts))
    good = routed and sound(plan, side.shape)
    good &= same_output(output, oracle(hidden, plan))
    if side.runtime.policy == VANILLA:
        own = stock(hidden)[0]
        # On a GPU the engine itself adds up in another order every time.
        exact = device().type == "cpu"
        good &= torch.equal(output, own) if exact else same_output(output, own)
    return good


def order_of(titles: Iterable[str], turn: int, step: int) -> list[str]:
    """In which order a step's policies run: another every time, the same on every rank."""
    found = list(titles)
    random.Random(f"{turn}|{step}").shuffle(found)
    return found


def everywhere(value: bool) -> bool:
    """Whether it holds on every rank."""
    return bool(over_ranks(torch.tensor(int(value)), dist.ReduceOp.MIN))


def sound(plan: Plan, shape: Shape) -> bool:
    """Whether a plan gives no token an expert twice, weighs nothing that is dropped, and counts its rows."""
    experts = plan.experts
    ordered = experts.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    weightless = bool((plan.weights[experts < 0] == 0).all())
    counted = torch.equal(plan.statistics.load_after, loads_of(experts, shape.experts))
    return weightless and counted and not bool(twice.any())


def calibrating(shape: Shape, rank: int, seed: int) -> Batch:
    """A batch of no workload: half of it visual."""
    return with_visual_share(0.5)(shape, 0, rank, 1, stream("calibrating", seed, 0, rank))


def _nothing_more(stock: Any, side: Side, hidden: Tensor, modality: Modality) -> dict[str, Any]:
    """What stock Megatron sends, and what MACS does where nothing is over capacity."""
    with Collectives() as before:
        expected = stock(hidden)[0]
    with Collectives() as after:
        found = side(hidden, modality)
    return {
        "stock": dict(before.counts),
        "macs": dict(after.counts),
        "same_collectives": before.counts == after.counts,
        "same_bits": torch.equal(found, expected),
    }


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
        self.local, self.even = _experts_of(self.shape, self.ranks)
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
        works = []
        for rows in self._exchanged():
            given = torch.zeros(rows * self.ranks, self.shape.hidden, dtype=kind, device=device())
            works.append(partial(dist.all_to_all_single, torch.empty_like(given), given))
        return works

    def _exchanged(self) -> list[int]:
        """Rows that go from one rank to another."""
        return [max(1, self.shape.tokens * self.shape.top_k // self.ranks // part) for part in (64, 8, 2, 1)]

    def _even_layers(self) -> list[Callable[[], Any]]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        works = []
        for tokens in (self.shape.tokens // 2, self.shape.tokens):
            batch = draw("W4", replace(self.shape, tokens=tokens), 0, rank, self.ranks, 1 + self.seed)
            hidden, _, logits = layout_of(batch, features(batch, self.shape.hidden, 0, rank))

            def work(hidden: Tensor = hidden, logits: Tensor = logits) -> Any:
                self.asked.logits = logits
                return self.stock(hidden)

            works.append(work)
        return works

    def slowness(self) -> list[float]:
        """Between one sample and the next, how much longer everything took than in the median sample: what
        the machine was like while a workload ran."""
        layers = np.array([one["layers"][1] for one in self.samples])
        return ((layers[:-1] + layers[1:]) / 2 / np.median(layers)).tolist()

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


def _experts_of(shape: Shape, ranks: int) -> tuple[int, int]:
    """Experts of a rank, and an expert's rows where all have as many."""
    return shape.experts // ranks, shape.tokens * shape.top_k * ranks // shape.experts


def curve_rows(even: int) -> list[float]:
    """Rows to time an expert with, from hardly any to four times an even share."""
    return [1.0, *sorted({max(2.0, even // part) for part in (16, 4, 2, 1)}), 2.0 * even + 2, 4.0 * even + 4]


def run_layer(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(layer_rank, (arguments, folder), nprocs=arguments.ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    shape = arguments.shape
    caption = (
        f"Megatron-Core {megatron.core.__version__}, all-to-all, {arguments.ranks} processes of "
        f"{arguments.threads} thread(s), T {shape.tokens}, D {shape.hidden}, FFN {shape.ffn} (gated), "
        f"E {shape.experts}, k {shape.top_k}; {arguments.steps} steps, {arguments.repeats} turns, medians ± "
        "half the quartile distance. Ratios: to stock Megatron in the same turn. Ideal: ratio of the busiest "
        "ranks' rows. Busiest: rows over vanilla's mean."
    )
    console.print(table_of(found["rows"], caption))
    same = found["under_capacity"]
    if same:
        console.print(
            f"Nothing over capacity: collectives {'the same' if same['same_collectives'] else 'NOT the same'}"
            f" ({same['stock']}), output bit for bit {'the same' if same['same_bits'] else 'NOT the same'}."
        )
    if arguments.save_cost_model:
        CostModel(**found["cost_model"]).save(arguments.save_cost_model)
    for line in at_same_mass(found["rows"]):
        console.print(line)
    return found


def at_same_mass(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a baseline takes, between its bounds, when it keeps as much combine mass as MACS does."""
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload and "failed" not in row]
        macs = next((row for row in mine if row["policy"] == "macs"), None)
        for title in ("token drop", "expanded drop"):
            ladder = sorted(
                (row["kept_mass"], row["ratio"]) for row in mine if row["policy"].startswith(title)
            )
            if macs is None or len(ladder) < 2 or not ladder[0][0] <= macs["kept_mass"] <= ladder[-1][0]:
                continue
            ratio = float(np.interp(macs["kept_mass"], *zip(*ladder, strict=True)))
            lines.append(
                f"{workload}: keeping {macs['kept_mass']:.3f} of the mass, {title} takes {ratio:.3f} of "
                f"vanilla's time, macs {macs['ratio']:.3f} (which reroutes {macs['rerouted']:.1%} besides)"
            )
    return lines


# virtual-ep: one process, every rank's experts in turn.


def run_virtual(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Layer time = slowest source + exchanges + slowest rank's experts: planners and experts are measured,
    the rest follows the figures of ``--cost-model``, or copies in memory where none is given."""
    shape, ranks = arguments.shape, arguments.ranks
    rows: list[dict[str, Any]] = []
    chosen = running(arguments)
    with engine(), torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        join(0, 1, folder)
        # A rank's share of the experts, whose weights play every rank's in turn.
        layer = build_layer(replace(shape, experts=shape.experts // ranks, top_k=1), None)
        model = virtual_costs(arguments, chosen, layer)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("measuring", total=len(arguments.workloads) * arguments.steps)
            curves = []
            for workload in arguments.workloads:
                curves.append(sampled_curve(shape, ranks, layer))
                rows += _virtual_workload(arguments, workload, chosen, layer, model, progress, bar)
            curves.append(sampled_curve(shape, ranks, layer))
        # As in ``Costs``: experts as they are in the median, and how slow the machine was meanwhile.
        usual = np.median(curves, axis=0)
        model = replace(model, ms=np.maximum.accumulate(usual).tolist())
        pace = np.array(curves)[:, 1:].sum(1) / usual[1:].sum()
        slowness = dict(zip(arguments.workloads, ((pace[:-1] + pace[1:]) / 2).tolist(), strict=True))
        dist.destroy_process_group()
    caption = (
        f"One process of {arguments.threads} thread(s) as {ranks} ranks, T {shape.tokens} a rank, "
        f"D {shape.hidden}, FFN {shape.ffn} (gated), E {shape.experts}, k {shape.top_k}. Experts are "
        "measured on every rank's real rows, planners on the first source's; routers, permutations and "
        f"exchanges are modelled ({model.origin})."
    )
    console.print(table_of(rows, caption))
    if arguments.save_cost_model:
        model.save(arguments.save_cost_model)
    return {"rows": rows, "cost_model": asdict(model), "slowness": slowness}


def virtual_costs(arguments: argparse.Namespace, chosen: dict[str, Contender], layer: Any) -> CostModel:
    """This process's times of experts and planners; the rest as ``--cost-model`` says, if it is given."""
    shape, ranks = arguments.shape, arguments.ranks
    size = shape.hidden * next(layer.experts.parameters()).element_size()
    curve = sampled_curve(shape, ranks, layer)
    rows, ms = curve_rows(_experts_of(shape, ranks)[1]), np.maximum.accumulate(curve).tolist()
    batch = calibrating(shape, 0, arguments.seed)
    planning = {}
    for title, contender in list(chosen.items())[1:]:
        planning[title] = median_of(planned(shape, contender, ranks, 0, batch, 0), 5)
    given = torch.zeros(shape.tokens * shape.top_k, shape.hidden, device=device())
    copy = median_of(given.clone, 5)
    own = CostModel(
        rows=rows,
        ms=ms,
        fixed_ms=0.0,
        row_ms=2 * copy / len(given),
        latency_ms=0.0,
        inside_gbs=given.nbytes / copy / 1e6,
        beyond_gbs=given.nbytes / copy / 1e6,
        node=ranks,
        row_bytes=size,
        hidden=shape.hidden,
        ffn=shape.ffn,
        tokens=shape.tokens,
        planner_ms=planning,
        origin="as copies in memory",
    )
    if arguments.cost_model is None:
        return own
    rest = CostModel.load(arguments.cost_model)
    rest.check(shape)
    # Ranks are played one after the other: each has the machine to itself.
    return replace(rest, rows=rows, ms=ms, node=ranks, alone=1.0, planner_ms=planning, tokens=shape.tokens)


def sampled_curve(shape: Shape, ranks: int, layer: Any) -> np.ndarray:
    """ms of an expert for ``curve_rows``, of one call each after one that does not count."""
    count, even = _experts_of(shape, ranks)
    return np.array(
        [median_of(run_experts(layer, [one] * count, shape.hidden), 1) / count for one in curve_rows(even)]
    )


def _virtual_workload(
    arguments: argparse.Namespace,
    workload: str,
    chosen: dict[str, Contender],
    layer: Any,
    model: CostModel,
    progress: Progress,
    bar: Any,
) -> list[dict[str, Any]]:
    shape, ranks = arguments.shape, arguments.ranks
    batch_of = steps_of(arguments, workload)
    done = {title: Done(ranks, shape.top_k, []) for title in chosen}
    measured, modelled = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0.0)
    good = dict.fromkeys(chosen, True)
    for step in range(arguments.steps):
        batches = [batch_of(step, rank) for rank in range(ranks)]
        loads: dict[str, Tensor] = {}
        for title, contender in chosen.items():
            statistics_of, sent, parts = [], torch.zeros(()), []
            for rank, batch in enumerate(batches):
                work = planned(shape, contender, ranks, step, batch, rank, arguments.seed)
                plan = work()
                good[title] &= sound(plan, shape)
                if title != VANILLA and rank == 0:
                    measured[title] += median_of(work, 3)
                statistics_of.append(plan.statistics.record)
                parts.append(plan.statistics.load_after)
                sent = sent + sent_by(plan, Topology(shape.experts, ranks), rank).cpu()
            done[title].add(torch.stack(statistics_of).sum(0), shape.experts, sent)
            loads[title] = torch.stack(parts).cpu()
            rest = model.layer(loads[title].numpy())
            modelled[title] += rest.source + rest.exchange
        times: dict[str, list[list[float]]] = {title: [] for title in chosen}
        for turn in range(arguments.repeats + 1):
            for title in order_of(chosen, turn, step):
                by_rank = loads[title].view(ranks, ranks, -1).sum(0).tolist()
                works = [run_experts(layer, [int(count) for count in rows], shape.hidden) for rows in by_rank]
                times[title].append([milliseconds(work) for work in works])
        for title, turns in times.items():
            # The first turn warms up. A rank's time is its median: a maximum of single ones would be noise.
            measured[title] += float(np.median(turns[1:], axis=0).max())
        progress.advance(bar)
    rows = []
    for title in chosen:
        if not good[title]:
            rows.append({"workload": workload, "policy": title, "failed": "unsound plan"})
            continue
        total, base = measured[title] + modelled[title], measured[VANILLA] + modelled[VANILLA]
        row = row_of(workload, title, done[title], done[VANILLA], [total], [base])
        rows.append(row | {"measured_ms": measured[title] / arguments.steps})
    return rows


def planned(
    shape: Shape,
    contender: Contender,
    ranks: int,
    step: int,
    batch: Batch,
    rank: int,
    seed: int = 0,
) -> Callable[[], Plan]:
    """A call that plans a source rank's batch."""
    topology = Topology(shape.experts, ranks, sources=(rank,))
    policy = build_policy(contender.policy, contender.config, topology, shape.top_k)
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    hidden = features(batch, shape.hidden, step, rank, seed).to(device(), kind)
    inputs = [one.to(device()) for one in (batch.experts, batch.weights, batch.scores)]
    tokens = Modality.of(batch.kinds[None].to(device())).batch_major()
    return lambda: policy.plan(hidden, *inputs, tokens)


# planner: its parts, its growth, its memory.


class Watch(TorchDispatchMode):
    """What a call allocates: bytes alive at most, elements of the largest tensor, operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = self.largest = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        for one in _tensors(out):
            place = one.untyped_storage().data_ptr()
            if place in before and place not in self.alive:
                continue  # a view of what was there
            self.largest = max(self.largest, one.numel())
            if not self.alive[place]:
                self.sizes[place] = one.untyped_storage().nbytes()
                self.now += self.sizes[place]
                self.peak = max(self.peak, self.now)
            self.alive[place] += 1
            weakref.finalize(one, self._gone, place)
        return out

    def _gone(self, place: int) -> None:
        self.alive[place] -= 1
        if not self.alive[place]:
            self.now -= self.sizes[place]
            del self.alive[place]


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, Tensor)]


def planned_alone(
    shape: Shape, contender: Contender, ranks: int, workload: str = "image-flood"
) -> Callable[[], Plan]:
    """A call that plans one source rank's tokens of a workload."""
    return planned(shape, contender, ranks, 0, draw(workload, shape, 0, 0, ranks), 0)


def router_pass(shape: Shape) -> Callable[[], Any]:
    """What a router does with its logits [T, E]: scores and the k best."""
    logits = torch.randn(shape.tokens, shape.experts, device=device())
    return lambda: logits.softmax(1).topk(shape.top_k, 1)


def run_planner(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    shape, ranks = arguments.shape, max(arguments.ranks, 8)
    names = arguments.policies or ["macs paper", "macs", "token drop", "rank-balanced"]
    chosen = {title: contenders(arguments.straggler)[title] for title in names}
    found: dict[str, Any] = {"tokens": shape.tokens, "virtual_ranks": ranks, "policies": {}}
    with engine(), torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        join(0, 1, folder)
        asked = Asked()
        stock = build_layer(shape, None)
        force(stock, asked)
        batch = draw("image-flood", shape, 0, 0, ranks)
        hidden, _, logits = layout_of(batch, features(batch, shape.hidden, 0, 0))
        asked.logits = logits
        works = {title: planned_alone(shape, one, ranks) for title, one in chosen.items()}
        layers, spent = [], {title: [] for title in works}
        around = around_plan(batch.experts.to(device()), batch.scores.to(device()))
        plans = {title: work() for title, work in works.items()}
        beside: dict[str, list[float]] = {title: [] for title in works}
        for turn in range(arguments.repeats + 1):
            stock(hidden)
            layers.append(milliseconds(partial(stock, hidden)))
            for title, work in works.items():
                work()
                spent[title].append(milliseconds(work))
                around(plans[title])
                beside[title].append(milliseconds(partial(around, plans[title])))
            if turn == 0:
                layers.clear()
                for values in (*spent.values(), *beside.values()):
                    values.clear()
        layer_ms = statistics.median(layers)
        for title, work in works.items():
            parts: list[dict[str, float]] = []
            for _ in range(arguments.repeats):
                parts.append({})
                with watching_steps(partial(clocked, parts[-1])):
                    work()
            with Watch() as watch:
                work()
            found["policies"][title] = {
                "ms": statistics.median(spent[title]),
                "around_ms": statistics.median(beside[title]),
                "share": statistics.median(
                    (mine + other) / layer
                    for mine, other, layer in zip(spent[title], beside[title], layers, strict=True)
                ),
                "parts": {part: statistics.median(one.get(part, 0.0) for one in parts) for part in STEPS},
                "operators": watch.operators,
                "bytes_a_token": watch.peak / shape.tokens,
            }
            # Where k E is more than D.
            work = planned_alone(replace(shape, experts=512), chosen[title], ranks)
            work()
            with Watch() as watch:
                work()
            found["policies"][title]["largest_tensor_at_512"] = watch.largest
        found["layer_ms"] = layer_ms
        found["growth"] = growth(shape, chosen, ranks, arguments.repeats)
        found["kernels"] = kernel_memory(chosen, ranks)
        found["bandwidth"] = bandwidths(shape, arguments.repeats)
        dist.destroy_process_group()
    _show_planner(console, found, shape)
    return found


def growth(
    shape: Shape, chosen: dict[str, Contender], ranks: int, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """The planner's time by tokens and by experts, beside a router's pass over the same scores."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, shapes in {
        "tokens": [replace(shape, tokens=shape.tokens * part // 4) for part in (1, 2, 4, 8)],
        "experts": [replace(shape, experts=count) for count in (64, 128, 256, 512)],
    }.items():
        works = [
            {title: planned_alone(one, contender, ranks) for title, contender in chosen.items()}
            | {"router": router_pass(one)}
            for one in shapes
        ]
        times: list[dict[str, list[float]]] = [{title: [] for title in row} for row in works]
        for turn in range(repeats + 1):
            for row, kept in zip(works, times, strict=True):
                for title, work in row.items():
                    work()
                    kept[title].append(milliseconds(work))
                    if turn == 0:
                        kept[title].clear()
        found[name] = [
            {name: float(getattr(one, name))}
            | {title: statistics.median(values) for title, values in kept.items()}
            for one, kept in zip(shapes, times, strict=True)
        ]
    return found


def bandwidths(shape: Shape, repeats: int) -> dict[str, float]:
    """10^9 bytes a second of features read for their entropy, and read and written by a copy, in turn."""
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    hidden = torch.randn(shape.tokens, shape.hidden, device=device()).to(kind)
    tokens = Tokens.all_text(shape.tokens, hidden.device)
    tokens.kinds[:] = IMAGE
    rule = Weighting("entropy", 1.0, 0.5, False, 1)

    def weigh() -> None:
        semantic_weights(
            hidden, tokens, rule, Sums.zeros({"moments": (3, rule.groups(0))}, hidden.device), False
        )

    works = {"entropy": (weigh, 1), "copy": (hidden.clone, 2)}
    spent: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, (work, _) in works.items():
            work()
            spent[name].append(milliseconds(work))
    return {
        name: times * hidden.nbytes / statistics.median(spent[name]) / 1e6
        for name, (_, times) in works.items()
    }


def kernel_memory(chosen: dict[str, Contender], ranks: int) -> dict[str, Any]:
    """What a plan allocates with Triton's kernels (in its interpreter where there is no GPU), at the shape
    of Qwen3-VL-30B-A3B, and what share that is of the layer's activations."""
    shape = SHAPES["qwen3-vl-30b-a3b"]
    if not has_triton() or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return {}
    shape = replace(shape, tokens=shape.tokens if torch.cuda.is_available() else 1024)
    # A row as it is sent, gate and up, their product, and the result, in bfloat16.
    activations = shape.top_k * (2 * shape.hidden + 3 * shape.ffn) * 2
    found = {}
    for title, contender in chosen.items():
        work = planned_alone(shape, contender, ranks)
        with kernels("triton"), _launches_unwatched():
            work()
            with Watch() as watch:
                work()
        found[title] = {
            "bytes_a_token": watch.peak / shape.tokens,
            "share_of_activations": watch.peak / shape.tokens / activations,
            "operators": watch.operators,
        }
    return found


@contextlib.contextmanager
def _launches_unwatched() -> Iterator[None]:
    """Triton's interpreter copies what a kernel is given, which no GPU does: that is not counted."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    real = GridExecutor.__call__

    def launch(*args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return real(*args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield


def _show_planner(console: Console, found: dict[str, Any], shape: Shape) -> None:
    titles = list(found["policies"])
    table = Table(
        caption=f"T {shape.tokens}, D {shape.hidden}, FFN {shape.ffn}, E {shape.experts}, k {shape.top_k}, "
        f"image-flood, {found['virtual_ranks']} ranks; vanilla layer {found['layer_ms']:.0f} ms",
        caption_justify="left",
    )
    for title in ("", *titles):
        table.add_column(title, justify="left" if not title else "right")

    def line(name: str, show: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(show(found["policies"][title]) for title in titles))

    line("planner, ms", lambda one: f"{one['ms']:.1f}")
    line("in and out of Megatron, ms", lambda one: f"{one['around_ms']:.1f}")
    line("both, share of a vanilla layer", lambda one: f"{one['share']:.1%}")
    table.add_section()
    for part in STEPS:
        line(f"{part}, ms", lambda one, part=part: f"{one['parts'][part]:.2f}")
    table.add_section()
    line("torch operators", lambda one: f"{one['operators']}")
    line("peak bytes a token", lambda one: f"{one['bytes_a_token']:.0f}")
    most = shape.tokens * shape.top_k * 512
    line("E 512: largest tensor / (T k E)", lambda one: f"{one['largest_tensor_at_512'] / most:.2f}")
    if found["kernels"]:
        table.add_section()
        for name, key, show in (
            ("with kernels, Qwen3-VL-30B-A3B: bytes a token", "bytes_a_token", "{:.0f}"),
            ("… of the layer's activations", "share_of_activations", "{:.2%}"),
            ("… operators beside kernels", "operators", "{:.0f}"),
        ):
            table.add_row(name, *(show.format(found["kernels"][title][key]) for title in titles))
    console.print(table)
    rates = found["bandwidth"]
    console.print(
        f"Entropy reads {rates['entropy']:.1f} GB/s, {rates['entropy'] / rates['copy']:.0%} of what a copy "
        f"reads and writes ({rates['copy']:.1f})"
    )
    for name, rows in found["growth"].items():
        table = Table(caption=f"ms by {name}; beside: less the router's own pass, over the first line's")
        for heading in (name, "router", *(word for title in titles for word in (title, "beside"))):
            table.add_column(heading, justify="right")
        for row in rows:
            cells = []
            for title in titles:
                less = (row[title] - row["router"]) / (rows[0][title] - rows[0]["router"])
                cells += [f"{row[title]:.1f}", f"{less:.2f}"]
            table.add_row(f"{row[name]:.0f}", f"{row['router']:.1f}", *cells)
        console.print(table)


# generate: through the engine.


def generate_rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    from generation import measure

    _quietly(arguments)
    with engine():
        join(rank, arguments.ranks, folder)
        found = measure(arguments.shape, running(arguments), arguments, rank)
        if rank == 0:
            (Path(folder) / "found.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()


def run_generate(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(generate_rank, (arguments, folder), nprocs=arguments.ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    table = Table(
        caption=f"Megatron's static engine, {arguments.ranks} processes of {arguments.threads} thread(s); "
        f"{found['layers']} layers, {found['prompts']} prompts of {found['prompt_tokens']} tokens a rank, "
        f"{found['new_tokens']} new ones; {arguments.repeats} turns",
        caption_justify="left",
    )
    for title in (
        "workload",
        "policy",
        "prompt, ms",
        "/ vanilla",
        "with answers, ms",
        "/ vanilla",
        "busiest rank",
    ):
        table.add_column(title, justify="left" if title in ("workload", "policy") else "right")
    for row in found["rows"]:
        table.add_row(
            row["workload"],
            row["policy"],
            f"{row['prompt_ms']:.0f}",
            f"{row['prompt_ratio']:.3f}",
            f"{row['ms']:.0f}",
            f"{row['ratio']:.3f}",
            "" if row["straggler"] is None else f"{row['straggler']:.3f}",
        )
    console.print(table)
    return found


def _quietly(arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)


def plot_rows(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Time over vanilla by workload and policy, with what the loads alone would give."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "failed" not in row and row["policy"] != VANILLA]
    loads = list(dict.fromkeys(row["workload"] for row in rows))
    titles = list(dict.fromkeys(row["policy"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.9 * len(loads), 4.2))
    width = 0.8 / max(1, len(titles))
    for index, policy in enumerate(titles):
        mine = [row for row in rows if row["policy"] == policy]
        places = [loads.index(row["workload"]) + width * (index - len(titles) / 2 + 0.5) for row in mine]
        axes.bar(places, [row["ratio"] for row in mine], width, label=policy)
        axes.hlines(
            [row["ideal"] for row in mine],
            [place - width / 2 for place in places],
            [place + width / 2 for place in places],
            color="black",
            linewidth=1,
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(loads)), loads, rotation=30, ha="right")
    axes.set_ylabel("layer time / vanilla (line: by loads alone)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


RUNS = {
    "planner": run_planner,
    "layer": run_layer,
    "virtual-ep": run_virtual,
    "generate": run_generate,
}


def main() -> None:
    arguments = parse_arguments()
    _quietly(arguments)
    console = Console(width=None if sys.stdout.isatty() else 165)
    started = time.time()
    found = RUNS[arguments.mode](arguments, console)
    told = {
        name: str(value) if isinstance(value, (Path, list)) and name != "ladder" else value
        for name, value in vars(arguments).items()
        if name not in ("shape", "played")
    }
    result = {
        "mode": arguments.mode,
        "arguments": told,
        "shape": asdict(arguments.shape),
        "machine": machine(arguments),
        "seconds": round(time.time() - started),
        **found,
    }
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(result) + "\n")
    if arguments.plots and arguments.mode in ("layer", "virtual-ep"):
        arguments.plots.mkdir(parents=True, exist_ok=True)
        plot_rows(
            found["rows"],
            arguments.plots / f"{arguments.mode}-{arguments.ranks}.png",
            f"{arguments.mode}, {arguments.ranks} ranks, {machine(arguments)['device']}",
        )
    same = found.get("under_capacity")
    if any("failed" in row for row in found.get("rows", ())):
        sys.exit("benchmark: some output was wrong; see the table")
    if same and not (same["same_collectives"] and (same["same_bits"] or torch.cuda.is_available())):
        sys.exit("benchmark: with nothing over capacity MACS does not do what stock Megatron does")


if __name__ == "__main__":
    main()
