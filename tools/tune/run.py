"""Measure how a bound on the step is best split among layers, and keep it in a profile.

    macs tune                                       # the tiny model, on questions of its training split
    macs tune --model DIR --data requests.jsonl --ranks 8 --out model.safetensors
    torchrun --nproc-per-node 8 -m macs tune --engine deepspeed --model DIR --data requests.jsonl

One device, the plain adapter, ``--ranks`` virtual expert-parallel ranks; or DeepSpeed's AutoEP on as many as
there are processes; or the tiny model in Megatron (your own: docs/tuning.md). Damage is the KL in nats, at
the tokens of the answers that the model gives without a bound, to the model under it. Every layer is bounded
by itself first (``--groups``: layers in groups, for a model of many); a split of each target follows from
that, is refined by moving load between layers, as measured on one half of the requests, and verified on the
other: where it is not better than one bound for all layers there, beyond the 95 % interval, the profile gets
that. What was measured is kept beside ``--out``, so that a run that was stopped goes on.

Serve with it: --moe-macs-profile FILE --moe-macs-split tuned --moe-macs-target-load 0.7, or
--moe-macs-max-kl 0.01; in DeepSpeed's block "profile", "split", "target_load", "max_kl".
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tiny_vlm import CHECKPOINT

from macs import POLICIES, MACSConfig, Tuning
from macs.files import output_file, read_mapping
from macs.serving.launch import first_process

from ..common.command import Parser, quiet
from ..evaluate.intervals import bootstrap, bootstrap_ratio
from ..evaluate.kinds import MIXES
from .search import CAP, GRID, Measured, objective, refined, singles, split_by

if TYPE_CHECKING:
    from .model import Tuned

SHORT = set(MIXES) - {"multi-image", "pair", "read", "easy-vqa"}
"""Kinds of batches whose prompts and answers are as long as the tiny model's engine in Megatron expects."""

TARGETS = (1.05, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("macs tune", __doc__)
    parser.add_argument("--engine", choices=("plain", "deepspeed", "megatron"), default="plain")
    parser.add_argument("--model", type=Path, help="a checkpoint directory in Hugging Face format")
    parser.add_argument("--data", type=Path, help="of --model: a folder, or a file of JSON lines")
    parser.add_argument("--dtype", default="auto", help="of --model: auto, float32, bfloat16, ...")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer of --model")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of the tiny model")
    parser.add_argument(
        "--batches", nargs="+", choices=tuple(MIXES), default=["mixed"], help="what the tiny model is asked"
    )
    parser.add_argument("--ranks", type=int, help="expert-parallel ranks to tune for, of plain (default: 4)")
    parser.add_argument("--groups", type=int, help="of consecutive layers that share a bound")
    parser.add_argument(
        "--policy", choices=[name for name, one in POLICIES.items() if one.plans], default="macs"
    )
    parser.add_argument("--config", type=Path, help="MACS settings, a .yaml or .json file")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--requests", type=int, default=1120, help="half to tune on, half to verify")
    parser.add_argument("--batch", type=int, default=56, help="requests in a batch, over all ranks")
    parser.add_argument("--tries", type=int, default=24, help="moves that are tried for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=output_file, default=Path("runs") / "tuned.safetensors")
    arguments = parser.parse_args(given)
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together: found one of them")
    for name in ("model", "data", "checkpoint", "config"):
        path = getattr(arguments, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}: found nothing at {path}")
    least = 2 * arguments.batch * (len(arguments.batches) if arguments.model is None else 1)
    if arguments.engine == "megatron" and (arguments.model is not None or set(arguments.batches) - SHORT):
        parser.error(
            "--engine megatron: found --model or --batches of other lengths, expected the tiny model's "
            f"{', '.join(sorted(SHORT))}; for a model of your own see docs/tuning.md"
        )
    if arguments.requests < least:
        parser.error(f"--requests: found {arguments.requests}, expected two batches ({least}) or more")
    if min(arguments.targets) <= 0:
        parser.error(f"--targets: found {min(arguments.targets)}, expected loads above 0")
    if arguments.engine != "plain":
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if arguments.ranks not in (None, processes):
            parser.error(f"--ranks: found {arguments.ranks} with {processes} processes of {arguments.engine}")
        if arguments.batch % processes:
            parser.error(f"--batch: found {arguments.batch}, expected a multiple of {processes} processes")
        arguments.ranks = processes
    arguments.ranks = arguments.ranks or 4
    arguments.targets = sorted(set(arguments.targets), reverse=True)
    try:
        arguments.settings = {} if arguments.config is None else read_mapping(arguments.config)
        MACSConfig.from_dict(arguments.settings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


class Kept:
    """Measurements by what was measured, in a file of JSON lines; a repeated one costs nothing."""

    def __init__(self, model: Tuned, path: Path, arguments: argparse.Namespace, tell: Any) -> None:
        self.model, self.path, self.tell = model, path, tell
        told = {
            name: str(value)
            for name, value in sorted(vars(arguments).items())
            if name not in ("out", "targets")
        }
        self.told, self.found = json.dumps(told), {}
        self.writes = first_process()
        if self.writes and path.exists():
            lines = (json.loads(line) for line in path.read_text().splitlines() if line)
            self.found = {one["key"]: one for one in lines}
        if model.group is not None:  # every rank measures, or none
            kept = [self.found]
            dist.broadcast_object_list(kept, group=model.group, group_src=0)
            self.found = kept[0]

    def measure(self, half: str, bounds: Sequence[float]) -> Measured:
        """Of a half under the layers' bounds."""
        key = json.dumps([self.told, half, [round(float(one), 6) for one in bounds]])
        if key not in self.found:
            one = self.model.measure(half, bounds)
            self.found[key] = {
                "key": key,
                "loads": one.loads.tolist(),
                "damage": one.damage.tolist(),
                "same": one.same.tolist(),
            }
            if self.writes:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.found[key]) + "\n")
        self.tell()
        one = self.found[key]
        return Measured(*(np.array(one[name]) for name in ("loads", "damage", "same")))


