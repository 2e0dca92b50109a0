"""The table of ``macs bench planner``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from macs.planner import STEPS

from ..common.workloads import Shape


def show_planner(console: Console, found: dict[str, Any], shape: Shape) -> None:
    titles = list(found["policies"])
    table = Table(
        caption=f"T {shape.tokens}, D {shape.hidden}, FFN {shape.ffn}, E {shape.experts}, k {shape.top_k}, "
        f"image-flood, {found['virtual_ranks']} ranks; vanilla layer {found['layer_ms']:.0f} ms",
        caption_justify="left",
    )
    for title in ("", *titles):
        table.add_column(title, justify="left" if not title else "right")

    def line(name: str, show: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(show(found["policies"][title]) for title in titles))

    line("planner, ms", lambda one: f"{one['ms']:.1f}")
    line("in and out of Megatron, ms", lambda one: f"{one['around_ms']:.1f}")
    line("both, share of a vanilla layer", lambda one: f"{one['share']:.1%}")
    table.add_section()
    for part in STEPS:
        line(f"{part}, ms", partial(_of_step, part))
    table.add_section()
    line("torch operators", lambda one: f"{one['operators']}")
    line("peak bytes a token", lambda one: f"{one['bytes_a_token']:.0f}")
    most = shape.tokens * shape.top_k * 512
    line("E 512: largest tensor / (T k E)", lambda one: f"{one['largest_tensor_at_512'] / most:.2f}")
    console.print(table)


def _of_step(step: str, found: dict[str, Any]) -> str:
    """A policy's time in a step."""
    return f"{found['parts'][step]:.2f}"
