"""What a bounded step costs in answers: policies and settings on the tiny model's held-out questions.

    python tools/evaluate.py --grid baselines presets --batches mixed --ranks 4 --plot runs/quality.png

Every point is a run of Megatron's static engine, in one process whose layers plan as several
expert-parallel ranks would. For each: accuracy by task, agreement with vanilla and KL to it at the
first token of an answer, kept, rerouted and dropped, and loads of ranks and experts, with bootstrap
intervals of 95 %. Points go to a file of JSON lines as they are done, and are not done twice.

An equal capacity factor is not an equal load. The table compares policies at a bound on the *realised*
straggler: the largest rank's rows over vanilla's mean, after planning, mean over layers and batches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.megatron_engine import Engine
from torch import Tensor

from macs import MACSConfig, Profile, Runtime
from megatron_macs import attach_modality, cpu_engine

MIXES: dict[str, tuple[str, ...]] = {
    "mixed": data.TASKS,
    "image-flood": data.PICTURE_TASKS,
    "text-heavy": (*data.TEXT_TASKS * 3, "count"),
    "texts": data.TEXT_TASKS,
    **{task: (task,) for task in data.TASKS},
}
"""What a batch is made of: tasks in turn."""

COUNTED = (0.8, 0.9, 0.95, 1.0, 1.04, 1.09, 1.2, 1.4, 1.7, 2.0)
WEIGHTED = (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 1.0)
"""Capacity factors: where every token costs one, and where it costs its weight."""

PAPER = MACSConfig.preset("paper")
POOLED = MACSConfig.preset("pooled")


@dataclass(frozen=True)
class Point:
    """One thing to measure: a policy and its settings, on batches of a kind, planned for so many ranks.

    random_weights: a control; semantic weights come of noise instead of the features.
    """

    title: str
    policy: str
    config: MACSConfig
    batches: str = "mixed"
    ranks: int = 4
    random_weights: bool = False

    def key(self, arguments: argparse.Namespace) -> str:
        """What tells this point from all others in the file."""
        told = {**asdict(self), "split": arguments.split, "questions": arguments.questions}
        return json.dumps({**told, "seed": arguments.seed, "batch": arguments.batch}, sort_keys=True)


def by_gamma(title: str, policy: str, config: MACSConfig, **more: Any) -> list[Point]:
    """The same policy at every capacity factor that makes sense for it."""
    weighted = policy == "macs" and config.cost == "weight"
    factors = WEIGHTED if weighted else COUNTED
    return [Point(title, policy, config.updated(capacity_factor=gamma), **more) for gamma in factors]


def grids() -> dict[str, list[Point]]:
    """Named sets of points."""
    controls = {
        "paper": (PAPER, {}),
        "constant weight": (PAPER.updated(weighting="constant"), {}),
        "random weight": (PAPER, {"random_weights": True}),
        "flipped entropy": (PAPER.updated(entropy_sharpness=-1.0), {}),
        "rho = 0": (PAPER.updated(modality_strength=0.0), {}),
        "no rerouting": (PAPER.updated(reroute="none"), {}),
        "per rank": (PAPER.updated(level="rank", reroute="group"), {}),
        "weight as priority": (PAPER.updated(priority="weight"), {}),
        "product as priority": (PAPER.updated(priority="product"), {}),
    }
    return {
        "baselines": [
            point
            for policy in ("token-drop", "expanded-drop", "rank-balanced")
            for point in by_gamma(policy, policy, MACSConfig())
        ],
        "presets": [
            *by_gamma("macs paper", "macs", PAPER),
            *by_gamma("macs pooled", "macs", POOLED),
        ],
        "controls": [
            point
            for title, (config, more) in controls.items()
            for point in by_gamma(title, "macs", config, **more)
        ],
    }


@dataclass
class Answers:
    """What a policy made of the questions, in their order."""

    ids: list[list[int]] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)  # log-probabilities of the first token, [V] each


class Bench:
    """The tiny model in Megatron's engine, planned as ``ranks`` expert-parallel ranks would."""

    def __init__(self, arguments: argparse.Namespace, ranks: int) -> None:
        source = tiny.load_model(arguments.checkpoint)
        self.arguments = arguments
        self.runtime = Runtime(virtual_ranks=ranks)
        self.model = build_megatron_model(source, self.runtime)
        attach_modality(self.model, image_token_id=source.config.image_token_id)
        self.engine = Engine(self.model, PictureEncoder(source), arguments.batch)
        self.profile = self._calibrated()

    def batches(self, kind: str, split: str, seed: int) -> list[list[data.Sample]]:
        """Whole batches of the questions of a kind."""
        size = self.arguments.batch
        samples = data.draw_samples(seed, split, MIXES[kind], self.arguments.questions // size * size)
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def _calibrated(self) -> Profile:
        """A profile from the training split, which nothing is measured on."""
        with self.runtime.calibration():
            for batch in self.batches("mixed", "train", 1)[:4]:
                self.engine.generate(batch, tokens=1)
        return self.runtime.measured_profile()

    def ask(self, point: Point) -> tuple[Answers, list[Any]]:
        """Answers under a point's policy, and what its layers recorded while they read the prompts."""
        self.runtime.use(point.policy, point.config, self.profile)
        found = Answers()
        with self._noise() if point.random_weights else contextlib.nullcontext(), self._first(found):
            for batch in self.batches(point.batches, self.arguments.split, self.arguments.seed):
                found.ids += self.engine.generate(batch)
        return found, [report.prefill for report in self.runtime.reports()]

    @contextlib.contextmanager
    def _first(self, found: Answers) -> Iterator[None]:
        """Keeps what the model says after every prompt."""

        def keep(module: Any, args: Any, kwargs: Any, logits: Tensor) -> None:
            if kwargs.get("input_ids", args[0] if args else logits).shape[1] > 1:
                found.first += logits[:, -1].float().log_softmax(-1).unbind()

        handle = self.model.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _noise(self) -> Iterator[None]:
        """Layers plan on noise for features; their real features go on as they are."""
        generator = torch.Generator().manual_seed(0)
        for layer in self.runtime.layers:
            inner = layer.plan
            layer.plan = lambda hidden, *rest, inner=inner: inner(  # type: ignore[method-assign]
                torch.randn(hidden.shape, generator=generator), *rest
            )
        try:
            yield
        finally:
            for layer in self.runtime.layers:
                del layer.plan


def bootstrap(values: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """Mean of values [N], and the bounds of its 95 % interval."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def measured(
    point: Point, asked: Sequence[data.Sample], found: Answers, vanilla: Answers, reports: list[Any]
) -> dict[str, Any]:
    """The figures of a point; those of answers as (mean, low, high)."""
    right = np.array([ids == sample.answer for ids, sample in zip(found.ids, asked, strict=True)])
    same = np.array([ids == other for ids, other in zip(found.ids, vanilla.ids, strict=True)])
    expected, given = torch.stack(vanilla.first), torch.stack(found.first)
    divergence = (expected.exp() * (expected - given)).sum(-1).clamp(min=0).numpy()
    tasks = np.array([sample.task for sample in asked])
    pictures = np.isin(tasks, data.PICTURE_TASKS)

    def where(chosen: np.ndarray, values: np.ndarray) -> Any:
        return bootstrap(values[chosen].astype(float)) if chosen.any() else None

    after = torch.stack([report.straggler("after") for report in reports])  # [L, N]
    before = torch.stack([report.straggler("before") for report in reports])
    experts = torch.stack([report.imbalance("after") for report in reports])
    shares = [report.shares() for report in reports]
    return {
        "title": point.title,
        "policy": point.policy,
        "settings": asdict(point.config),
        "batches": point.batches,
        "ranks": point.ranks,
        "accuracy": {task: where(tasks == task, right) for task in dict.fromkeys(tasks)},
        "picture_accuracy": where(pictures, right),
        "text_accuracy": where(~pictures, right),
        "agreement": bootstrap(same.astype(float)),
        "kl": bootstrap(divergence),
        "picture_kl": where(pictures, divergence),
        "text_kl": where(~pictures, divergence),
        "straggler_before": float(before.mean()),
        "straggler": float(after.mean()),
        "straggler_p95": float(after.flatten().quantile(0.95)),
        "busiest_expert": float(experts.mean()),
        "busiest_expert_p95": float(experts.flatten().quantile(0.95)),
        "layers": [
            {"before": float(one), "after": float(other)}
            for one, other in zip(before.mean(1), after.mean(1), strict=True)
        ],
        **{name: float(np.mean([share[name] for share in shares])) for name in shares[0]},
    }


def read_points(path: Path) -> dict[str, dict[str, Any]]:
    """What a file of JSON lines holds, by key."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {line["key"]: line["found"] for line in lines}


def run(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Measure the points that the file lacks; all points that were asked for."""
    named = grids()
    points = [
        Point(one.title, one.policy, one.config, batches, ranks, one.random_weights)
        for ranks in arguments.ranks
        for batches in arguments.batches
        for name in arguments.grid
        for one in named[name]
    ]
    done = read_points(arguments.out)
    missing = [point for point in points if point.key(arguments) not in done]
    console.print(f"{len(points)} points, {len(points) - len(missing)} of them in {arguments.out} already")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    benches: dict[int, Bench] = {}
    vanilla: dict[tuple[int, str], Answers] = {}
    with Progress(*columns, console=console) as progress, arguments.out.open("a") as out:
        bar = progress.add_task("measuring", total=len(missing))
        for point in missing:
            progress.update(bar, description=f"{point.title}, {point.batches}, {point.ranks} ranks")
            if point.ranks not in benches:
                benches[point.ranks] = Bench(arguments, point.ranks)
            bench, kind = benches[point.ranks], (point.ranks, point.batches)
            if kind not in vanilla:
                stock = Point("vanilla", "vanilla", MACSConfig(), point.batches, point.ranks)
                vanilla[kind] = bench.ask(stock)[0]
            batches = bench.batches(point.batches, arguments.split, arguments.seed)
            asked = [sample for batch in batches for sample in batch]
            answers, reports = bench.ask(point)
            found = measured(point, asked, answers, vanilla[kind], reports)
            done[point.key(arguments)] = found
            out.write(json.dumps({"key": point.key(arguments), "found": found}) + "\n")
            out.flush()
            progress.advance(bar)
    return [done[point.key(arguments)] for point in points]


def best_within(found: list[dict[str, Any]], bound: float) -> dict[str, dict[str, Any]]:
    """By title: the point of least KL among those whose realised straggler keeps to the bound."""
    best: dict[str, dict[str, Any]] = {}
    for one in found:
        if one["straggler"] <= bound and one["kl"][0] < best.get(one["title"], {"kl": [np.inf]})["kl"][0]:
            best[one["title"]] = one
    return best


def table_of(found: list[dict[str, Any]], bound: float, caption: str) -> Table:
    """Every policy at its best setting within a bound, by KL."""
    table = Table(title=f"busiest rank at most {bound:g} times the mean", caption=caption)
    names = ("", "gamma", "rank", "KL x 1000", "95 %", "same", "pictures", "texts", "kept", "dropped")
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    best = best_within(found, bound)
    for title, one in sorted(best.items(), key=lambda item: item[1]["kl"][0]):
        kl, low, high = (1e3 * value for value in one["kl"])
        means = (one[name] for name in ("agreement", "picture_accuracy", "text_accuracy"))
        table.add_row(
            title,
            f"{one['settings']['capacity_factor']:g}",
            f"{one['straggler']:.3f}",
            f"{kl:.2f}",
            f"{low:.2f}-{high:.2f}",
            *("" if value is None else f"{value[0]:.3f}" for value in means),
            f"{one['kept_mass']:.3f}",
            f"{one['dropped']:.1%}",
        )
    return table


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """KL against the realised straggler, a curve for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for title in dict.fromkeys(one["title"] for one in found):
        curve = sorted((one["straggler"], one["kl"]) for one in found if one["title"] == title)
        x, kl = [one[0] for one in curve], np.array([one[1] for one in curve])
        axes.plot(x, kl[:, 0], marker="o", markersize=3, label=title)
        axes.fill_between(x, kl[:, 1], kl[:, 2], alpha=0.15)
    axes.axvline(
        found[0]["straggler_before"], color="grey", linestyle=":", linewidth=1, label="vanilla's load"
    )
    axes.set(xlabel="busiest rank's rows over vanilla's mean", ylabel="KL to vanilla (nats)", yscale="log")
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Megatron's parallel state for a single process, without a launcher."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", nargs="+", choices=tuple(grids()), default=["baselines", "presets"])
    parser.add_argument("--batches", nargs="+", choices=tuple(MIXES), default=["mixed"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4], help="expert-parallel ranks planned for")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--questions", type=int, default=896)
    parser.add_argument("--batch", type=int, default=56, help="questions asked at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bounds", nargs="+", type=float, default=[1.05, 1.1])
    parser.add_argument("--checkpoint", type=Path, default=tiny.CHECKPOINT)
    parser.add_argument("--out", type=Path, default=Path("runs") / "quality.jsonl")
    parser.add_argument("--plot", type=Path, help="a picture of KL against load")
    arguments = parser.parse_args(given)
    if arguments.questions < arguments.batch:
        parser.error(
            f"--questions: found {arguments.questions}, expected a batch ({arguments.batch}) or more"
        )
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and show what was measured."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    arguments, console = parse_arguments(given), Console()
    with cpu_engine(), one_process(), torch.inference_mode():
        found = run(arguments, console)
    for ranks in arguments.ranks:
        for batches in arguments.batches:
            chosen = [one for one in found if (one["ranks"], one["batches"]) == (ranks, batches)]
            caption = f"{batches} batches of {arguments.batch}, {ranks} ranks, {arguments.split} split, "
            caption += f"{arguments.questions} questions; 95 % intervals"
            for bound in arguments.bounds:
                console.print(table_of(chosen, bound, caption))
            if arguments.plot is not None:
                name = f"{arguments.plot.stem}-{batches}-{ranks}{arguments.plot.suffix or '.png'}"
                plot(chosen, arguments.plot.with_name(name))


if __name__ == "__main__":
    main()
