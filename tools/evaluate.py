"""What policies and loads cost in answers: a model and requests of yours.

    macs evaluate --model DIR --data requests.jsonl --ranks 8 --policies macs token-drop --targets 1.05 0.7

One process whose layers plan as ``--ranks`` expert-parallel ranks would. KL is in nats, at the tokens of the
answers that the model gives without a bound, mean over requests with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from macs import POLICIES, MACSConfig, Profile
from macs.files import read_mapping

from .common.command import Parser, output_file, quiet
from .common.intervals import bootstrap


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("macs evaluate", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory of Hugging Face")
    parser.add_argument("--data", type=Path, required=True, help="a folder, or a file of JSON lines")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--ranks", type=int, default=4, help="expert-parallel ranks planned for")
    plans = [name for name, one in POLICIES.items() if one.plans]
    parser.add_argument("--policies", nargs="+", choices=plans, default=["macs", "token-drop"])
    parser.add_argument("--targets", nargs="+", type=float, default=[1.05, 0.7], help="target_load")
    parser.add_argument("--config", type=Path, help="other settings, a .yaml or .json file")
    parser.add_argument("--profile", type=Path, help="modality; with a tuning its splits as well")
    parser.add_argument("--requests", type=int, default=448, help="at most")
    parser.add_argument("--batch", type=int, default=56, help="requests asked at once")
    parser.add_argument("--out", type=output_file, help="the figures, as JSON")
    arguments = parser.parse_args(given)
    for name in ("model", "data", "config", "profile"):
        path = getattr(arguments, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}: found nothing at {path}")
    return arguments


def configurations(arguments: argparse.Namespace, profile: Profile | None) -> list[tuple[str, MACSConfig]]:
    """Policies and settings to measure."""
    settings = {} if arguments.config is None else read_mapping(arguments.config)
    config = MACSConfig.from_dict(settings)
    found = []
    for policy in arguments.policies:
        for target in sorted(arguments.targets, reverse=True):
            found.append((policy, config.updated(target_load=target)))
            if profile is not None and profile.tuning is not None and profile.tuning.policy == policy:
                found.append((policy, config.updated(target_load=target, split="tuned")))
    return found


def row_of(policy: str, config: MACSConfig, measured: Any) -> dict[str, Any]:
    """The figures of one configuration."""
    return {
        "policy": policy,
        "settings": config.as_dict(),
        "load": float(measured.loads.mean()),
        "kl": bootstrap(measured.kl),
        "same": float(measured.same.mean()),
    }


def table_of(rows: Sequence[dict[str, Any]], requests: int) -> Table:
    """One line for each configuration."""
    table = Table(caption=f"{requests} requests; same: the answer of the model without a bound")
    for name in ("policy", "target_load", "split", "load", "KL x 1000", "95 %", "same answer"):
        table.add_column(name, justify="right")
    for row in rows:
        mean, low, high = (1e3 * value for value in row["kl"])
        settings = row["settings"]
        table.add_row(
            row["policy"],
            f"{settings['target_load']:g}",
            settings["split"],
            f"{row['load']:.3f}",
            f"{mean:.3g}",
            f"{low:.3g} to {high:.3g}",
            f"{row['same']:.1%}",
        )
    return table


def main(given: Sequence[str] | None = None) -> None:
    """Measure and show."""
    arguments = parse_arguments(given)
    quiet()
    from .tune.sources import opened

    profile = None if arguments.profile is None else Profile.load(arguments.profile)
    arguments.engine, arguments.groups, arguments.policy, arguments.settings = "plain", None, "macs", {}
    console = Console()
    with opened(arguments) as model:
        rows = []
        for policy, config in configurations(arguments, profile):
            rows.append(row_of(policy, config, model.under(policy, config, profile)))
    console.print(table_of(rows, model.requests("tune") + model.requests("verify")))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"ranks": arguments.ranks, "rows": rows}) + "\n")
