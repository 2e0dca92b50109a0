"""``macs bench planner``: its parts, its growth, its memory."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console

from macs import IMAGE, Modality, Plan, Planner, Tokens, Topology
from macs.planner import STEPS
from macs.steps.contracts import Counts
from macs.steps.kernels.dispatch import has_triton, kernels
from macs.steps.weighting import WeightRule, semantic_weights

from ..common.clock import clocked, milliseconds
from ..common.layers import Asked, around_plan, build_layer, device, engine, force, join, layout_of
from ..common.workloads import SHAPES, Contender, Shape, contenders, draw, features
from .planner_report import show_planner
from .watch import Watch, launches_unwatched


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
    tokens = Modality.of(batch.ids[None].to(device())).batch_major()
    return partial(planner.plan, hidden, experts, weights, scores, tokens)


def router_pass(shape: Shape) -> Callable[[], Any]:
    """What a router does with its logits [T, E]: scores and the k best."""
    logits = torch.randn(shape.tokens, shape.experts, device=device())
    return lambda: logits.softmax(1).topk(shape.top_k, 1)


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
        around = around_plan(batch.experts.to(device()), batch.scores.to(device()))
        plans = {title: work() for title, work in works.items()}
        beside: dict[str, list[float]] = {title: [] for title in works}
        for turn in range(arguments.repeats + 1):
            stock(hidden)
            layers.append(milliseconds(partial(stock, hidden)))
            for title, work in works.items():
                work()
                spent[title].append(milliseconds(work))
                around(plans[title])
                beside[title].append(milliseconds(partial(around, plans[title])))
            if turn == 0:
                layers.clear()
                for values in (*spent.values(), *beside.values()):
                    values.clear()
        layer_ms = statistics.median(layers)
        for title, work in works.items():
            parts: list[dict[str, float]] = []
            for _ in range(arguments.repeats):
                parts.append({})
                with mock.patch("macs.planner.step", partial(clocked, parts[-1])):
                    work()
            with Watch() as watch:
                work()
            found["policies"][title] = {
                "ms": statistics.median(spent[title]),
                "around_ms": statistics.median(beside[title]),
                "share": statistics.median(
                    (mine + other) / layer
                    for mine, other, layer in zip(spent[title], beside[title], layers, strict=True)
                ),
                "parts": {part: statistics.median(one.get(part, 0.0) for one in parts) for part in STEPS},
                "operators": watch.operators,
                "bytes_a_token": watch.peak / shape.tokens,
            }
            # Where k E is more than D.
            work = planned_alone(replace(shape, experts=512), chosen[title], ranks)
            work()
            with Watch() as watch:
                work()
            found["policies"][title]["largest_tensor_at_512"] = watch.largest
        found["layer_ms"] = layer_ms
        found["growth"] = growth(shape, chosen, ranks, arguments.repeats)
        found["kernels"] = kernel_memory(chosen, ranks)
        found["bandwidth"] = bandwidths(shape, arguments.repeats)
        dist.destroy_process_group()
    show_planner(console, found, shape)
    return found


def growth(
    shape: Shape, chosen: dict[str, Contender], ranks: int, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """The planner's time by tokens and by experts, beside a router's pass over the same scores."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, shapes in {
        "tokens": [replace(shape, tokens=shape.tokens * part // 4) for part in (1, 2, 4, 8)],
        "experts": [replace(shape, experts=count) for count in (64, 128, 256, 512)],
    }.items():
        works = [
            {title: planned_alone(one, contender, ranks) for title, contender in chosen.items()}
            | {"router": router_pass(one)}
            for one in shapes
        ]
        times: list[dict[str, list[float]]] = [{title: [] for title in row} for row in works]
        for turn in range(repeats + 1):
            for row, kept in zip(works, times, strict=True):
                for title, work in row.items():
                    work()
                    kept[title].append(milliseconds(work))
                    if turn == 0:
                        kept[title].clear()
        found[name] = [
            {name: float(getattr(one, name))}
            | {title: statistics.median(values) for title, values in kept.items()}
            for one, kept in zip(shapes, times, strict=True)
        ]
    return found


def bandwidths(shape: Shape, repeats: int) -> dict[str, float]:
    """10^9 bytes a second of features read for their entropy, and read and written by a copy, in turn."""
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    hidden = torch.randn(shape.tokens, shape.hidden, device=device()).to(kind)
    tokens = Tokens.all_text(shape.tokens, hidden.device)
    tokens.modality[:] = IMAGE
    rule = WeightRule("entropy", 1.0, 0.5, 1)

    def weigh() -> None:
        semantic_weights(
            hidden, tokens, rule, Counts.zeros(rule.shapes(hidden.shape[1]), hidden.device), False
        )

    works = {"entropy": (weigh, 1), "copy": (hidden.clone, 2)}
    spent: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, (work, _) in works.items():
            work()
            spent[name].append(milliseconds(work))
    return {
        name: times * hidden.nbytes / statistics.median(spent[name]) / 1e6
        for name, (_, times) in works.items()
    }


def kernel_memory(chosen: dict[str, Contender], ranks: int) -> dict[str, Any]:
    """What a plan allocates with Triton's kernels (in its interpreter where there is no GPU), at the shape
    of Qwen3-VL-30B-A3B, and what share that is of the layer's activations."""
    shape = SHAPES["qwen3-vl-30b-a3b"]
    if not has_triton() or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return {}
    shape = replace(shape, tokens=shape.tokens if torch.cuda.is_available() else 1024)
    # A row as it is sent, gate and up, their product, and the result, in bfloat16.
    activations = shape.top_k * (2 * shape.hidden + 3 * shape.ffn) * 2
    found = {}
    for title, contender in chosen.items():
        work = planned_alone(shape, contender, ranks)
        with kernels("triton"), launches_unwatched():
            work()
            with Watch() as watch:
                work()
        found[title] = {
            "bytes_a_token": watch.peak / shape.tokens,
            "share_of_activations": watch.peak / shape.tokens / activations,
            "operators": watch.operators,
        }
    return found
