"""The pictures of a report, by matplotlib."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.workloads import VANILLA
from .prediction import Prediction
from .simulation import moves_weights
from .traffic import PERCENTILES, Traffic


@dataclass(frozen=True)
class Figure:
    """title; caption: what it shows; data: the picture as a data URI."""

    title: str
    caption: str
    data: str


def _drawn(title: str, caption: str, draw: Callable[[Any, Any], None], columns: int = 1) -> Figure:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(9, 4), squeeze=False, layout="constrained")
    draw(figure, axes[0])
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    data = base64.b64encode(picture.getvalue()).decode()
    return Figure(title, caption, f"data:image/png;base64,{data}")


def _lines(
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

    def draw(_: Any, axes: Any) -> None:
        for name, values in series.items():
            style = ":" if name in dotted else "-"
            axes[0].plot(values_x, values, style, marker="." if len(values_x) < 60 else "", label=name)
        axes[0].set(xlabel=label, ylabel=y_label, ylim=(0, None))
        axes[0].legend(fontsize=8)
        if log:
            axes[0].set_xscale("log", base=2)

    return _drawn(title, caption, draw)


def _maps(title: str, caption: str, x_label: str, maps: dict[str, np.ndarray]) -> Figure:
    """Heat maps beside one another, [L, columns] each, on one scale from 0, which is safe for the
    colour-blind and in print."""
    most = max(float(np.quantile(one, 0.999)) for one in maps.values())

    def draw(figure: Any, axes: Any) -> None:
        for one, (label, values) in zip(axes, maps.items(), strict=True):
            shown = one.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=most)
            one.set(xlabel=f"{x_label} ({label})", ylabel="layer")
        figure.colorbar(shown, ax=axes)

    return _drawn(title, caption, draw, len(maps))


def figures(traffic: Traffic, prediction: Prediction) -> list[Figure]:
    """All pictures of a page, in order."""
    share = traffic.loads / np.maximum(traffic.loads.sum(2, keepdims=True), 1) * traffic.experts
    by_rank = traffic.by_rank / np.maximum(traffic.by_rank.mean(1, keepdims=True), 1)
    percentiles = traffic.percentiles()
    first, mean, most = traffic.over_time()
    maps = {
        name: share[number] for number, name in enumerate(("text", "visual")) if traffic.loads[number].any()
    }
    found = [
        _maps(
            "Assignments by expert",
            "Assignments of each expert over the mean expert's of its layer and modality: 1 is even.",
            "expert",
            maps,
        ),
        _maps(
            f"Rows of each of {traffic.ranks} ranks",
            "Rows of each rank over the mean rank's, all steps together: what stays from step to step.",
            "rank",
            {"all tokens": by_rank},
        ),
        _lines(
            "Load by layer",
            "Rows of a step's largest rank over the mean rank's: percentiles over steps.",
            ("layer", list(range(traffic.layers))),
            "load",
            {f"p{which}": percentiles[index].tolist() for index, which in enumerate(PERCENTILES)},
        ),
        _lines(
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
