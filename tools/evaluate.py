"""What a bounded step costs in answers: policies and settings on the tiny model's held-out questions.

    python tools/evaluate.py --grid baselines presets --batches mixed --ranks 4 8     # validation split
    python tools/evaluate.py --chosen runs/quality.jsonl --split test --questions 3584

Every point is a run of Megatron's static engine, in one process whose layers plan as several
expert-parallel ranks would. For each: accuracy by task, agreement with vanilla and KL to it at the
first token of an answer, kept, rerouted and dropped, and loads of ranks and experts, with bootstrap
intervals of 95 %. Points go to a file of JSON lines as they are done, and are not done twice.

An equal capacity factor is not an equal load. The table compares policies at a bound on the *realised*
straggler: the largest rank's rows over vanilla's mean, after planning, mean over layers and batches.
Within it each policy is shown at its best setting; ``--chosen`` measures on another split what was
best on the split of a file, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from calibrate import processes
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.megatron_engine import Engine
from torch import Tensor

from macs import POLICIES, MACSConfig, Profile, Runtime
from macs.files import output_file
from megatron_macs import attach_modality, cpu_engine

MIXES: dict[str, tuple[str, ...]] = {
    "mixed": data.TASKS,
    "image-flood": data.PICTURE_TASKS,
    "multi-image": data.PICTURE_TASKS,
    "text-heavy": (*data.TEXT_TASKS * 3, "count"),
    "texts": data.TEXT_TASKS,
    **{task: (task,) for task in data.TASKS},
}
"""What a batch is made of: tasks in turn. In multi-image batches another picture comes first."""

COUNTED = (1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 2.0)
PRESET_TITLES = ("macs fast", "macs safe")
"""Points with a bound of their own."""

WEIGHTED = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
"""Capacity factors: where every token costs one, and where it costs its weight."""

TARGETS = (0.9, 1.0, 1.05, 1.1, 1.2)
"""Bounds on the busiest rank."""

PAPER = MACSConfig.preset("paper")
DEFAULT = MACSConfig()
BASELINE = MACSConfig(weighting="constant")  # which no baseline heeds


@dataclass(frozen=True)
class Point:
    """One thing to measure: a policy and its settings, on batches of a kind, planned for so many ranks.

    random_weights: a control; semantic weights come of noise instead of the features. rerouted_weight: what
    a rerouted assignment counts in its token's output, "score" as planned (by its new expert's score), half
    of that, or what it counted at its "former" expert.
    """

    title: str
    policy: str
    config: MACSConfig
    batches: str = "mixed"
    ranks: int = 4
    random_weights: bool = False
    rerouted_weight: str = "score"

    def key(self, arguments: argparse.Namespace) -> str:
        """What tells this point from all others in the file."""
        told = {**asdict(self), "split": arguments.split, "questions": arguments.questions}
        told |= {"seed": arguments.seed, "batch": arguments.batch, "model": str(arguments.checkpoint)}
        return json.dumps(told, sort_keys=True)

    @property
    def setting(self) -> str:
        """How its bound is set, in a word or two."""
        if self.config.capacity_factor is not None:
            return f"gamma {self.config.capacity_factor:g}"
        return f"target {self.config.target_straggler:g}"


def by_gamma(title: str, policy: str, config: MACSConfig, **more: Any) -> list[Point]:
    """The same policy at every capacity factor that makes sense for it."""
    weighted = policy == "macs" and config.cost == "weight"
    factors = WEIGHTED if weighted else COUNTED
    return [Point(title, policy, config.updated(capacity_factor=gamma), **more) for gamma in factors]


def by_target(
    title: str, policy: str, config: MACSConfig, targets: Sequence[float] = TARGETS, **more: Any
) -> list[Point]:
    """The same policy under several bounds that it has to meet by itself."""
    return [Point(title, policy, config.updated(target_straggler=target), **more) for target in targets]


def grids(bounds: Sequence[float]) -> dict[str, list[Point]]:
    """Named sets of points; those of variants are measured at the bounds alone."""
    baselines = [name for name, policy in POLICIES.items() if policy.is_baseline]
    controls: dict[str, dict[str, Any]] = {
        "constant weight": {"weighting": "constant"},
        "flipped entropy": {"entropy_sharpness": -1.0},
        "rho = 0": {"modality_strength": 0.0},
        "rho = 1": {"modality_strength": 1.0},
        "no rerouting": {"reroute": "none"},
        "rerouting anywhere": {"reroute": "group"},
        "capacity per rank": {"level": "rank", "reroute": "group"},
        "cost of one": {"cost": "one"},
        "product as priority": {"priority": "product"},
    }
    variants: dict[str, dict[str, Any]] = {
        "capacity per expert": {"level": "expert"},
        "per expert, in the rank": {"level": "expert", "reroute": "rank"},
        "no rerouting": {"reroute": "none"},
        "1 round": {"reroute_rounds": 1},
        "4 rounds": {"reroute_rounds": 4},
        "any expert is as good": {"similarity": "none"},
        "visual weight 1": {"visual_weight": 1.0},
        "visual weight 0.5": {"visual_weight": 0.5},
        "visual weight 0.1": {"visual_weight": 0.1},
        "visual weight 0.02": {"visual_weight": 0.02},
        "normalised in the picture": {"normalization": "image"},
        "half as steep": {"entropy_sharpness": 0.5},
        "twice as steep": {"entropy_sharpness": 2.0},
        "flipped": {"entropy_sharpness": -1.0},
        "constant": {"weighting": "constant"},
        "constant, no rerouting": {"weighting": "constant", "reroute": "none"},
        "entropy": {"weighting": "entropy"},
        "entropy, flipped": {"weighting": "entropy", "entropy_sharpness": -1.0},
        "score as priority": {"priority": "score"},
        "costs its weight": {"cost": "weight"},
    }

    def pooled(policy: str) -> bool:
        return POLICIES[policy].configured(BASELINE).level == "rank"

    def changed(title: str, base: MACSConfig, changes: dict[str, dict[str, Any]]) -> list[Point]:
        return [
            point
            for name, change in changes.items()
            for point in by_target(f"{title}, {name}", "macs", base.updated(**change), bounds)
        ]

    return {
        "baselines": [
            point
            for policy in baselines
            for point in (
                # Rank-balanced has a capacity per rank: there gamma is the bound.
                *(() if pooled(policy) else by_gamma(policy, policy, BASELINE)),
                *by_target(policy, policy, BASELINE),
            )
        ],
        "presets": [
            *by_gamma("macs paper", "macs", PAPER),
            *by_target("macs paper", "macs", PAPER),
            *by_target("macs", "macs", DEFAULT),
            Point("macs fast", "macs", MACSConfig.preset("fast")),
            Point("macs safe", "macs", MACSConfig.preset("safe")),
        ],
        "controls": [
            *by_target("paper", "macs", PAPER, bounds),
            *changed("paper", PAPER, controls),
            *by_target("paper, random weight", "macs", PAPER, bounds, random_weights=True),
        ],
        "variants": [
            *by_target("default", "macs", DEFAULT, bounds),
            *changed("default", DEFAULT, variants),
            *by_target(
                "default, random weight",
                "macs",
                DEFAULT,
                bounds,
                random_weights=True,
            ),
            *(
                point
                for rule in ("half", "former")
                for point in by_target(
                    f"default, rerouted at {rule} weight", "macs", DEFAULT, bounds, rerouted_weight=rule
                )
            ),
        ],
        "bounded": [point for policy in baselines for point in by_target(policy, policy, BASELINE, bounds)]
        + by_target("macs", "macs", DEFAULT, bounds)
        + by_target("macs paper", "macs", PAPER, bounds),
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
        # The longest prompts there are, those with two pictures.
        tokens = data.PROMPT_TOKENS + len(data.PICTURE_PREFIX) - 1
        self.engine = Engine(self.model, PictureEncoder(source), arguments.batch, tokens)
        self.profile = self._calibrated()

    def batches(self, kind: str, split: str, seed: int) -> list[list[data.Sample]]:
        """Whole batches of the questions of a kind."""
        size = self.arguments.batch
        samples = data.draw_samples(seed, split, MIXES[kind], self.arguments.questions // size * size)
        if kind == "multi-image":
            rng = np.random.default_rng(seed)
            samples = [data.after_another(sample, data.draw_picture(rng, split)) for sample in samples]
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
        with contextlib.ExitStack() as stack:
            if point.random_weights:
                stack.enter_context(self._noise())
            if point.rerouted_weight != "score":
                stack.enter_context(self._reweighed(point.rerouted_weight))
            stack.enter_context(self.first_answers(found))
            for batch in self.batches(point.batches, self.arguments.split, self.arguments.seed):
                found.ids += self.engine.generate(batch)
        return found, [report.prefill for report in self.runtime.reports()]

    @contextlib.contextmanager
    def first_answers(self, found: Answers) -> Iterator[None]:
        """Keeps what the model says after every prompt."""

        def keep(module: Any, args: Any, kwargs: Any, logits: Tensor) -> None:
            if kwargs.get("input_ids", args[0] if args else logits).shape[1] > 1:
                found.first += logits[:, -1].double().log_softmax(-1).unbind()

        handle = self.model.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _noise(self) -> contextlib.AbstractContextManager[None]:
        """Layers plan on noise for features; their real features go on as they are."""
        generator = torch.Generator().manual_seed(0)
        return planning(
            self.runtime.layers,
            lambda inner, hidden, *rest: inner(torch.randn(hidden.shape, generator=generator), *rest),
        )

    def _reweighed(self, rule: str) -> contextlib.AbstractContextManager[None]:
        """Rerouted assignments count half of what was planned, or what they did at their former expert."""

        def plan(inner: Any, *inputs: Any) -> Any:
            planned = inner(*inputs)
            other = inputs[2] if rule == "former" else planned.weights / 2
            return replace(planned, weights=torch.where(planned.rerouted, other, planned.weights))

        return planning(self.runtime.layers, plan)


@contextlib.contextmanager
def planning(layers: Sequence[Any], plan: Callable[..., Any]) -> Iterator[None]:
    """Layers whose plans are ``plan(inner, hidden, experts, weights, scores, tokens)``, where ``inner`` of
    the rest is what they would have been."""
    for layer in layers:
        layer.plan = functools.partial(plan, layer.plan)
    try:
        yield
    finally:
        for layer in layers:
            del layer.plan


def bootstrap(values: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """Mean of values [N], and the bounds of its 95 % interval."""
    return bootstrap_ratio(values, np.ones(len(values)), draws)


def bootstrap_ratio(values: np.ndarray, others: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """Mean of values [N] over the mean of others [N] of the same questions, and its 95 % interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(values), size=(draws, len(values)))
    ratios = values[drawn].mean(1) / np.maximum(others[drawn].mean(1), 1e-300)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(values.mean() / max(others.mean(), 1e-300)), float(low), float(high)


