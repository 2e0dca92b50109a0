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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from tiny_vlm import CHECKPOINT

from macs_tools.common.command import Parser

from .pages import FIGURES, MODELS, ROOT, write_pages

PICTURES = ROOT / "docs" / "pictures"
LIMITS = "1.05", "0.8", "0.6", "0.4", "0.25"
KINDS = "small", "pair", "read"


@dataclass(frozen=True)
class Run:
    """One evaluation of a model: its name in the figures, arguments, and profiles by name."""

    name: str
    model: str
    arguments: tuple[str, ...]
    profiles: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Arguments of examples/evaluate_tiny_vlm.py, but for profiles and files."""
        folder = CHECKPOINT if self.model == "main" else CHECKPOINT.parent / "others" / self.model
        own = () if self.model == "main" else ("--checkpoint", str(folder.relative_to(ROOT)))
        mixed = ("--batches", "easy-vqa") if self.model == "easy-vqa" else ()
        return [*self.arguments, *own, *(() if "--batches" in self.arguments else mixed)]


def runs() -> list[Run]:
    """All of them; a name is ``table/model``."""
    frontier = [
        Run(f"frontier/{model}", model, ("--split", "test", "--bounds", *LIMITS), (model, f"drop-{model}"))
        for model in MODELS
    ]
    settings = [
        Run(f"settings/{model}", model, ("--grid", "settings", "--bounds", "1.05", "0.6")) for model in MODELS
    ]
    few = ("--split", "test", "--questions", "448", "--bounds", "1.05", "0.6", "0.4", "--batches")
    titles = ("--title", "token-drop", "rank-balanced", "macs", "macs, tuned", "macs, compensated")
    kinds = [
        Run(f"kinds/{model}", model, (*titles, *few, "mixed", *KINDS), (f"kinds-{model}",))
        for model in ("main", "balanced", "unbalanced")
    ]
    texts = [
        Run(
            f"texts/{model}",
            model,
            ("--grid", "settings", "--title", "macs", "spare_text: true", *few, "texts"),
        )
        for model in ("main", "balanced")
    ]
    eight = ("--split", "test", "--ranks", "8", "--bounds", "1.05", "0.6", "0.4")
    ranks = [
        Run(f"8-ranks/{model}", model, eight, (f"{model}-8",) if model in ("main", "unbalanced") else ())
        for model in MODELS
    ]
    return [*frontier, *settings, *kinds, *texts, *ranks]


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
    kept = ("workload", "policy", "ratio", "ratio_spread", "ideal", "load_after", "dropped", "kept_mass")
    if layer:
        points = [{key: rounded(one[key]) for key in kept} for one in found["rows"]]
    else:
        points = [
            {"policy": title, "ms": rounded(one["ms"]), "layer_ms": rounded(found["layer_ms"])}
            for title, one in found["policies"].items()
        ]
    return {"command": f"macs bench {' '.join(command)}", "points": points}


def measured_rivals(model: str, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """MACS beside pruning and EPLB: the command and its rows, with times."""
    from . import rivals

    command = Run("", model, ()).command
    if model == "easy-vqa":
        command += ["--questions", "672"]
    tuning, out = arguments.profiles / f"{model}.safetensors", arguments.points / f"rivals-{model}.json"
    asked = rivals.parse_arguments([*command, "--tuning", str(tuning), "--json", str(out)])
    console.print(f"rivals/{model}")
    rows = rivals.compared(asked, console)
    rivals.plot(rows, PICTURES / f"rivals-{model}.png", f"{model}; answers of the tiny model, time predicted")
    kept = ("title", "method", "target", "keep", "kl", "same", "rows", "ratio", "with_eplb")
    points = [{key: rounded(one[key]) for key in kept} for one in rows]
    return {"command": "compare_pruning.py " + " ".join(command), "points": points}


def rounded(value: Any) -> Any:
    """Four digits of a number or of a list of them."""
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measured_run(run: Run, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Its command and its points."""
    from .report import plot
    from .run import measure, parse_arguments

    files = [str(arguments.profiles / f"{name}.safetensors") for name in run.profiles]
    tuning = ["--tuning", *files] if files else []
    out = arguments.points / f"{run.name.replace('/', '-')}.jsonl"
    console.print(run.name)
    found = measure(parse_arguments([*run.command, *tuning, "--out", str(out)]), console)
    if run.name.startswith("frontier"):
        plot(found, PICTURES / f"kl-{run.model}.png")
    return {"command": "evaluate_tiny_vlm.py " + " ".join(run.command), "points": found}


def origin() -> dict[str, str]:
    """What was measured, when, and where."""
    import torch
    import transformers

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()

    return {
        "commit": git("rev-parse", "--short", "HEAD"),
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
        named = {one.name: lambda one=one: measured_run(one, arguments, console) for one in runs()}
        named |= {
            f"rivals/{model}": lambda model=model: measured_rivals(model, arguments, console)
            for model in MODELS
        }
        named |= {name: lambda name=name: measured_bench(name, arguments) for name in BENCHES}
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
