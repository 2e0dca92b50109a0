"""Profiles of every batch, and how stable what they say is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from macs import Profile, Runtime

AGREEMENT = 0.95
"""Two halves that class this share of the experts alike are a profile."""


def counted(runtime: Runtime, engine: Any, batches: Sequence[list[Any]], console: Console) -> list[Profile]:
    """A profile of every batch, over all processes."""
    found = []
    for batch in track(batches, "calibrating", console=console, transient=True):
        with runtime.calibration():
            engine.generate(batch, tokens=1)
        found.append(runtime.measured_profile(dist.group.WORLD))
    return found


@dataclass(frozen=True)
class Stability:
    """Two profiles of so many requests each, on disjoint ones: the share of experts that both class
    alike, and the mean difference of their visual preference q, by layer [L]."""

    requests: int
    alike: torch.Tensor
    difference: torch.Tensor


def stability(profiles: Sequence[Profile], requests: int, threshold: float) -> list[Stability]:
    """Halves of even and odd batches against each other, of 1, 2, 4, ... batches and of all of them.

    ``requests``: in a batch, over all processes.
    """
    even, odd = profiles[::2], profiles[1::2]
    most = min(len(even), len(odd))
    sizes = [2**n for n in range(most.bit_length()) if 2**n < most]
    found = []
    for size in [*sizes, most]:
        one, other = Profile.merged(even[:size]), Profile.merged(odd[:size])
        alike = (one.bias(threshold) == other.bias(threshold)).double().mean(1)
        apart = (one.visual_preference() - other.visual_preference()).abs().mean(1)
        found.append(Stability(size * requests, alike, apart))
    return found


def enough(found: Sequence[Stability]) -> int | None:
    """Requests from which on two profiles class ``AGREEMENT`` of the experts alike; none if never."""
    answer = None
    for one in reversed(found):
        if float(one.alike.mean()) < AGREEMENT:
            break
        answer = one.requests
    return answer


def bias_table(profile: Profile, threshold: float, halves: Stability) -> Table:
    """Every layer's experts by modality bias."""
    table = Table(
        title="experts by modality bias",
        caption="q: 1 serves visual tokens alone, 0 text alone; alike, apart: experts that two halves of "
        "the requests class alike, and their mean difference of q",
    )
    for name in ("layer", "visual", "both", "text", "most visual", "least visual", "alike", "apart"):
        table.add_column(name, justify="right", no_wrap=True)
    bias, preference = profile.bias(threshold), profile.visual_preference()
    for layer in range(profile.num_layers):
        counts = [int((bias[layer] == sign).sum()) for sign in (1.0, 0.0, -1.0)]
        most, least = int(preference[layer].argmax()), int(preference[layer].argmin())
        table.add_row(
            str(layer),
            *(str(count) for count in counts),
            f"{most}: {preference[layer, most]:.2f}",
            f"{least}: {preference[layer, least]:.2f}",
            f"{halves.alike[layer]:.0%}",
            f"{halves.difference[layer]:.3f}",
        )
    return table


def plot(profile: Profile, threshold: float, path: Path) -> None:
    """Visual preference q of every layer's experts, in order, with the thresholds of a bias."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    preference = profile.visual_preference().sort(1).values
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for layer in range(profile.num_layers):
        axes.plot(range(profile.num_experts), preference[layer].tolist(), marker=".", label=f"layer {layer}")
    for bound in (0.5 - threshold, 0.5 + threshold):
        axes.axhline(bound, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="experts of the layer, in order", ylabel="visual preference q", ylim=(0, 1))
    if profile.num_layers <= 12:
        axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check(profile: Profile, runtime: Runtime) -> None:
    """Raise a ``ValueError`` if a profile is of another model."""
    for layer in runtime.layers:
        profile.row_of(layer.adapter.router_weight(), layer.top_k)
