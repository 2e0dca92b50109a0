"""What a limit on the load costs in answers: policies and settings on the tiny model's held-out questions.

Every point is a run of the Hugging Face model with ``macs.attach_plain``, in one process whose layers plan
as several expert-parallel ranks would. For each: agreement with vanilla, KL to it at all tokens of the answer
that vanilla gives, with bootstrap intervals of 95 %, and realised loads. Points go to a file of JSON lines as
they are done, and are not done twice.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from .points import Point, grids, profiles_of, tuned_points

if TYPE_CHECKING:
    from .results import Run


def read_points(path: Path) -> dict[str, dict[str, Any]]:
    """What a file of JSON lines holds, by key."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {line["key"]: line["found"] for line in lines}


def asked_points(run: Run) -> list[Point]:
    """The points of a run."""
    points = [
        replace(one, batches=batches, ranks=run.ranks)
        for batches in run.batches
        for one in grids(run.bounds)[run.grid]
    ]
    profiles = profiles_of(run.tuning)
    for policy, ranks in profiles:
        if ranks != run.ranks:
            raise ValueError(
                f"{run.name}: found a tuning of {policy} for {ranks} ranks, expected {run.ranks}"
            )
    points += tuned_points(points, profiles)
    return list(dict.fromkeys(one for one in points if not run.titles or one.title in run.titles))


def measure(run: Run, path: Path, console: Console) -> list[dict[str, Any]]:
    """Measure the points that the file lacks; all points of the run."""
    points = asked_points(run)
    done = read_points(path)
    missing = [point for point in points if point.key(run) not in done]
    console.print(f"{len(points)} points, {len(points) - len(missing)} of them in {path} already")
    path.parent.mkdir(parents=True, exist_ok=True)
    from .model import scoring
    from .statistics import measured, vanilla_of

    profiles, kinds = profiles_of(run.tuning), dict.fromkeys(point.batches for point in missing)
    with Progress(console=console) as progress, path.open("a") as out:
        bar = progress.add_task("measuring", total=len(missing))
        for kind in kinds:
            with scoring(run, kind) as scorer:
                vanilla = vanilla_of(scorer)
                for point in missing:
                    if point.batches != kind:
                        continue
                    progress.update(bar, description=f"{point.title}, {kind}, {point.ranks} ranks")
                    found = done[point.key(run)] = measured(point, scorer, profiles, vanilla)
                    out.write(json.dumps({"key": point.key(run), "found": found}) + "\n")
                    out.flush()
                    progress.advance(bar)
    return [done[point.key(run)] for point in points]
