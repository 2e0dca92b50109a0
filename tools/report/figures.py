"""The figures of a report: each as data for plotly, and as pictures for who reads it without scripts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.workloads import VANILLA
from ..simulate.layers import IDEAL
from .prediction import Prediction
from .traffic import PERCENTILES, Traffic

THEMES: dict[str, dict[str, Any]] = {
    "light": {
        "ink": "#1c1e21",
        "paper": "#ffffff",
        "grid": "#d4d7dc",
        "lines": ["#0b5cad", "#b04a00", "#167343", "#7b3fa0", "#a8174f", "#5a5f66", "#86650a", "#1f7a8c"],
    },
    "dark": {
        "ink": "#e8eaed",
        "paper": "#16181c",
        "grid": "#3c4148",
        "lines": ["#6cb6ff", "#ffb26b", "#6fd39a", "#cda6ee", "#ff8fb4", "#b9bfc7", "#e3c35c", "#6fd6e6"],
    },
}
"""Every colour of text and lines stands out from its paper by 4.5 to 1 or more; a test says so."""

SCALE = "cividis"
"""Of heat maps: read by the colour-blind, and in print."""


@dataclass(frozen=True)
class Figure:
    """name: in links; title; what it shows, in words; plot: what plotly draws, with ``line`` the number of a
    theme's colour in each trace; pictures: PNG by theme, base64; table: headings and rows, and what is in
    it."""

    name: str
    title: str
    said: str
    plot: dict[str, Any]
    pictures: dict[str, str]
    table: tuple[list[str], list[list[str]]]
    in_table: str = "The table below has the figures."

    @property
    def data(self) -> str:
        """The plot as JSON that may stand in a page."""
        return json.dumps(self.plot, separators=(",", ":")).replace("</", "<\\/")


def pictures(draw: Callable[[Any, list[str]], None], height: float = 3.6) -> dict[str, str]:
    """Draw on the axes of a figure, in the lines' colours, once for each theme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {}
    for name, theme in THEMES.items():
        style = {
            "text.color": theme["ink"],
            "axes.labelcolor": theme["ink"],
            "axes.edgecolor": theme["grid"],
            "xtick.color": theme["ink"],
            "ytick.color": theme["ink"],
            "figure.facecolor": theme["paper"],
            "axes.facecolor": theme["paper"],
            "savefig.facecolor": theme["paper"],
            "legend.facecolor": theme["paper"],
            "legend.edgecolor": theme["grid"],
            "grid.color": theme["grid"],
        }
        with pyplot.rc_context(style):
            figure = pyplot.figure(figsize=(9, height), layout="constrained")
            draw(figure, theme["lines"])
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=100)
            pyplot.close(figure)
        found[name] = base64.b64encode(file.getvalue()).decode()
    return found


def _lines(
    name: str,
    title: str,
    said: str,
    across: tuple[str, list[Any]],
    up: str,
    series: dict[str, list[float]],
    dashed: tuple[str, ...] = (),
    log: bool = False,
) -> Figure:
    """Lines over one axis."""
    label, source_index = across
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(source_index) < 60 else "lines",
            "name": title_,
            "x": source_index,
            "y": [round(float(value), 4) for value in values],
            "line": {"dash": "dot" if title_ in dashed else "solid"},
            "meta": number,
        }
        for number, (title_, values) in enumerate(series.items())
    ]
    whole = len(source_index) < 60 and not log
    layout = {
        "xaxis": {
            "title": {"text": label},
            **({"type": "log", "tickvals": source_index} if log else {}),
            **({"tickvals": source_index[:: _tick(len(source_index))]} if whole else {}),
        },
        "yaxis": {"title": {"text": up}, "rangemode": "tozero"},
    }

    def draw(figure: Any, colours: list[str]) -> None:
        axes = figure.subplots()
        for number, (title_, values) in enumerate(series.items()):
            style = {"linestyle": ":" if title_ in dashed else "-", "color": colours[number % len(colours)]}
            marker = "o" if len(source_index) < 60 else None
            axes.plot(source_index, values, marker=marker, markersize=3, label=title_, **style)
        axes.set_xlabel(label)
        axes.set_ylabel(up)
        axes.set_ylim(bottom=0)
        if whole:
            axes.set_xticks(source_index[:: _tick(len(source_index))])
        if log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(source_index, [str(one) for one in source_index])
        axes.grid(alpha=0.6)
        figure.legend(loc="outside right upper", fontsize=8)

    rows = [
        [str(place), *(f"{values[at]:.3f}" for values in series.values())]
        for at, place in enumerate(source_index)
    ]
    return Figure(
        name, title, said, {"data": traces, "layout": layout}, pictures(draw), ([label, *series], rows)
    )


def _tick(count: int) -> int:
    """Of so many source_index, which are marked: each so-manyth."""
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if count <= 12 * step)


