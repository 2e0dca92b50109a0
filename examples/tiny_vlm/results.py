"""The figures of one policy on the tiny model, and the table of all."""

from __future__ import annotations

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from macs.adapters import summarized

from . import data

Results = dict[str, Any]
"""What one policy did: ``macs.METRICS``, accuracy by task, agreement with vanilla, KL from vanilla in nats
(none where an engine gives no log-probabilities), layer_ms on the slowest rank and time_ratio to vanilla."""


def summarize(
    asked: list[data.Sample],
    answers: list[list[int]],
    vanilla: list[list[int]],
    kl: list[float],
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

    return {
        **summarized(reports),
        "accuracy": accuracy,
        "agreement": statistics.mean(own == other for own, other in zip(answers, vanilla, strict=True)),
        "kl": statistics.mean(kl) if kl else None,
        "layer_ms": milliseconds,
        "time_ratio": milliseconds / vanilla_milliseconds,
    }


def results_table(results: dict[str, Results], further: dict[str, list[str]] | None = None) -> Table:
    """One row a policy; ``further`` columns by heading, a cell for each policy."""
    values = list(results.values())
    columns = {"load": [f"{one['load_after']:.2f}" for one in values]}
    if all(one["kl"] is not None for one in values):
        columns["KL x 1000"] = [f"{1e3 * one['kl']:.2g}" for one in values]
    columns["same"] = [f"{one['agreement']:.3f}" for one in values]
    for name, tasks in (("pictures", data.PICTURE_TASKS), ("texts", data.TEXT_TASKS)):
        if set(tasks) <= set(values[0]["accuracy"]):
            means = [statistics.mean(one["accuracy"][task] for task in tasks) for one in values]
            columns[name] = [f"{one:.3f}" for one in means]
    columns["dropped"] = [f"{one['dropped']:.0%}" for one in values]
    columns |= further or {}
    columns["ms"] = [f"{one['layer_ms']:.1f}" for one in values]
    columns["time"] = [f"{one['time_ratio']:.2f}" for one in values]
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("policy", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for title, cells in zip(results, zip(*columns.values(), strict=True), strict=True):
        table.add_row(title.replace("-", " "), *cells)
    return table
