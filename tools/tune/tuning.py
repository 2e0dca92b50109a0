"""A tuning: every target's split, as measured, on any model that can score answers."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from macs import Profile, Tuning
from macs.records.tuning import settings_of
from macs.runtime.launch import first_process

from ..common.intervals import bootstrap, bootstrap_ratio
from .compensation import fit_compensation
from .model import Scorer
from .search import GRID, Measured, cap_of, objective, refined, singles, split_by

TARGETS = (1.05, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


class MeasurementCache:
    """Measurements by what was measured, in a file of JSON lines; a repeated one costs nothing."""

    def __init__(self, model: Scorer, path: Path, about: str, tell: Callable[[], None]) -> None:
        self.model, self.path, self.about, self.tell = model, path, about, tell
        self.found: dict[str, Any] = {}
        self.writes = first_process()
        if self.writes and path.exists():
            lines = (json.loads(line) for line in path.read_text().splitlines() if line)
            self.found = {one["key"]: one for one in lines}
        if model.group is not None:  # every rank measures, or none
            cache = [self.found]
            dist.broadcast_object_list(cache, group=model.group, group_src=0)
            self.found = cache[0]

    def measure(self, half: str, bounds: Sequence[float], compensation: str = "none") -> Measured:
        """Of a half under the layers' bounds and a setting of compensation."""
        key = json.dumps([self.about, half, [round(float(one), 6) for one in bounds], compensation])
        if key not in self.found:
            one = self.model.measure(half, bounds, compensation)
            self.found[key] = {
                "key": key,
                "loads": one.loads.tolist(),
                "kl": one.kl.tolist(),
                "same": one.same.tolist(),
            }
            if self.writes:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.found[key]) + "\n")
        self.tell()
        one = self.found[key]
        return Measured(*(np.array(one[name]) for name in ("loads", "kl", "same")))


def split_for(
    target: float,
    curves: Callable[[str], Any],
    cache: MeasurementCache,
    tries: int,
    compensations: Sequence[str],
) -> dict[str, Any]:
    """The best bounds and compensation for a target, and what they do on the half that verifies.

    Candidates are one limit for all layers and their split, without compensation and with the one that is
    best under one limit, in the order of their KL on the half that tunes. Used is the first that the half
    that verifies confirms to be better than one limit without compensation, beyond the 95 % interval; that
    itself where it comes first, or none is confirmed.
    curves: the layers' ``singles`` under a compensation.
    """
    even = [target] * cache.model.groups
    plain = cache.measure("verify", even, "none")
    on_tuning = {one: cache.measure("tune", even, one) for one in compensations}
    cap = cap_of(on_tuning["none"])
    best = min(compensations, key=lambda one: objective(on_tuning[one], cap))
    candidates: list[tuple[float, list[float], str]] = []
    for mode in dict.fromkeys(("none", best)):
        uniform = on_tuning[mode]
        start = split_by(curves(mode), float(uniform.loads.mean()))
        measure = functools.partial(cache.measure, "tune", compensation=mode)
        split, held = refined(measure, start, cap_of(uniform), tries)
        candidates += [(objective(uniform, cap), even, mode), (objective(held, cap), split, mode)]
    candidates.sort(key=lambda one: one[0])
    used, bounds, mode, ratio = plain, even, "none", (1.0, 1.0, 1.0)
    for _, other, compensation in candidates:
        if (other, compensation) == (even, "none"):
            break
        found = cache.measure("verify", other, compensation)
        against = bootstrap_ratio(found.kl, plain.kl)
        if against[2] < 1 and float(found.loads.mean()) <= float(plain.loads.mean()) + 0.01:
            used, bounds, mode, ratio = found, other, compensation, against
            break
    return {
        "target": target,
        "plain": plain,
        "used": used,
        "ratio": ratio,
        "bounds": bounds,
        "compensation": mode,
        "kl": bootstrap(used.kl),
    }


def tune(
    model: Scorer,
    out: Path,
    *,
    targets: Sequence[float] = TARGETS,
    tries: int = 24,
    rank: int | None = None,
    about: str = "",
    console: Console | None = None,
) -> tuple[Profile, list[dict[str, Any]]]:
    """Measure the model and split every target's load among its layers.

    Every rank of the model's group makes the same call.

    Args:
        model: what is tuned, with its requests.
        out: the file that the profile is to go to; what was measured is kept beside it, by the first process.
        targets: loads, means over layers.
        tries: moves of load between two layers that are measured for each target.
        rank: of the estimates that compensate; none: dropped assignments leave nothing.
        about: what tells this run from others that are kept in the same place.
        console: where to say how far it is; none says nothing.

    Returns:
        The profile with its tuning, which the caller saves, and of every target what was measured.
    """
    console = console or Console(quiet=True)
    model.modality = model.profile()
    if rank is not None:
        model.modality = replace(model.modality, compensation=fit_compensation(model, rank))
    compensations = ("none",) if rank is None else ("none", "visual", "all")
    natural = model.natural()
    # Of a target without compensation and with the best one.
    each = min(2, len(compensations)) * (tries + 3) + len(compensations)
    most = len(compensations) * len(natural) * len(GRID) + len(targets) * each
    passes = len(model.halves["tune"])
    console.print(
        f"{len(natural)} {'layers' if model.share == 1 else 'groups of layers'}; "
        f"at most {most} measurements of {passes} forward passes each; "
        f"load by layer {', '.join(f'{one:.2f}' for one in natural)}"
    )
    columns = (TextColumn("{task.description} {task.completed}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("measuring", total=most)
        done = itertools.count(1)

        def tell() -> None:
            progress.advance(bar)
            number = next(done)
            if not console.is_terminal and number % max(1, most // 10) == 0:  # a file shows no bar
                console.print(f"{number} of at most {most} measurements")

        about = about if rank is None else f"{about}, rank {rank}"
        cache = MeasurementCache(model, out.with_suffix(".measured.jsonl"), about, tell)

        @functools.cache
        def curves(compensation: str) -> Any:
            return singles(lambda bounds: cache.measure("tune", bounds, compensation), natural)

        found = [
            split_for(target, curves, cache, tries, compensations) for target in sorted(targets, reverse=True)
        ]
        progress.update(bar, completed=most)
    return replace(model.modality, tuning=tuning_of(found, model)), found


def tuning_of(found: Sequence[dict[str, Any]], model: Scorer) -> Tuning:
    """What a profile keeps of the splits."""
    bounds = np.repeat(np.array([one["bounds"] for one in found]), model.share, axis=1)
    return Tuning(
        target_loads=torch.tensor([one["target"] for one in found], dtype=torch.float64),
        layer_loads=torch.tensor(bounds, dtype=torch.float64),
        kl=torch.tensor([one["kl"] for one in found], dtype=torch.float64),
        compensation=[one["compensation"] for one in found],
        policy=model.policy,
        settings=settings_of(model.config, model.policy),
        ranks=model.ranks,
        tokens=model.tokens,
        requests=model.requests("verify"),
    )
