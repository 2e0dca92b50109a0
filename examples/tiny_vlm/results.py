"""The figures of one policy on the tiny model, and the table of all."""

from __future__ import annotations

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from macs_tools.common.table import table

from . import data

Results = dict[str, Any]
"""What one policy did: ``macs.METRICS``, accuracy by task, agreement with vanilla, KL from vanilla in nats
(none where an engine gives no log-probabilities), layer_ms on the slowest rank and time_ratio to vanilla."""


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
    titles = [title.replace("-", " ") for title in results]
    return table(
        ["policy", *columns], zip(titles, *columns.values(), strict=True), box=SIMPLE_HEAD, padding=0
    )
