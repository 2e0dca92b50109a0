"""``macs bench``: what MACS costs and what it gains, beside the baselines and beside what is possible."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from ..common.command import quiet
from .arguments import parse_arguments
from .report import machine


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(given)
    quiet(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 165)
    started = time.time()
    if arguments.mode == "planner":  # each imports an engine
        from .planner import run_planner as run
    else:
        from .layer import run_layer as run
    found = run(arguments, console)
    told = {
        name: str(value) if isinstance(value, (Path, list)) and name != "ladder" else value
        for name, value in vars(arguments).items()
        if name not in ("shape", "played")
    }
    result = {
        "mode": arguments.mode,
        "arguments": told,
        "shape": asdict(arguments.shape),
        "machine": machine(arguments),
        "seconds": round(time.time() - started),
        **found,
    }
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(result) + "\n")
    same = found.get("under_capacity")
    if any("failed" in row for row in found.get("rows", ())):
        sys.exit("macs bench: some output was wrong; see the table")
    if same and not (same["same_collectives"] and (same["same_bits"] or torch.cuda.is_available())):
        sys.exit("macs bench: with nothing over capacity MACS does not do what stock Megatron does")
