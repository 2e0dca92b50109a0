"""Tables and plots of the simulator."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common.cost_model import CostModel, break_even
from ..common.workloads import Shape
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


def show_break_even(shape: Shape, ranks: int, console: Console) -> None:
    """Tokens from which a plan pays, by the busiest rank without it."""
    table = Table(title=f"a plan pays from so many tokens a rank on, {ranks} ranks, an H100 as stated")
    for heading in ("busiest rank", "eager", "captured"):
        table.add_column(heading, justify="right")
    for load in (1.1, 1.2, 1.5, 2.0):
        found = (break_even(shape, ranks, load, replayed) for replayed in (False, True))
        table.add_row(f"{load:g}", *(str(one or "never") for one in found))
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
            f"{row['load']:.3f}",
            f"{row['experts']:.3f}",
            f"{row['exchange']:.3f}",
            told(row, "kept_mass", "{:.3f}"),
            told(row, "dropped_mass", "{:.3f}"),
            told(row, "extra_bytes", "{:.1f}", 1e-6),
            told(row, "moved_bytes", "{:.1f}", 1e-6),
        )
    console.print(table)
