"""Tables and plots of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from macs_tools.common.intervals import bootstrap_ratio

from .statistics import best_baseline, least_load, measure_of


def table_of(best: dict[str, dict[str, Any]], bound: float, caption: str) -> Table:
    """Every policy, by KL. One whose load here is beyond the bound is marked."""
    table = Table(title=f"load at most {bound:g}", caption=caption)
    names = ("", "set by", "rank", "KL x 1000", "95 %", "over macs", "95 %", "texts' KL", "same")
    for name in (*names, "pictures", "texts", "rerouted", "dropped"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    reference = best.get("macs", best.get("default"))
    for title, one in sorted(best.items(), key=lambda item: measure_of(item[1])[0]):
        kl, low, high = (1e3 * value for value in measure_of(one))
        over = ("", "")
        if reference is not None and reference is not one and any(reference["picture_kl_each"]):
            each = (np.array(found["picture_kl_each"]) for found in (one, reference))
            ratio = bootstrap_ratio(*each)
            over = f"{ratio[0]:.1f}", f"{ratio[1]:.1f}-{ratio[2]:.1f}"
        texts = one["text_kl"]
        kept = (one["picture_accuracy_kept"], one["text_accuracy_kept"])
        table.add_row(
            title,
            one["setting"],
            f"{one['load']:.3f}" + ("" if one["load"] <= bound else " !"),
            f"{kl:.2f}",
            f"{low:.2f}-{high:.2f}",
            *over,
            "" if texts is None else f"{1e3 * texts[0]:.2f}",
            f"{one['agreement'][0]:.4f}",
            *("" if value is None else f"{value[0]:.4f}" for value in kept),
            f"{one['rerouted']:.1%}",
            f"{one['dropped']:.1%}",
        )
    return table


def frontier_of(found: list[dict[str, Any]], bound: float, caption: str) -> Table:
    """KL over all questions by policy and target, and the least load at which each policy costs no more than
    the best baseline does at ``bound``."""
    by_target = [one for one in found if one["settings"]["capacity_factor"] is None]
    targets = sorted({one["settings"]["target_load"] for one in by_target}, reverse=True)
    known = best_baseline(found, bound)
    table = Table(title="KL x 1000 to vanilla by target, over all questions", caption=caption)
    for name in ("", *(f"{target:g}" for target in targets), "load at equal KL"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for title in dict.fromkeys(one["title"] for one in by_target):
        mine = {one["settings"]["target_load"]: one for one in by_target if one["title"] == title}
        cells = [f"{1e3 * mine[one]['kl'][0]:.3g}" if one in mine else "" for one in targets]
        load = None if known is None else least_load(found, title, known["kl"][0])
        table.add_row(title, *cells, "" if load is None else f"{load:.2f}")
    if known is not None:
        table.caption = (
            f"{caption}; load at equal KL: the least measured with at most {1e3 * known['kl'][0]:.3g}, that "
            f"of the best baseline within {bound:g} ({known['title']}, {known['setting']})"
        )
    return table


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """KL against the realised load, a curve for each policy: the least at that load or a lower one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for title in dict.fromkeys(one["title"] for one in found):
        mine = sorted((one for one in found if one["title"] == title), key=lambda one: one["load"])
        curve: list[tuple[float, list[float]]] = []
        for one in mine:
            if not curve or measure_of(one)[0] < curve[-1][1][0]:
                curve.append((one["load"], measure_of(one)))
        x, kl = [load for load, _ in curve], np.maximum([value for _, value in curve], 1e-7)
        axes.plot(x, kl[:, 0], marker="o", markersize=3, label=title)
        axes.fill_between(x, kl[:, 1], kl[:, 2], alpha=0.15)
    before = float(np.mean([one["load_before"] for one in found]))
    axes.axvline(before, color="grey", linestyle=":", linewidth=1, label="vanilla's load")
    axes.set(xlabel="load", ylabel="KL to vanilla (nats)", yscale="log")
    axes.legend(fontsize=8)
    save(figure, path)


def plot_layers(best: dict[str, dict[str, Any]], path: Path) -> None:
    """The load of every layer, under vanilla and under every policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    layers = np.arange(len(next(iter(best.values()))["layers"]))
    width = 0.8 / (len(best) + 1)
    before = [layer["before"] for layer in next(iter(best.values()))["layers"]]
    axes.bar(layers - 0.4, before, width, label="vanilla", color="grey", align="edge")
    for index, (title, one) in enumerate(best.items(), 1):
        after = [layer["after"] for layer in one["layers"]]
        axes.bar(layers - 0.4 + index * width, after, width, label=title, align="edge")
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set(xticks=layers, xlabel="layer", ylabel="load")
    axes.legend(fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
