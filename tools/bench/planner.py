"""``macs bench planner``: the time of a plan, by step."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console

from macs import Modality, Plan, Planner, Topology
from macs.planner import STEPS

from ..common.clock import clocked, milliseconds
from ..common.layers import Asked, build_layer, device, engine, force, join, layout_of
from ..common.table import table
from ..common.workloads import Contender, Shape, contenders, draw, features


def planned_alone(
    shape: Shape, contender: Contender, ranks: int, workload: str = "image-flood"
) -> Callable[[], Plan]:
    """A call that plans one source rank's tokens of a workload."""
    batch = draw(workload, shape, 0, 0, ranks)
    planner = Planner(
        contender.config, Topology(shape.experts, ranks, sources=(0,)), shape.top_k, contender.policy
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    hidden = features(batch, shape.hidden, 0, 0).to(device(), dtype)
    experts, weights, scores = (one.to(device()) for one in (batch.experts, batch.weights, batch.scores))
    tokens = Modality.of(batch.ids[None].to(device())).tokens()
    return partial(planner.plan, hidden, experts, weights, scores, tokens)


def run_planner(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    shape, ranks = arguments.shape, max(arguments.ranks, 8)
    names = arguments.policies or ["paper", "macs", "token drop", "rank-balanced"]
    chosen = {title: contenders(arguments.load)[title] for title in names}
    found: dict[str, Any] = {"tokens": shape.tokens, "virtual_ranks": ranks, "policies": {}}
    with engine(), torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        join(0, 1, folder)
        asked = Asked()
        stock = build_layer(shape, None)
        force(stock, asked)
        batch = draw("image-flood", shape, 0, 0, ranks)
        hidden, _, logits = layout_of(batch, features(batch, shape.hidden, 0, 0))
        asked.logits = logits
        works = {title: planned_alone(shape, one, ranks) for title, one in chosen.items()}
        layers: list[float] = []
        spent: dict[str, list[float]] = {title: [] for title in works}
        for turn in range(arguments.repeats + 1):
            stock(hidden)
            layers.append(milliseconds(partial(stock, hidden)))
            for title, work in works.items():
                work()
                spent[title].append(milliseconds(work))
            if turn == 0:
                layers.clear()
                for values in spent.values():
                    values.clear()
        layer_ms = statistics.median(layers)
        for title, work in works.items():
            parts: list[dict[str, float]] = []
            for _ in range(arguments.repeats):
                parts.append({})
                with mock.patch("macs.planner.step", partial(clocked, parts[-1])):
                    work()
            found["policies"][title] = {
                "ms": statistics.median(spent[title]),
                "share": statistics.median(
                    mine / layer for mine, layer in zip(spent[title], layers, strict=True)
                ),
                "parts": {part: statistics.median(one.get(part, 0.0) for one in parts) for part in STEPS},
            }
        found["layer_ms"] = layer_ms
        dist.destroy_process_group()
    show_planner(console, found, shape)
    return found


def show_planner(console: Console, found: dict[str, Any], shape: Shape) -> None:
    policies = found["policies"]
    rows: list[list[str] | None] = [
        ["planner, ms", *(f"{one['ms']:.1f}" for one in policies.values())],
        ["share of a vanilla layer", *(f"{one['share']:.1%}" for one in policies.values())],
        None,
    ]
    rows += [[f"{part}, ms", *(f"{one['parts'][part]:.2f}" for one in policies.values())] for part in STEPS]
    caption = (
        f"T {shape.tokens}, D {shape.hidden}, FFN {shape.ffn}, E {shape.experts}, k {shape.top_k}, "
        f"image-flood, {found['virtual_ranks']} ranks; vanilla layer {found['layer_ms']:.0f} ms"
    )
    console.print(table(["", *policies], rows, caption=caption))
