"""A report in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from ..common.table import table
from .advice import Advice
from .prediction import Prediction

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "ms": ("layer, ms", "{:.3f}".format),
    "ratio": ("time / vanilla", "{:.3f}".format),
    "load": ("load", "{:.3f}".format),
    "kept_mass": ("kept mass", "{:.3f}".format),
    "dropped_mass": ("dropped mass", "{:.3f}".format),
    "extra_bytes": ("extra MB", lambda value: f"{value / 1e6:.1f}"),
}
"""Of a prediction's row, in the terminal and on the page: heading and form."""

LEGEND = (
    "Load: rows of the largest rank over the mean of the router's choice. Mass: combine weight "
    "that stays where the router put it, or is dropped."
)


def cells(row: dict[str, Any]) -> list[str]:
    """A prediction's row as text, empty where it has no such figure."""
    return [form(row[key]) if key in row else "" for key, (_, form) in COLUMNS.items()]


def show(prediction: Prediction, advice: Advice, console: Console) -> None:
    heads = ["policy", *(heading for heading, _ in COLUMNS.values())]
    for size in prediction.sizes:
        rows = ([row["policy"], *cells(row)] for row in prediction.rows if row["ranks"] == size)
        console.print(table(heads, rows, title=f"{size} ranks"))
    console.print(f"{LEGEND} Costs: {prediction.model.origin}.")
    for one in (*advice.reasons, *advice.against):
        console.print(f"- {one}", markup=False)
    for title, line in advice.commands:
        console.print(f"{title}: {line}", markup=False)
    console.print(f"[bold]{advice.verdict}[/bold]")
