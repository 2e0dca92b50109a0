"""The figures of a report, as plotly draws them, each with its table for readers without scripts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.workloads import VANILLA
from .prediction import Prediction
from .simulation import moves_weights
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
"""Text and lines have a contrast of at least 4.5 to 1 to their paper; a test checks it."""

SCALE = "Cividis"
"""Of heat maps: safe for the colour-blind, and in print."""


@dataclass(frozen=True)
class Figure:
    """name: in links; caption: what it shows; plot: traces and layout of plotly, with ``meta`` the index of a
    theme's line colour; table: headings and rows; in_table: what the table holds."""

    name: str
    title: str
    caption: str
    plot: dict[str, Any]
    table: tuple[list[str], list[list[str]]]
    in_table: str = "The table below has the figures."

    @property
    def data(self) -> str:
        """The plot as JSON that may stand in a page."""
        return json.dumps(self.plot, separators=(",", ":")).replace("</", "<\\/")


def _lines(
    name: str,
    title: str,
    caption: str,
    x: tuple[str, list[Any]],
    y_label: str,
    series: dict[str, list[float]],
    dotted: tuple[str, ...] = (),
    log: bool = False,
) -> Figure:
    """Lines over one axis; x: its label and values."""
    label, values_x = x
    few = len(values_x) < 60
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if few else "lines",
            "name": one,
            "x": values_x,
            "y": [round(float(value), 4) for value in values],
            "line": {"dash": "dot" if one in dotted else "solid"},
            "meta": number,
        }
        for number, (one, values) in enumerate(series.items())
    ]
    axis: dict[str, Any] = {"title": {"text": label}}
    if log:
        axis |= {"type": "log", "tickvals": values_x}
    elif few:
        axis |= {"tickvals": values_x[:: _tick(len(values_x))]}
    layout = {"xaxis": axis, "yaxis": {"title": {"text": y_label}, "rangemode": "tozero"}}
    rows = [
        [str(value), *(f"{values[index]:.3f}" for values in series.values())]
        for index, value in enumerate(values_x)
    ]
    return Figure(name, title, caption, {"data": traces, "layout": layout}, ([label, *series], rows))


def _tick(count: int) -> int:
    """Values from one tick to the next, for at most 12 ticks."""
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if count <= 12 * step)


def _maps(name: str, title: str, caption: str, x_label: str, maps: dict[str, np.ndarray]) -> Figure:
    """Heat maps beside one another, [L, columns] each, on one scale from 0."""
    most = min(max(float(np.quantile(one, 0.999)) for one in maps.values()), max(map(np.max, maps.values())))
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
                "colorscale": SCALE,
                "showscale": number == count,
                "hovertemplate": f"layer %{{y}}, {x_label} %{{x}}: %{{z:.2f}}<extra>{label}</extra>",
            }
        )
        begin = (number - 1) * (width + gap)
        layout[f"xaxis{suffix}"] = {
            "dtick": _tick(values.shape[1]),
            "title": {"text": f"{x_label} ({label})"},
            "domain": [begin, begin + width],
            "anchor": f"y{suffix}",
        }
        layout[f"yaxis{suffix}"] = {
            "dtick": _tick(len(values)),
            "title": {"text": "layer" if number == 1 else ""},
            "autorange": "reversed",
            "anchor": f"x{suffix}",
        }
    headings = ["layer"]
    for label in maps:
        headings += [f"most ({label})", f"{x_label} ({label})"]
    rows = [
        [str(layer)] + [text for values in maps.values() for text in _largest(values[layer])]
        for layer in range(len(next(iter(maps.values()))))
    ]
    in_table = "The table below has the largest value of each layer and its place."
    return Figure(name, title, caption, {"data": traces, "layout": layout}, (headings, rows), in_table)


def _largest(values: np.ndarray) -> tuple[str, str]:
    return f"{values.max():.2f}", str(int(values.argmax()))


def figures(traffic: Traffic, prediction: Prediction) -> list[Figure]:
    """All figures of a page, in order."""
    share = traffic.loads / np.maximum(traffic.loads.sum(2, keepdims=True), 1) * traffic.experts
    by_rank = traffic.by_rank / np.maximum(traffic.by_rank.mean(1, keepdims=True), 1)
    percentiles = traffic.percentiles()
    first, mean, most = traffic.over_time()
    maps = {
        name: share[number] for number, name in enumerate(("text", "visual")) if traffic.loads[number].any()
    }
    found = [
        _maps(
            "experts",
            "Assignments by expert",
            "Assignments of each expert over the mean expert's of its layer and modality: 1 is even.",
            "expert",
            maps,
        ),
        _maps(
            "ranks",
            f"Rows of each of {traffic.ranks} ranks",
            "Rows of each rank over the mean rank's, all steps together: what stays from step to step.",
            "rank",
            {"all tokens": by_rank},
        ),
        _lines(
            "layers",
            "Load by layer",
            "Rows of a step's largest rank over the mean rank's: percentiles over steps.",
            ("layer", list(range(traffic.layers))),
            "load",
            {f"p{which}": percentiles[index].tolist() for index, which in enumerate(PERCENTILES)},
        ),
        _lines(
            "time",
            "Load over time",
            "The same over the recorded steps: mean and worst of all layers.",
            ("step", first.tolist()),
            "load",
            {"mean of layers": mean.tolist(), "worst layer": most.tolist()},
        ),
    ]
    if prediction.explained:
        found.append(
            _lines(
                "explained",
                "What compensation explains",
                "Share of a layer's squared routed output that the profile's estimates explain, on requests "
                "that they were not fitted on: 1 is all.",
                ("layer", list(range(len(prediction.explained["text"])))),
                "share",
                prediction.explained,
            )
        )
    if len(prediction.sizes) > 1:
        series = {
            policy: [prediction.of(size, policy)["ratio"] for size in prediction.sizes]
            for policy in prediction.policies
            if policy != VANILLA
        }
        found.append(
            _lines(
                "sizes",
                "Predicted time of a MoE layer",
                "Over vanilla's on as many ranks. Dotted: balancers that move weights instead of tokens.",
                ("expert-parallel ranks", prediction.sizes),
                "time / vanilla",
                series,
                tuple(filter(moves_weights, series)),
                True,
            )
        )
    return found
