"""Predictions beside measurements of ``macs bench layer`` and ``virtual-ep``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..common.cost_model import CostModel
from ..common.workloads import LADDER, WORKLOADS, Shape, contenders, loosened
from .layers import simulate, synthetic


def check(path: Path, console: Console) -> list[dict[str, Any]]:
    """Predicted beside measured layer times, for every result of layer and virtual-ep in a file; the rows are
    planned anew, and the costs are those of calls that no workload made."""
    found = []
    for line in path.read_text().splitlines():
        result = json.loads(line)
        if result["mode"] not in ("layer", "virtual-ep"):
            continue
        arguments, shape = result["arguments"], Shape(**result["shape"])
        ranks, model = arguments["ranks"], CostModel(**result["cost_model"])
        known = contenders(arguments["straggler"])
        measured = [row for row in result["rows"] if "failed" not in row and row["workload"] in WORKLOADS]
        titles = list(dict.fromkeys(row["policy"] for row in measured))
        known |= dict(
            loosened(title, known[title], bound) for title in LADDER for bound in arguments["ladder"]
        )
        chosen = {title: known[title] for title in titles}
        for workload in track(
            dict.fromkeys(row["workload"] for row in measured), result["mode"], console=console
        ):
            batch_of = synthetic(workload, shape, ranks, arguments["seed"])
            predicted = simulate(
                shape,
                ranks,
                batch_of,
                chosen,
                model,
                arguments["steps"],
                bounds=False,
                seed=arguments["seed"],
            )
            by_title = {row["policy"]: row for row in predicted}
            for row in measured:
                if row["workload"] == workload:
                    guess = by_title[row["policy"]]
                    # Of virtual-ep what was measured: the rest of it is this very model.
                    virtual = result["mode"] == "virtual-ep"
                    told = row["measured_ms"] if virtual else row["ms"]
                    expected = guess["experts"] + guess["planner"] if virtual else guess["ms"]
                    # As slow as the machine was then, by calls that no workload makes.
                    expected *= result.get("slowness", {}).get(workload, 1.0)
                    found.append(
                        {
                            "mode": result["mode"],
                            "ranks": ranks,
                            "workload": workload,
                            "policy": row["policy"],
                            "measured": told,
                            "predicted": expected,
                            "error": expected / told - 1,
                            "ratio_error": None if virtual else guess["ratio"] / row["ratio"] - 1,
                        }
                    )
    if not found:
        raise ValueError(f"--check {path}: found no result of layer or virtual-ep with a known workload")
    table = Table(
        caption="Predicted over measured time, less one: of the layer; in virtual-ep of experts and planner.",
        caption_justify="left",
    )
    headings = ("mode", "ranks", "workload", "median", "largest", "of")
    for heading in (*headings, "over vanilla: median", "largest", "of"):
        table.add_column(heading, justify="left" if heading in ("mode", "workload", "of") else "right")
    for key in dict.fromkeys((one["mode"], one["ranks"], one["workload"]) for one in found):
        mine = [one for one in found if (one["mode"], one["ranks"], one["workload"]) == key]
        cells = []
        for name in ("error", "ratio_error"):
            told = [one for one in mine if one[name] is not None]
            if told:
                worst = max(told, key=lambda one: abs(one[name]))
                middle = np.median([abs(one[name]) for one in told])
                cells += [f"{middle:.1%}", f"{worst[name]:+.1%}", worst["policy"]]
        table.add_row(key[0], str(key[1]), key[2], *cells)
    console.print(table)
    for mode, ranks in dict.fromkeys((one["mode"], one["ranks"]) for one in found):
        for name, what in (("error", "times"), ("ratio_error", "times over vanilla's")):
            mine = [one for one in found if (one["mode"], one["ranks"]) == (mode, ranks)]
            errors = np.array([abs(one[name]) for one in mine if one[name] is not None])
            if len(errors):
                low, high = np.percentile(errors, (50, 95))
                console.print(
                    f"{mode}, {ranks} ranks: {len(errors)} {what}, {np.mean(errors <= 0.15):.0%} within "
                    f"15 %; median {low:.1%}, 95th percentile {high:.1%}, largest {errors.max():.1%}"
                )
    return found
