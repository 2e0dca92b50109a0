"""Cost models of GPUs and engines, from the figures that ``fit`` made of published measurements."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cost_model import CostModel
from ..common.launches import AROUND, PLANS
from ..common.workloads import Shape

FIGURES = Path(__file__).with_name("figures.json")
GPUS = "h100", "h200", "b200"
ENGINES = {"trtllm": "TensorRT-LLM", "vllm": "vLLM", "sglang": "SGLang"}
DTYPE_BYTES = {"bf16": 2, "fp8": 1}
MEMORY_GBS = {"h100": 3350.0, "h200": 4800.0, "b200": 8000.0}
"""10^9 bytes/s as NVIDIA states them; only what a plan reads and writes is timed by them."""

_PLANS = {**PLANS, "paper": PLANS["paper at 1.05"], "*": PLANS["defaults"]}
LAUNCHES = {
    title: _PLANS[title][0] + AROUND
    for title in ("token drop", "expanded drop", "rank-balanced", "paper", "macs safe", "*")
}
"""Of every contender's plan, and around it."""

EAGER_MS = 4e-3
"""Guessed of a launch that PyTorch or Triton makes."""


@cache
def figures() -> dict[str, Any]:
    """All figures, and where they come from."""
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    return found


def engine_figures(gpu: str, engine: str) -> dict[str, Any]:
    found: dict[str, Any] = figures()["devices"][gpu]["engines"][engine]
    return found


def moe_ms(coefficients: Any, hidden: int, ffn: int, assignments: float, rows: np.ndarray) -> np.ndarray:
    """Of a rank's experts that compute ``rows`` [..., experts], where its tokens have so many assignments
    to all ranks' experts. [...]"""
    constant, seen, handled, weights, compute = coefficients
    experts = np.maximum(weights * hidden * ffn * np.minimum(rows, 1), compute * hidden * ffn * rows)
    return np.asarray(
        constant + seen * assignments * hidden + handled * (hidden + ffn) * rows.sum(-1) + experts.sum(-1)
    )


def machine(gpu: str, engine: str, shape: Shape, dtype: str = "bf16") -> CostModel:
    """A layer of this shape on 8 GPUs a node under an engine, exchanged by DeepEP, planned eagerly."""
    device, of_engine = figures()["devices"][gpu], engine_figures(gpu, engine)
    by_shape = of_engine["moe"][dtype]
    key = f"{shape.hidden}x{shape.ffn}x{shape.experts}x{shape.top_k}"
    constant, seen, handled, weights, compute = by_shape.get(key, by_shape["any"])
    size = shape.hidden * shape.ffn
    row = handled * (shape.hidden + shape.ffn)
    turn = weights / compute
    fit = "measurements of this shape" if key in by_shape else f"{len(by_shape) - 1} other shapes"
    source = figures()["source"]
    return CostModel(
        rows=[0.0, turn, 100 * turn],
        ms=[weights * size, weights * size + row * turn, 100 * (weights * size + row * turn)],
        fixed_ms=constant,
        row_ms=0.0,
        seen_ms=seen * shape.hidden,
        node=8,
        once=True,
        row_bytes=2 * shape.hidden,
        weight_bytes=DTYPE_BYTES[dtype],
        hidden=shape.hidden,
        ffn=shape.ffn,
        top_k=shape.top_k,
        tokens=shape.tokens,
        planner_ms={"*": shape.tokens * (6 * shape.hidden + 400) / MEMORY_GBS[gpu] / 1e6},
        launches=LAUNCHES,
        launch_ms=EAGER_MS,
        origin=f"{gpu.upper()}, {ENGINES[engine]} {source['engines'][engine]}, {dtype}: experts fitted to "
        f"{fit}, exchange to DeepEP's{' (beyond a node: of H100s)' if gpu == 'b200' else ''}, both published "
        f"in {source['package']} {source['version']}; launches of a plan counted, {EAGER_MS * 1e3:g} us each "
        "guessed",
        **device["exchange"],
    )
