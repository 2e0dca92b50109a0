"""``macs bench``: what MACS costs and what it gains, beside the baselines and beside what is possible."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from ..common.command import quiet
from ..common.table import console
from .arguments import parse_arguments
from .report import machine


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(given)
    quiet(arguments.threads)
    if arguments.mode == "planner":  # each imports an engine
        from .planner import run_planner as run
    else:
        from .layer import run_layer as run
    found = run(arguments, console())
    about = {"mode": arguments.mode, "shape": asdict(arguments.shape), "machine": machine(arguments)}
    asked = {name: str(value) for name, value in vars(arguments).items() if name not in ("shape", "played")}
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps({**about, "arguments": asked, **found}) + "\n")
    same = found.get("under_capacity")
    if any("failed" in row for row in found.get("rows", ())):
        sys.exit("macs bench: some output was wrong; see the table")
    if same and not (same["same_collectives"] and (same["same_bits"] or torch.cuda.is_available())):
        sys.exit("macs bench: with nothing over capacity MACS does not do what stock Megatron does")