def _maps(
    name: str,
    title: str,
    said: str,
    across: str,
    maps: dict[str, np.ndarray],
    most: float,
) -> Figure:
    """Heat maps beside one another, [L, columns] each, of one scale from 0 to ``most``."""
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {}
    count, gap = len(maps), 0.06
    width = (1 - gap * (count - 1)) / count
    for number, (label, values) in enumerate(maps.items(), 1):
        suffix = "" if number == 1 else str(number)
        traces.append(
            {
                "type": "heatmap",
                "z": np.round(values, 3).tolist(),
                "name": label,
                "xaxis": f"x{suffix}",
                "yaxis": f"y{suffix}",
                "zmin": 0,
                "zmax": round(most, 3),
                "colorscale": SCALE.capitalize(),
                "showscale": number == count,
                "hovertemplate": f"layer %{{y}}, {across} %{{x}}: %{{z:.2f}}<extra>{label}</extra>",
            }
        )
        begin = (number - 1) * (width + gap)
        for axis, many in (("xaxis", values.shape[1]), ("yaxis", len(values))):
            layout.setdefault(f"{axis}{suffix}", {})["dtick"] = _tick(many)
        layout[f"xaxis{suffix}"] |= {
            "title": {"text": f"{across} ({label})"},
            "domain": [begin, begin + width],
            "anchor": f"y{suffix}",
        }
        layout[f"yaxis{suffix}"] |= {
            "title": {"text": "layer" if number == 1 else ""},
            "autorange": "reversed",
            "anchor": f"x{suffix}",
        }

    def draw(figure: Any, colours: list[str]) -> None:
        for axes, (label, values) in zip(
            np.atleast_1d(figure.subplots(1, count, sharey=True)), maps.items(), strict=True
        ):
            axes.set_xticks(range(0, values.shape[1], _tick(values.shape[1])))
            axes.set_yticks(range(0, len(values), _tick(len(values))))
            image = axes.imshow(values, aspect="auto", cmap=SCALE, vmin=0, vmax=most, interpolation="nearest")
            axes.set_xlabel(f"{across} ({label})")
        figure.axes[0].set_ylabel("layer")
        figure.colorbar(image, ax=figure.axes, shrink=0.9)

    rows = []
    for layer in range(len(next(iter(maps.values())))):
        row = [str(layer)]
        for values in maps.values():
            row += [f"{values[layer].max():.2f}", str(int(values[layer].argmax()))]
        rows.append(row)
    headings = ["layer"]
    for label in maps:
        headings += [f"most ({label})", f"{across} ({label})"]
    plot = {"data": traces, "layout": layout}
    in_table = "The table below has the most of each layer, and where it is."
    return Figure(name, title, said, plot, pictures(draw), (headings, rows), in_table)


def figures(traffic: Traffic, prediction: Prediction) -> list[Figure]:
    """All figures of a page, in order."""
    share = traffic.loads / np.maximum(traffic.loads.sum(2, keepdims=True), 1) * traffic.experts
    by_rank = traffic.by_rank / np.maximum(traffic.by_rank.mean(1, keepdims=True), 1)
    percentiles = traffic.percentiles()
    first, mean, most = traffic.over_time()
    maps = {
        kind: share[number] for number, kind in enumerate(("text", "visual")) if traffic.loads[number].any()
    }
    top = min(max(float(np.quantile(one, 0.999)) for one in maps.values()), float(share.max()))
    found = [
        _maps(
            "experts",
            "Which experts serve what",
            "Assignments of each expert over the mean expert's of its layer and modality: 1 is even.",
            "expert",
            maps,
            top,
        ),
        _maps(
            "ranks",
            f"Load of each of {traffic.ranks} ranks",
            "Rows of each rank over the mean rank's, all steps together: what stays from step to step.",
            "rank",
            {"all tokens": by_rank},
            float(by_rank.max()),
        ),
        _lines(
            "layers",
            "Busiest rank, by layer",
            "Rows of a step's busiest rank over the mean rank's: the median step, and the worse ones.",
            ("layer", list(range(traffic.layers))),
            "busiest rank / mean",
            {f"p{which}": percentiles[at].tolist() for at, which in enumerate(PERCENTILES)},
        ),
        _lines(
            "time",
            "Busiest rank, over time",
            "The same over the recorded steps: mean and worst of all layers.",
            ("step", first.tolist()),
            "busiest rank / mean",
            {"mean of layers": mean.tolist(), "worst layer": most.tolist()},
        ),
    ]
    if len(prediction.sizes) > 1:
        series = {
            policy: [prediction.of(size, policy)["ratio"] for size in prediction.sizes]
            for policy in prediction.policies
            if policy != VANILLA
        }
        bounds = tuple(one for one in series if "replica" in one or one in (IDEAL, "least-loaded EP"))
        found.append(
            _lines(
                "sizes",
                "Predicted time of a MoE layer",
                "Over vanilla's on as many ranks. Dotted: balancers that move weights instead of tokens.",
                ("expert-parallel ranks", prediction.sizes),
                "time / vanilla",
                series,
                bounds,
                True,
            )
        )
    return found
