"""The table and the picture of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from .statistics import best_baseline, least_load


def frontier_of(found: list[dict[str, Any]], bound: float, caption: str) -> Table:
    """KL by policy and target, and the least load at which each policy costs no more than the best baseline
    does at ``bound``."""
    targets = sorted({one["target"] for one in found}, reverse=True)
    known = best_baseline(found, bound)
    table = Table(title="KL x 1000 to vanilla, by target load", caption=caption)
    for name in ("", *(f"{target:g}" for target in targets), "load at equal KL"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for title in dict.fromkeys(one["title"] for one in found):
        mine = {one["target"]: one for one in found if one["title"] == title}
        cells = [f"{1e3 * mine[one]['kl'][0]:.3g}" if one in mine else "" for one in targets]
        load = None if known is None else least_load(found, title, known["kl"][0])
        table.add_row(title, *cells, "" if load is None else f"{load:.2f}")
    if known is not None:
        table.caption = (
            f"{caption}; load at equal KL: the least measured with at most {1e3 * known['kl'][0]:.3g}, that "
            f"of {known['title']} at {known['target']:g}"
        )
    return table


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """KL against the realised load, a curve for each policy, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
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
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
