"""What a limit on the load costs in answers: policies and settings on the tiny model's held-out questions.

    python examples/evaluate_tiny_vlm.py                          # every policy, validation split
    python examples/evaluate_tiny_vlm.py --grid settings          # every setting
    python examples/evaluate_tiny_vlm.py --split test --tuning examples/tiny_vlm/tuning-4-ranks.safetensors

Every point is a run of the Hugging Face model with ``macs.attach_plain``, in one process whose layers plan
as several expert-parallel ranks would. For each: agreement with vanilla, KL to it at all tokens of the answer
that vanilla gives, with bootstrap intervals of 95 %, and realised loads. Points go to a file of JSON lines as
they are done, and are not done twice. ``examples/results.py`` runs all of docs/results.md.
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

from .points import Point, grids, profiles_of, tuned_points
from .report import frontier_of, plot

LIMITS = 1.05, 0.8, 0.6, 0.4
GRIDS = "frontier", "settings"


def read_points(path: Path) -> dict[str, dict[str, Any]]:
    """What a file of JSON lines holds, by key."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {line["key"]: line["found"] for line in lines}


def asked_points(arguments: argparse.Namespace) -> list[Point]:
    """The points that the command line asks for."""
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
    return list(dict.fromkeys(one for one in points if wanted is None or one.title in wanted))


def measure(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Measure the points that the file lacks; all points that were asked for."""
    points = asked_points(arguments)
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
    from .model import Bench, measuring
    from .statistics import Answers, measured

    benches: dict[int, Bench] = {}
    vanilla: dict[tuple[int, str], tuple[Answers, list[Any]]] = {}
    with measuring(), Progress(*columns, console=console) as progress, arguments.out.open("a") as out:
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
            found = measured(point, asked, bench.ask(point, vanilla[kind][0]), vanilla[kind])
            done[point.key(arguments)] = found
            out.write(json.dumps({"key": point.key(arguments), "found": found}) + "\n")
            out.flush()
            progress.advance(bar)
    return [done[point.key(arguments)] for point in points]


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("evaluate_tiny_vlm.py", __doc__)
    parser.add_argument("--grid", nargs="+", choices=GRIDS, default=["frontier"])
    parser.add_argument("--title", nargs="+", help="only the points with one of these titles")
    parser.add_argument("--batches", nargs="+", choices=tuple(MIXES), default=["mixed"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4], help="expert-parallel ranks planned for")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--questions", type=int, default=896)
    parser.add_argument("--batch", type=int, default=56, help="questions asked at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tuning", nargs="+", type=Path, default=[], help="profiles of `macs tune`: tuned points as well"
    )
    parser.add_argument("--bounds", nargs="+", type=float, default=list(LIMITS), help="target loads")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=output_file, default=Path("runs") / "quality.jsonl")
    parser.add_argument("--plot", type=output_file, help="pictures of KL against load")
    arguments = parser.parse_args(given)
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
    if not asked_points(arguments):
        parser.error(f"--title: found {', '.join(arguments.title)}, expected a title of --grid")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and show what was measured."""
    arguments, console = parse_arguments(given), Console()
    found = measure(arguments, console)
    for ranks in arguments.ranks:
        for batches in arguments.batches:
            chosen = [one for one in found if (one["ranks"], one["batches"]) == (ranks, batches)]
            caption = f"{batches} batches of {arguments.batch}, {ranks} ranks, {arguments.split} split, "
            console.print(frontier_of(chosen, 1.05, f"{caption}{arguments.questions} questions"))
            if arguments.plot is not None:
                plot(chosen, arguments.plot.with_name(f"{arguments.plot.stem}-{batches}-{ranks}.png"))
