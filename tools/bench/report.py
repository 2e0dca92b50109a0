"""The table, and what it was measured on."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from macs.steps.kernels.dispatch import has_triton

from ..common.table import table

HEADINGS = [
    *("workload", "policy", "ms", "time / vanilla", "ideal", "share of ideal", "load"),
    *("dropped", "rerouted", "kept mass"),
]


def table_of(rows: Sequence[dict[str, Any]], caption: str) -> Table:
    shown: list[list[str] | None] = []
    last = None
    for row in rows:
        if last not in (None, row["workload"]):
            shown.append(None)
        head = ["" if row["workload"] == last else row["workload"], row["policy"]]
        last = row["workload"]
        if "failed" in row:
            shown.append([*head, f"not timed: {row['failed']}"])
            continue
        spread = f" ± {row['ratio_spread'] / 2:.3f}" if row["turns"] > 1 else ""
        times = (
            f"{row['ms']:.1f}",
            f"{row['ratio']:.3f}{spread}",
            f"{row['ideal']:.3f}",
            f"{row['share']:.0%}",
        )
        counts = f"{row['load_after']:.3f}", f"{row['dropped']:.1%}", f"{row['rerouted']:.1%}"
        shown.append([*head, *times, *counts, f"{row['kept_mass']:.3f}"])
    return table(HEADINGS, shown, 2, caption=caption)


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What it ran on, with what."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else processor(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron": importlib.metadata.version("megatron-core"),
        "triton": has_triton(),
    }
