"""Measure everything on docs/results.md, and write its tables.

    python examples/results.py --profiles runs/profiles     # measures what is missing, writes figures, pages
    python examples/results.py --pages                      # writes the pages from docs/results.json alone

``--profiles`` is the folder of the tunings, a file for each run that names one; docs/results.md has the
commands that make them. A run that was stopped goes on; measured points are kept in ``--points``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from tiny_vlm import CHECKPOINT

from macs_tools.common.command import Parser

from .pages import FIGURES, MODELS, ROOT, write_pages
from .picture import picture

PICTURES = ROOT / "docs" / "pictures"
KINDS = "small", "pair", "read"


@dataclass(frozen=True)
class Run:
    """One evaluation of a model: its name in the figures, ``table/model``, the points of a grid to measure,
    on which questions, and profiles of `macs tune` by name."""

    name: str
    grid: str = "frontier"
    titles: tuple[str, ...] = ()  # only the points with one of these
    batches: tuple[str, ...] = ("mixed",)
    bounds: tuple[float, ...] = (1.05, 0.8, 0.6, 0.4, 0.25)
    profiles: tuple[str, ...] = ()
    ranks: int = 4
    split: str = "test"
    questions: int = 896
    batch: int = 56
    seed: int = 0
    tuning: tuple[Path, ...] = ()
    """The profiles' files."""

    @property
    def model(self) -> str:
        return self.name.split("/")[1]

    @property
    def checkpoint(self) -> Path:
        return CHECKPOINT if self.model == "main" else CHECKPOINT.parent / "others" / self.model


def runs() -> list[Run]:
    """All of them."""
    few: dict[str, Any] = {"questions": 448, "bounds": (1.05, 0.6, 0.4)}
    some = "token-drop", "rank-balanced", "macs", "macs, tuned", "macs, compensated"
    texts = {"grid": "settings", "titles": ("macs", "spare_text: true"), "batches": ("texts",), **few}
    eight = {model: (f"{model}-8",) for model in ("main", "unbalanced")}
    found = [Run(f"frontier/{model}", profiles=(model, f"drop-{model}")) for model in MODELS]
    found += [
        Run(f"settings/{model}", "settings", bounds=(1.05, 0.6), split="validation") for model in MODELS
    ]
    found += [
        Run(f"kinds/{model}", titles=some, batches=("mixed", *KINDS), profiles=(f"kinds-{model}",), **few)
        for model in ("main", "balanced", "unbalanced")
    ]
    found += [Run(f"texts/{model}", **texts) for model in ("main", "balanced")]
    found += [
        Run(f"8-ranks/{model}", ranks=8, bounds=(1.05, 0.6, 0.4), profiles=eight.get(model, ()))
        for model in MODELS
    ]
    # That model knows one kind of question.
    return [replace(one, batches=("easy-vqa",)) if one.model == "easy-vqa" else one for one in found]


BENCHES = {
    "bench/layer": "layer --workloads image-flood hot-rank --steps 1 --repeats 30 --ladder 0.5 --policies",
    "bench/planner": "planner --tokens 4096 --threads 1 --repeats 15 --policies",
    "bench/planner-tiny": "planner --shape tiny-vlm --ranks 2 --threads 1 --repeats 15 --policies",
}
"""Arguments of ``macs bench``, before its policies."""


