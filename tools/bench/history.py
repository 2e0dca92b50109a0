"""This commit's figures, as a row of docs/benchmarks.csv: exact counts, and times as ratios.

    macs bench history                   # add a row
    macs bench history --show            # print what it would be

launches: of a plan on a GPU under the defaults and the paper's settings;
operators: of a plan on a CPU; plan_over_router: a plan's time over that of the router's softmax and top-k on
the same scores, T 4096, E 64, k 4, one thread, medians in turn.
"""

from __future__ import annotations

import csv
import datetime
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from macs import __version__

from ..common.clock import milliseconds
from ..common.clone import ROOT
from ..common.command import Parser, quiet
from ..common.launches import PLANS
from .compare import SHAPES, Operators, drawn, planned
from .report import processor

PAGE = ROOT / "docs" / "benchmarks.csv"
SETTINGS = ("defaults", "paper")
TURNS = 15


def row() -> dict[str, str]:
    """The figures, by column."""
    import macs

    told = ["git", "describe", "--always", "--dirty"]
    gpu = torch.cuda.is_available()
    commit = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    found = {
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "commit": commit,
        "machine": torch.cuda.get_device_name() if gpu else processor(),
        "torch": torch.__version__,
    }
    for name in SETTINGS:
        # Held by a test to what is counted.
        found[f"launches_{name}"] = str(PLANS[name])
    inputs = drawn(SHAPES[1])
    works = {name: planned(macs, name, SHAPES[1], inputs) for name in SETTINGS}
    logits = inputs[3].log()
    works["router"] = lambda: logits.softmax(1).topk(SHAPES[1][3], 1)
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(TURNS + 2):
        for name, work in works.items():
            took = milliseconds(work)
            if turn > 1:
                spent[name].append(took)
    for name in SETTINGS:
        with Operators() as operators:
            works[name]()
        found[f"operators_{name}"] = str(operators.count)
        ratios = [mine / other for mine, other in zip(spent[name], spent["router"], strict=True)]
        found[f"plan_over_router_{name}"] = f"{statistics.median(ratios):.2f}"
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and add the row."""
    parser = Parser("macs bench history", __doc__)
    parser.add_argument("--show", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, default=PAGE)
    arguments = parser.parse_args(given)
    quiet(1)
    with torch.inference_mode():
        found = row()
    print("\n".join(f"{name:28}{value}" for name, value in found.items()))
    if arguments.show:
        return
    new = not arguments.out.exists()
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(found))
        if new:
            writer.writeheader()
        writer.writerow(found)