def measured(
    point: Point,
    asked: Sequence[data.Sample],
    under: tuple[Answers, list[Any]],
    stock: tuple[Answers, list[Any]],
) -> dict[str, Any]:
    """The figures of a point, from its answers and reports and vanilla's; those of answers as (mean, low,
    high). Intervals are over questions, which the plan of a batch ties to each other a little."""
    (found, reports), (vanilla, untouched) = under, stock
    right = np.array([ids == sample.answer for ids, sample in zip(found.ids, asked, strict=True)])
    expected_right = np.array([ids == one.answer for ids, one in zip(vanilla.ids, asked, strict=True)])
    same = np.array([ids == other for ids, other in zip(found.ids, vanilla.ids, strict=True)])
    expected, given = torch.stack(vanilla.first), torch.stack(found.first)
    divergence = (expected.exp() * (expected - given)).sum(-1).clamp(min=0).numpy()
    tasks = np.array([sample.task for sample in asked])
    pictures = np.isin(tasks, data.PICTURE_TASKS)

    def where(chosen: np.ndarray, values: np.ndarray) -> Any:
        return bootstrap(values[chosen].astype(float)) if chosen.any() else None

    def kept(chosen: np.ndarray) -> Any:
        """Accuracy over vanilla's."""
        if not chosen.any():
            return None
        return bootstrap_ratio(right[chosen].astype(float), expected_right[chosen].astype(float))

    after = torch.stack([report.straggler("after") for report in reports])  # [L, N]
    # Vanilla's own: before planning a layer has what the plans of those before it made of its input.
    before = torch.stack([report.straggler("before") for report in untouched])
    experts = torch.stack([report.imbalance("after") for report in reports])
    shares = [report.shares() for report in reports]
    return {
        "title": point.title,
        "setting": point.setting,
        "policy": point.policy,
        "random_weights": point.random_weights,
        "rerouted_weight": point.rerouted_weight,
        "settings": asdict(point.config),
        "batches": point.batches,
        "ranks": point.ranks,
        "accuracy": {task: where(tasks == task, right) for task in dict.fromkeys(tasks)},
        "picture_accuracy": where(pictures, right),
        "text_accuracy": where(~pictures, right),
        "picture_accuracy_kept": kept(pictures),
        "text_accuracy_kept": kept(~pictures),
        "vanilla_accuracy": {
            task: float(expected_right[tasks == task].mean()) for task in dict.fromkeys(tasks)
        },
        "picture_kl_each": [float(f"{value:.3g}") for value in divergence[pictures]],
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


def asked_points(arguments: argparse.Namespace) -> list[Point]:
    """The points that the command line asks for."""
    if arguments.chosen is None:
        named = grids(arguments.bounds)
        return [
            replace(one, batches=batches, ranks=ranks)
            for ranks in arguments.ranks
            for batches in arguments.batches
            for name in arguments.grid
            for one in named[name]
            if arguments.title is None or arguments.title in one.title
        ]
    return [
        replace(point_of(one), batches=batches)
        for ranks in arguments.ranks
        for batches in arguments.batches
        for bound in arguments.bounds
        for one in chosen_within(arguments, ranks, bound)
    ]


def chosen_within(arguments: argparse.Namespace, ranks: int, bound: float) -> list[dict[str, Any]]:
    """What was best in the file's mixed batches of the validation split, whatever it is measured on."""
    found = []
    for key, one in read_points(arguments.chosen).items():
        told = json.loads(key)
        own = told["split"], told["batches"], told["ranks"], told["model"]
        if own == ("validation", "mixed", ranks, str(arguments.checkpoint)):
            found.append((told["questions"], one))
    if not found:
        raise ValueError(
            f"--chosen {arguments.chosen}: found no points of {arguments.checkpoint} in mixed batches of the "
            f"validation split for {ranks} ranks"
        )
    most = max(questions for questions, _ in found)
    whole = [one for questions, one in found if questions == most]
    presets = [one for one in whole if one["title"] in PRESET_TITLES]
    best = best_within(whole, bound)
    return [one for title, one in best.items() if title not in PRESET_TITLES] + presets


def point_of(found: dict[str, Any]) -> Point:
    """The point that gave these figures."""
    config = MACSConfig(**found["settings"])
    own = (found[name] for name in ("batches", "ranks", "random_weights", "rerouted_weight"))
    return Point(found["title"], found["policy"], config, *own)


def run(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Measure the points that the file lacks; all points that were asked for."""
    points = list(dict.fromkeys(asked_points(arguments)))
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
    vanilla: dict[tuple[int, str], tuple[Answers, list[Any]]] = {}
    with Progress(*columns, console=console) as progress, arguments.out.open("a") as out:
        bar = progress.add_task("measuring", total=len(missing))
        for point in missing:
            progress.update(bar, description=f"{point.title}, {point.batches}, {point.ranks} ranks")
            if point.ranks not in benches:
                benches[point.ranks] = Bench(arguments, point.ranks)
            bench, kind = benches[point.ranks], (point.ranks, point.batches)
            if kind not in vanilla:
                stock = Point("vanilla", "vanilla", MACSConfig(), point.batches, point.ranks)
                vanilla[kind] = bench.ask(stock)
            batches = bench.batches(point.batches, arguments.split, arguments.seed)
            asked = [sample for batch in batches for sample in batch]
            answers, reports = bench.ask(point)
            found = measured(point, asked, (answers, reports), vanilla[kind])
            done[point.key(arguments)] = found
            out.write(json.dumps({"key": point.key(arguments), "found": found}) + "\n")
            out.flush()
            progress.advance(bar)
    return [done[point.key(arguments)] for point in points]


def measure_of(found: dict[str, Any]) -> list[float]:
    """What policies are compared by: KL over picture questions, or over all where there are none."""
    return found["picture_kl"] or found["kl"]


def best_within(found: list[dict[str, Any]], bound: float) -> dict[str, dict[str, Any]]:
    """By title: the point of least KL among those whose realised straggler keeps to the bound."""
    best: dict[str, dict[str, Any]] = {}
    for one in found:
        if one["straggler"] > bound:
            continue
        held = best.get(one["title"])
        if held is None or measure_of(one)[0] < measure_of(held)[0]:
            best[one["title"]] = one
    return best


def table_of(best: dict[str, dict[str, Any]], bound: float, caption: str) -> Table:
    """Every policy, by KL. One whose load here is beyond the bound is marked."""
    table = Table(title=f"busiest rank at most {bound:g} times the mean", caption=caption)
    names = ("", "set by", "rank", "KL x 1000", "95 %", "over macs", "95 %", "texts' KL", "same")
    for name in (*names, "pictures", "texts", "rerouted", "dropped"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    reference = best.get("macs", best.get("default"))
    for title, one in sorted(best.items(), key=lambda item: measure_of(item[1])[0]):
        kl, low, high = (1e3 * value for value in measure_of(one))
        over = ("", "")
        if reference is not None and reference is not one and any(reference["picture_kl_each"]):
            each = (np.array(found["picture_kl_each"]) for found in (one, reference))
            ratio = bootstrap_ratio(*each)
            over = f"{ratio[0]:.1f}", f"{ratio[1]:.1f}-{ratio[2]:.1f}"
        texts = one["text_kl"]
        kept = (one["picture_accuracy_kept"], one["text_accuracy_kept"])
        table.add_row(
            title,
            one["setting"],
            f"{one['straggler']:.3f}" + ("" if one["straggler"] <= bound else " !"),
            f"{kl:.2f}",
            f"{low:.2f}-{high:.2f}",
            *over,
            "" if texts is None else f"{1e3 * texts[0]:.2f}",
            f"{one['agreement'][0]:.4f}",
            *("" if value is None else f"{value[0]:.4f}" for value in kept),
            f"{one['rerouted']:.1%}",
            f"{one['dropped']:.1%}",
        )
    return table


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """KL against the realised straggler, a curve for each policy: the least at that load or a lower one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for title in dict.fromkeys(one["title"] for one in found):
        mine = sorted((one for one in found if one["title"] == title), key=lambda one: one["straggler"])
        curve: list[tuple[float, list[float]]] = []
        for one in mine:
            if not curve or measure_of(one)[0] < curve[-1][1][0]:
                curve.append((one["straggler"], measure_of(one)))
        x, kl = [load for load, _ in curve], np.maximum([value for _, value in curve], 1e-7)
        axes.plot(x, kl[:, 0], marker="o", markersize=3, label=title)
        axes.fill_between(x, kl[:, 1], kl[:, 2], alpha=0.15)
    before = float(np.mean([one["straggler_before"] for one in found]))
    axes.axvline(before, color="grey", linestyle=":", linewidth=1, label="vanilla's load")
    axes.set(xlabel="busiest rank's rows over vanilla's mean", ylabel="KL to vanilla (nats)", yscale="log")
    axes.legend(fontsize=8)
    save(figure, path)


def plot_layers(best: dict[str, dict[str, Any]], path: Path) -> None:
    """The busiest rank of every layer, under vanilla and under every policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    layers = np.arange(len(next(iter(best.values()))["layers"]))
    width = 0.8 / (len(best) + 1)
    before = [layer["before"] for layer in next(iter(best.values()))["layers"]]
    axes.bar(layers - 0.4, before, width, label="vanilla", color="grey", align="edge")
    for index, (title, one) in enumerate(best.items(), 1):
        after = [layer["after"] for layer in one["layers"]]
        axes.bar(layers - 0.4 + index * width, after, width, label=title, align="edge")
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set(xticks=layers, xlabel="layer", ylabel="busiest rank over the mean")
    axes.legend(fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Megatron in this one process, without a launcher, on a CPU, and without a word from it."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with cpu_engine(), processes(), torch.inference_mode():
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", nargs="+", choices=tuple(grids((1.05,))), default=["baselines", "presets"])
    parser.add_argument("--title", help="of a grid only the points whose titles have this in them")
    parser.add_argument(
        "--chosen", type=Path, help="instead of a grid: of the points in this file the best within each bound"
    )
    parser.add_argument("--batches", nargs="+", choices=tuple(MIXES), default=["mixed"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4], help="expert-parallel ranks planned for")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--questions", type=int, default=896)
    parser.add_argument("--batch", type=int, default=56, help="questions asked at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bounds", nargs="+", type=float, default=[1.05, 1.1])
    parser.add_argument("--checkpoint", type=Path, default=tiny.CHECKPOINT)
    parser.add_argument("--out", type=output_file, default=Path("runs") / "quality.jsonl")
    parser.add_argument("--plot", type=output_file, help="pictures of KL against load and of loads")
    arguments = parser.parse_args(given)
    if arguments.chosen is not None:
        if not arguments.chosen.exists():
            parser.error(f"--chosen: found no file {arguments.chosen}")
        if arguments.split == "validation":
            parser.error("--chosen: found --split validation, where they were chosen; expected test")
    if arguments.questions < arguments.batch:
        parser.error(
            f"--questions: found {arguments.questions}, expected a batch ({arguments.batch}) or more"
        )
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and show what was measured."""
    arguments, console = parse_arguments(given), Console()
    with measuring():
        found = run(arguments, console)
    for ranks in arguments.ranks:
        for batches in arguments.batches:
            chosen = [one for one in found if (one["ranks"], one["batches"]) == (ranks, batches)]
            caption = f"{batches} batches of {arguments.batch}, {ranks} ranks, {arguments.split} split, "
            caption += f"{arguments.questions} questions; 95 % intervals"
            for bound in arguments.bounds:
                best = shown(arguments, chosen, ranks, bound)
                console.print(table_of(best, bound, caption))
                if arguments.plot is not None and best:
                    stem = f"{arguments.plot.stem}-{batches}-{ranks}"
                    plot(chosen, arguments.plot.with_name(f"{stem}.png"))
                    plot_layers(best, arguments.plot.with_name(f"{stem}-layers-{bound:g}.png"))


def shown(
    arguments: argparse.Namespace, found: list[dict[str, Any]], ranks: int, bound: float
) -> dict[str, dict[str, Any]]:
    """The point of every title for a bound: the best within it, or, of points chosen elsewhere, the one that
    was chosen for it, come what may."""
    if arguments.chosen is None:
        return best_within(found, bound)
    settings = {one["title"]: one["settings"] for one in chosen_within(arguments, ranks, bound)}
    return {one["title"]: one for one in found if settings.get(one["title"]) == one["settings"]}


if __name__ == "__main__":
    main()