def split_for(target: float, curves: Any, kept: Kept, tries: int) -> dict[str, Any]:
    """The best split for a target, and what it does on the half that verifies, beside one bound for all."""
    layers = len(curves)

    def on_tuning(bounds: Sequence[float]) -> Measured:
        return kept.measure("tune", bounds)

    uniform = on_tuning([target] * layers)
    cap = max(float(np.percentile(uniform.damage, CAP)), 1e-9)
    best, held = refined(on_tuning, split_by(curves, float(uniform.loads.mean())), cap, tries)
    if objective(uniform, cap) <= objective(held, cap):
        best = [target] * layers
    plain, split = kept.measure("verify", [target] * layers), kept.measure("verify", best)
    ratio = bootstrap_ratio(split.damage, plain.damage)
    better = ratio[2] < 1 and float(split.loads.mean()) <= float(plain.loads.mean()) + 0.01
    return {
        "target": target,
        "uniform": plain,
        "split": split,
        "ratio": ratio,
        "used": better,
        "bounds": best if better else [target] * layers,
        "damage": bootstrap((split if better else plain).damage),
    }


def tuned(model: Tuned, arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every target's split."""
    targets = arguments.targets
    natural = model.natural()
    most = len(natural) * len(GRID) + len(targets) * (arguments.tries + 4)
    passes = len(model.halves["tune"])
    console.print(
        f"{len(natural)} {'layers' if model.share == 1 else 'groups of layers'}; "
        f"at most {most} measurements of {passes} forward passes each; "
        f"busiest rank by layer {', '.join(f'{one:.2f}' for one in natural)}"
    )
    columns = (TextColumn("{task.description} {task.completed}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("measuring", total=most)
        path = arguments.out.with_suffix(".measured.jsonl")
        kept = Kept(model, path, arguments, lambda: progress.advance(bar))
        curves = singles(lambda bounds: kept.measure("tune", bounds), natural)
        found = [split_for(target, curves, kept, arguments.tries) for target in targets]
        progress.update(bar, completed=most)
    return found


def tuning_of(found: Sequence[dict[str, Any]], model: Tuned) -> Tuning:
    """What a profile keeps of the splits."""
    bounds = np.repeat(np.array([one["bounds"] for one in found]), model.share, axis=1)
    return Tuning(
        targets=torch.tensor([one["target"] for one in found], dtype=torch.float64),
        bounds=torch.tensor(bounds, dtype=torch.float64),
        damage=torch.tensor([one["damage"] for one in found], dtype=torch.float64),
        policy=model.policy,
        ranks=model.ranks,
        tokens=model.tokens,
        requests=model.requests("verify"),
    )


def table_of(found: Sequence[dict[str, Any]], tuning: Tuning) -> Table:
    """What every target costs, with one bound and split; of many layers the least and the largest bound."""
    caption = (
        f"{tuning.requests} requests that verify, {tuning.ranks} ranks; KL x 1000 at the answers' tokens, "
        "one bound for all layers and split; 95 % of their ratio"
    )
    table = Table(caption=caption, caption_justify="left")
    for name in ("target", "load", "one bound", "split", "ratio, 95 %", "same answer", "bounds by layer"):
        table.add_column(name, justify="right")
    for one in found:
        plain, split = one["uniform"], one["split"]
        told = split if one["used"] else plain
        bounds = [f"{bound:.2f}" for bound in one["bounds"]]
        table.add_row(
            f"{one['target']:g}",
            f"{told.loads.mean():.3f}",
            f"{1e3 * plain.damage.mean():.3g}",
            f"{1e3 * split.damage.mean():.3g}" + ("" if one["used"] else " (not used)"),
            f"{one['ratio'][1]:.2f}-{one['ratio'][2]:.2f}",
            f"{told.same.mean():.4f}",
            " ".join(bounds) if len(bounds) <= 4 else f"{min(bounds)} to {max(bounds)}",
        )
    return table


def main(given: Sequence[str] | None = None) -> None:
    """Measure, show, write."""
    arguments = parse_arguments(given)
    quiet()
    from . import model as models

    console = Console(quiet=not first_process())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with models.opened(arguments) as model, torch.inference_mode():
        found = tuned(model, arguments, console)
        profile = replace(model.profile(), tuning=tuning_of(found, model))
    if not first_process():
        return
    profile.save(arguments.out)
    console.print(table_of(found, profile.tuning))
    console.print(f"profile with the tuning in {arguments.out}; {model.passes} forward passes")
