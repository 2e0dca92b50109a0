"""What policies and loads cost in answers: a model and requests of yours.

    macs evaluate --model DIR --data requests.jsonl --ranks 8 --policies macs token-drop --targets 1.05 0.7

One process whose layers plan as ``--ranks`` expert-parallel ranks would. KL is in nats, at the tokens of the
answers that the model gives without a limit, mean over requests with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from macs import POLICIES, MACSConfig, Profile
from macs.files import read_mapping

from .common.command import Parser, output_file, quiet
from .common.intervals import bootstrap
from .common.table import console, table


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
    parser.there(arguments, "model", "data", "config", "profile")
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


def cells(row: dict[str, Any]) -> list[str]:
    """One configuration's line of the table."""
    mean, low, high = (1e3 * value for value in row["kl"])
    settings = row["settings"]
    figures = f"{row['load']:.3f}", f"{mean:.3g}", f"{low:.3g} to {high:.3g}", f"{row['same']:.1%}"
    return [row["policy"], f"{settings['target_load']:g}", settings["split"], *figures]


def main(given: Sequence[str] | None = None) -> None:
    """Measure and show."""
    arguments = parse_arguments(given)
    quiet()
    from .tune.sources import opened

    profile = None if arguments.profile is None else Profile.load(arguments.profile)
    arguments.engine, arguments.groups, arguments.policy, arguments.settings = "plain", None, "macs", {}
    with opened(arguments) as model:
        rows = []
        for policy, config in configurations(arguments, profile):
            rows.append(row_of(policy, config, model.under(policy, config, profile)))
    requests = model.requests("tune") + model.requests("verify")
    caption = f"{requests} requests; same: the answer of the model without a limit"
    heads = ("policy", "target_load", "split", "load", "KL x 1000", "95 %", "same answer")
    console().print(table(heads, map(cells, rows), caption=caption))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"ranks": arguments.ranks, "rows": rows}) + "\n")
