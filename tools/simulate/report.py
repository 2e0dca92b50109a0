"""Tables and plots of the simulator."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..common.cost_model import CostModel, break_even
from ..common.workloads import VANILLA, Shape
from .layers import IDEAL


def _plot(path: Path, title: str, across: str, draw_on: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.6))
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    draw_on(axes)
    axes.set_xlabel(across)
    axes.set_title(textwrap.fill(title, 90), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_over(rows: Sequence[dict[str, Any]], key: str, path: Path, title: str, across: str) -> None:
    """Layer time over vanilla's at the first point, by policy."""

    def lines(axes: Any) -> None:
        for policy in dict.fromkeys(row["policy"] for row in rows):
            mine = [row for row in rows if row["policy"] == policy]
            bound = "replica" in policy or policy in (IDEAL, "least-loaded EP")
            axes.plot(
                [row[key] for row in mine],
                [row["ms"] for row in mine],
                marker="o",
                markersize=3,
                linestyle=":" if bound else "-",
                label=policy,
            )
        if key == "ranks":
            axes.set_xscale("log", base=2)
        axes.set_ylabel("MoE layer, ms")
        axes.set_ylim(bottom=0)

    _plot(path, title, across, lines)


def plot_quality(points: Path, shape: Shape, model: CostModel, path: Path) -> bool:
    """KL of the evaluation's points against the layer time that their busiest rank would have here."""
    found = [json.loads(line) for line in points.read_text().splitlines()]
    found = [one for one in found if one["found"]["batches"] == "mixed"]
    if not found:
        return False
    key = json.loads(found[0]["key"])["model"]
    ranks = max(one["found"]["ranks"] for one in found if json.loads(one["key"])["model"] == key)
    chosen = [
        one["found"]
        for one in found
        if json.loads(one["key"])["model"] == key and one["found"]["ranks"] == ranks
    ]

    planned = model.planning_ms("macs", shape.tokens) if model.planner_ms else 0.0

    def time_of(straggler: float, computed: float, planning: float = planned) -> float:
        """The busiest rank has ``straggler`` times vanilla's mean, the others what is left."""
        mean = shape.tokens * shape.top_k
        rest = max(0.0, (computed * ranks - straggler) / (ranks - 1))
        rows = np.array([straggler] + [rest] * (ranks - 1)) * mean
        local = shape.experts // ranks
        asked = np.repeat(rows / ranks / local, local)[None].repeat(ranks, 0)
        return model.layer(asked, planning).total

    def dots(axes: Any) -> None:
        for title in dict.fromkeys(one["title"] for one in chosen):
            mine = [one for one in chosen if one["title"] == title]
            times = [time_of(one["straggler"], 1 - one["dropped"]) for one in mine]
            axes.plot(times, [one["picture_kl"][0] * 1000 for one in mine], "o", label=title)
        axes.axvline(time_of(chosen[0]["load_before"], 1.0, 0.0), color="grey", linewidth=0.8, label=VANILLA)
        axes.set_ylabel("KL to vanilla over picture questions, x 1000")
        axes.set_yscale("log")

    _plot(path, f"Answers against time, {ranks} ranks", "MoE layer, ms", dots)
    return True


def show_break_even(shape: Shape, ranks: int, console: Console) -> None:
    """Tokens from which a plan pays, by the busiest rank without it."""
    table = Table(title=f"a plan pays from so many tokens a rank on, {ranks} ranks, an H100 as stated")
    for heading in ("busiest rank", "eager", "captured"):
        table.add_column(heading, justify="right")
    for straggler in (1.1, 1.2, 1.5, 2.0):
        found = (break_even(shape, ranks, straggler, replayed) for replayed in (False, True))
        table.add_row(f"{straggler:g}", *(str(one or "never") for one in found))
    console.print(table)


def show(rows: Sequence[dict[str, Any]], name: str, layers: int, model: CostModel, console: Console) -> None:
    table = Table(
        title=f"{name}, {rows[0]['ranks']} ranks",
        caption=f"Costs {model.origin}. Won back: of the time that vanilla takes beyond ideal balance of all "
        "its rows (who drops rows may win more). Captured: over vanilla where a CUDA graph replays the plan.",
        caption_justify="left",
    )
    headings: tuple[str, ...] = (
        "policy",
        "layer, ms",
        f"{layers} layers, ms",
        "/ vanilla",
        "captured",
        "won back",
        "busiest rank",
        "experts",
    )
    headings += ("exchange", "kept mass", "dropped mass", "extra MB", "moved MB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "policy" else "right")

    def told(row: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
        return form.format(row[key] * scale) if key in row else ""

    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['ms']:.3f}",
            f"{row['ms'] * layers:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['captured']:.3f}",
            told(row, "won_back", "{:.0%}"),
            f"{row['straggler']:.3f}",
            f"{row['experts']:.3f}",
            f"{row['exchange']:.3f}",
            told(row, "kept_mass", "{:.3f}"),
            told(row, "dropped_mass", "{:.3f}"),
            told(row, "extra_bytes", "{:.1f}", 1e-6),
            told(row, "moved_bytes", "{:.1f}", 1e-6),
        )
    console.print(table)
