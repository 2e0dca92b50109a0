"""What a bounded step costs in answers: policies and settings on the tiny model's held-out questions.

    python examples/evaluate_tiny_vlm.py --grid baselines presets --ranks 4 8     # validation split
    python examples/evaluate_tiny_vlm.py --chosen runs/quality.jsonl --split test --questions 3584

Every point is a run of the Hugging Face model with ``macs.attach_plain``, in one process whose layers plan
as several expert-parallel ranks would. For each: accuracy by task, agreement with vanilla and KL to it at all
tokens of the answer that vanilla gives, kept, rerouted and dropped, and loads of ranks and experts, with
bootstrap intervals of 95 %. Points go to a file of JSON lines as they are done, and are not done twice.

An equal capacity factor is not an equal load. The table compares policies at a bound on the *realised*
load: the largest rank's rows over vanilla's mean, after planning, mean over layers and batches.
Within it each policy is shown at its best setting; ``--chosen`` measures on another split what was
best on the split of a file, and nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tiny_vlm import CHECKPOINT
from tiny_vlm.kinds import MIXES

from macs import MACSConfig
from macs_tools.common.command import Parser, output_file

from .points import PRESET_TITLES, Point, grids, profiles_of, tuned_points
from .report import frontier_of, plot, plot_layers, table_of
from .statistics import best_within, measured


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
        points = [
            replace(one, batches=batches, ranks=ranks)
            for ranks in arguments.ranks
            for batches in arguments.batches
            for name in arguments.grid
            for one in named[name]
        ]
        points += tuned_points(points, profiles_of(arguments.tuning))
        wanted = arguments.title
        return [one for one in points if wanted is None or any(title in one.title for title in wanted)]
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
    return Point(found["title"], found["policy"], config, found["batches"], found["ranks"])


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
    from .model import Bench
    from .statistics import Answers

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
                vanilla[kind] = bench.ask(stock, None)
            asked = [sample for batch in bench.batches(point.batches) for sample in batch]
            answers, reports = bench.ask(point, vanilla[kind][0])
            found = measured(point, asked, (answers, reports), vanilla[kind])
            done[point.key(arguments)] = found
            out.write(json.dumps({"key": point.key(arguments), "found": found}) + "\n")
            out.flush()
            progress.advance(bar)
    return [done[point.key(arguments)] for point in points]


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("evaluate_tiny_vlm.py", __doc__)
    parser.add_argument("--grid", nargs="+", choices=tuple(grids((1.05,))), default=["baselines", "presets"])
    parser.add_argument("--title", nargs="+", help="of a grid only the points whose titles have one of these")
    parser.add_argument(
        "--chosen", type=Path, help="instead of a grid: of the points in this file the best within each bound"
    )
    parser.add_argument("--batches", nargs="+", choices=tuple(MIXES), default=["mixed"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4], help="expert-parallel ranks planned for")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--questions", type=int, default=896)
    parser.add_argument("--batch", type=int, default=56, help="questions asked at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tuning", nargs="+", type=Path, default=[], help="profiles of `macs tune`: their splits as well"
    )
    parser.add_argument("--bounds", nargs="+", type=float, default=[1.05, 1.1])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=output_file, default=Path("runs") / "quality.jsonl")
    parser.add_argument("--plot", type=output_file, help="pictures of KL against load and of loads")
    arguments = parser.parse_args(given)
    if arguments.chosen is not None:
        if not arguments.chosen.exists():
            parser.error(f"--chosen: found no file {arguments.chosen}")
        if arguments.split == "validation":
            parser.error("--chosen: found --split validation, where they were chosen; expected test")
    if arguments.tuning:
        if arguments.chosen is not None:
            parser.error("--tuning: found --chosen, expected --grid")
        try:
            tuned = profiles_of(arguments.tuning)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        for policy, ranks in tuned:
            if ranks not in arguments.ranks:
                parser.error(f"--tuning: found one of {policy} for {ranks} ranks, expected --ranks {ranks}")
    if arguments.questions < arguments.batch:
        parser.error(
            f"--questions: found {arguments.questions}, expected a batch ({arguments.batch}) or more"
        )
    return arguments


def shown(
    arguments: argparse.Namespace, found: list[dict[str, Any]], ranks: int, bound: float
) -> dict[str, dict[str, Any]]:
    """The point of every title for a bound: the best within it, or, of points chosen elsewhere, the one that
    was chosen for it, come what may."""
    if arguments.chosen is None:
        return best_within(found, bound)
    settings = {one["title"]: one["settings"] for one in chosen_within(arguments, ranks, bound)}
    return {one["title"]: one for one in found if settings.get(one["title"]) == one["settings"]}


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and show what was measured."""
    arguments, console = parse_arguments(given), Console()
    from .model import measuring

    with measuring():
        found = run(arguments, console)
    for ranks in arguments.ranks:
        for batches in arguments.batches:
            chosen = [one for one in found if (one["ranks"], one["batches"]) == (ranks, batches)]
            caption = f"{batches} batches of {arguments.batch}, {ranks} ranks, {arguments.split} split, "
            caption += f"{arguments.questions} questions; 95 % intervals"
            if "bounded" in arguments.grid and arguments.chosen is None:
                console.print(frontier_of(chosen, 1.05, caption))
            for bound in arguments.bounds:
                best = shown(arguments, chosen, ranks, bound)
                console.print(table_of(best, bound, caption))
                if arguments.plot is not None and best:
                    stem = f"{arguments.plot.stem}-{batches}-{ranks}"
                    plot(chosen, arguments.plot.with_name(f"{stem}.png"))
                    plot_layers(best, arguments.plot.with_name(f"{stem}-layers-{bound:g}.png"))
