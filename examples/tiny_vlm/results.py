"""The figures of one policy on the tiny model, and the table of all."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from macs import METRICS
from macs.adapters import summarized

from . import data


@dataclass
class Results:
    """What one policy did. Times are milliseconds a layer, on the slowest rank."""

    accuracy: dict[str, float]
    agreement: float
    loads: dict[str, float]  # ``macs.METRICS``
    layer_ms: float
    time_ratio: float

    def as_dict(self) -> dict[str, Any]:
        """As it is written to a file."""
        told = asdict(self)
        return {**told.pop("loads"), **told}


def summarize(
    asked: list[data.Sample],
    answers: list[list[int]],
    vanilla: list[list[int]],
    reports: list,
    milliseconds: float,
    vanilla_milliseconds: float,
) -> Results:
    """The figures of one policy: means over samples, or over layers and batches of prompts."""
    accuracy = {}
    for task in data.TASKS:
        hits = [answer == s.answer for s, answer in zip(asked, answers, strict=True) if s.task == task]
        if hits:
            accuracy[task] = statistics.mean(hits)

    return Results(
        accuracy=accuracy,
        agreement=statistics.mean(own == other for own, other in zip(answers, vanilla, strict=True)),
        loads=summarized(reports),
        layer_ms=milliseconds,
        time_ratio=milliseconds / vanilla_milliseconds,
    )


def results_table(
    results: dict[str, Results], caption: str, further: dict[str, list[str]] | None = None
) -> Table:
    """One column a policy, one row a figure."""
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for title in results:
        short = title.replace("expanded", "exp.").replace("balanced", "bal.")
        table.add_column(short.replace("-", " "), justify="right")

    def row(name: str, cells: list[str], end: bool = False) -> None:
        table.add_row(name, *cells, end_section=end)

    values = list(results.values())
    for task in values[0].accuracy:
        row(f"{task}, accuracy", [f"{one.accuracy[task]:.3f}" for one in values])
    for name, tasks in (("pictures", data.PICTURE_TASKS), ("texts", data.TEXT_TASKS)):
        if set(tasks) <= set(values[0].accuracy):
            means = [statistics.mean(one.accuracy[task] for task in tasks) for one in values]
            row(f"mean of {name}", [f"{one:.3f}" for one in means])
    row("same answer as vanilla", [f"{one.agreement:.3f}" for one in values], end=True)
    for name, metric in METRICS.items():
        last = name == list(METRICS)[-1]
        row(metric.title, [format(one.loads[name], metric.form) for one in values], end=last)
    row("MoE layer, ms", [f"{one.layer_ms:.1f}" for one in values])
    row("time / vanilla", [f"{one.time_ratio:.2f}" for one in values])
    for name, cells in (further or {}).items():
        row(name, cells)
    return table