def measured_bench(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The command, and a point for each policy."""
    layer = name == "bench/layer"
    policies = [
        "token drop",
        *(("rank-balanced", "macs", "macs, nothing over") if layer else ("macs", "paper")),
    ]
    command = [*BENCHES[name].split(), *policies]
    out = arguments.points / f"{name.replace('/', '-')}.json"
    if not out.exists():
        asked = [sys.executable, "-m", "macs_tools", "bench", *command, "--json", str(out)]
        subprocess.run(asked, check=True)
    found = json.loads(out.read_text().splitlines()[-1])
    if layer:
        keys = "workload policy ratio ratio_spread ideal load_after dropped kept_mass".split()
        points = kept(found["rows"], keys)
    else:
        rows = [{**one, "policy": title} for title, one in found["policies"].items()]
        points = kept([{**one, "layer_ms": found["layer_ms"]} for one in rows], ["policy", "ms", "layer_ms"])
    return {"command": f"macs bench {' '.join(command)}", "points": points}


def measured_rivals(model: str, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """MACS beside pruning and EPLB: the command and its rows, with times."""
    from . import rivals

    checkpoint = Run(f"rivals/{model}").checkpoint
    command = [] if model == "main" else ["--checkpoint", str(checkpoint.relative_to(ROOT))]
    command += ["--batches", "easy-vqa", "--questions", "672"] if model == "easy-vqa" else []
    tuning, out = arguments.profiles / f"{model}.safetensors", arguments.points / f"rivals-{model}.json"
    asked = rivals.parse_arguments([*command, "--tuning", str(tuning), "--json", str(out)])
    console.print(f"rivals/{model}")
    rows = rivals.compared(asked, console)
    rivals.plot(rows, PICTURES / f"rivals-{model}.png", f"{model}; answers of the tiny model, time predicted")
    points = kept(rows, "title method target keep kl same rows ratio with_eplb".split())
    return {"command": "compare_pruning.py " + " ".join(command), "points": points}


def kept(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Some figures of every row, rounded."""
    return [{key: rounded(one[key]) for key in keys} for one in rows]


def rounded(value: Any) -> Any:
    """Four digits of a number or of a list of them."""
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measured_run(run: Run, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Its command and its points."""
    from .run import measure

    tuning = tuple(arguments.profiles / f"{name}.safetensors" for name in run.profiles)
    console.print(run.name)
    found = measure(
        replace(run, tuning=tuning), arguments.points / f"{run.name.replace('/', '-')}.jsonl", console
    )
    if run.name.startswith("frontier"):
        plot(found, PICTURES / f"kl-{run.model}.png")
    return {"command": f"results.py --only {run.name}", "points": found}


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """KL against the realised load, a curve for each policy, with 95 % intervals."""
    with picture(path, figsize=(7, 4.5)) as axes:
        for title in dict.fromkeys(one["title"] for one in found):
            mine = sorted((one for one in found if one["title"] == title), key=lambda one: one["load"])
            kl = [[max(value, 1e-7) for value in one["kl"]] for one in mine]
            mean, low, high = zip(*kl, strict=True)
            loads = [one["load"] for one in mine]
            axes.plot(loads, mean, marker="o", markersize=3, label=title)
            axes.fill_between(loads, low, high, alpha=0.15)
        loads = found[0]["vanilla_loads"]
        axes.axvline(sum(loads) / len(loads), color="grey", linestyle=":", label="vanilla's load")
        axes.set(xlabel="load", ylabel="KL to vanilla (nats)", yscale="log")
        axes.legend(fontsize=8)


def origin() -> dict[str, str]:
    """What was measured, when, and where."""
    import torch
    import transformers

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    return {
        "commit": commit.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write figures and pages."""
    parser = Parser("results.py", __doc__)
    parser.add_argument("--profiles", type=Path, default=Path("runs") / "profiles")
    parser.add_argument("--points", type=Path, default=Path("runs") / "results")
    parser.add_argument("--only", nargs="+", help="runs whose names begin with one of these; others are kept")
    parser.add_argument("--pages", action="store_true", help="measure nothing")
    arguments, console = parser.parse_args(given), Console()
    if not arguments.pages:
        figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"runs": {}}
        arguments.points.mkdir(parents=True, exist_ok=True)
        named = {one.name: partial(measured_run, one, arguments, console) for one in runs()}
        named |= {f"rivals/{one}": partial(measured_rivals, one, arguments, console) for one in MODELS}
        named |= {name: partial(measured_bench, name, arguments) for name in BENCHES}
        for name, measured in named.items():
            if not arguments.only or name.startswith(tuple(arguments.only)):
                figures["runs"][name] = {**origin(), **measured()}
                FIGURES.write_text(dumped(figures))
    write_pages()


def dumped(figures: dict[str, Any]) -> str:
    """JSON with a line for each point, so that a change of a point is a line of a diff."""
    runs = []
    for name, run in sorted(figures["runs"].items()):
        points = ",\n".join("   " + json.dumps(one) for one in run["points"])
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(run[key])}" for key in run if key != "points")
        runs.append(f'  {json.dumps(name)}: {{{head}, "points": [\n{points}\n  ]}}')
    return '{\n "runs": {\n' + ",\n".join(runs) + "\n }\n}\n"
