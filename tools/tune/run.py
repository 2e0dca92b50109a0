"""Measure how a load limit is best split among layers, and keep it in a profile.

    macs tune                                       # the tiny model, on questions of its validation split
    macs tune --only modality                       # which experts serve which modality, and nothing else
    macs tune --model DIR --data requests.jsonl --ranks 8 --out model.safetensors
    torchrun --nproc-per-node 8 -m macs_tools tune --engine deepspeed --model DIR --data requests.jsonl

One device, the plain adapter, ``--ranks`` virtual expert-parallel ranks; or DeepSpeed's AutoEP on as many as
there are processes; or the tiny model in Megatron (your own: docs/tuning.md). The KL in nats, at
the tokens of the answers that the model gives without a limit, to the model under it. Every layer is limited
by itself first (``--groups``: layers in groups, for a model of many); a split of each target follows from
that, is refined by moving load between layers, as measured on one half of the requests, and verified on the
other: where it is not better than one limit for all layers there, beyond the 95 % interval, the profile gets
that. What was measured is kept beside ``--out``, so that a run that was stopped goes on.

Serve with it: --moe-macs-profile FILE --moe-macs-split tuned --moe-macs-target-load 0.7, or
--moe-macs-max-kl 0.01; in DeepSpeed's block "profile", "split", "target_load", "max_kl".
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from macs import POLICIES, MACSConfig, Tuning
from macs.files import read_mapping
from macs.records.compensation import Compensation
from macs.runtime.launch import INTERRUPTED, first_process, leave

from ..common.command import Parser, output_file, quiet
from ..common.table import console, table
from .tuning import TARGETS

LONG = {"pair", "read", "easy-vqa"}
"""Kinds of batches whose prompts or answers are longer than the tiny model's engine in Megatron expects."""


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("macs tune", __doc__)
    parser.add_argument("--engine", choices=("plain", "deepspeed", "megatron"), default="plain")
    parser.add_argument("--model", type=Path, help="a checkpoint directory in Hugging Face format")
    parser.add_argument("--data", type=Path, help="of --model: a folder, or a file of JSON lines")
    parser.add_argument("--dtype", default="auto", help="of --model: auto, float32, bfloat16, ...")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer of --model (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="of the tiny model")
    parser.add_argument("--batches", nargs="+", default=["mixed"], help="what the tiny model is asked")
    parser.add_argument("--ranks", type=int, help="expert-parallel ranks to tune for, of plain (default: 4)")
    parser.add_argument("--groups", type=int, help="of consecutive layers that share a limit")
    parser.add_argument(
        "--policy", choices=[name for name, one in POLICIES.items() if one.plans], default="macs"
    )
    parser.add_argument("--config", type=Path, help="MACS settings, a .yaml or .json file")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--requests", type=int, default=1120, help="half tune, half verify (%(default)s)")
    parser.add_argument("--batch", type=int, default=56, help="of all ranks together (%(default)s)")
    parser.add_argument("--tries", type=int, default=24, help="moves for each target (%(default)s)")
    parser.add_argument(
        "--compensation-rank",
        type=int,
        help="fit estimates of this rank of what is dropped, for example 16; used where they verify",
    )
    parser.add_argument("--only", choices=("modality",), help="measure the experts' modality bias alone")
    parser.add_argument("--check", type=Path, help="with --only: hold this profile against the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=output_file, default=Path("runs") / "tuned.safetensors")
    arguments = parser.parse_args(given)
    if arguments.model is not None and arguments.data is None:
        parser.error("--model: expected --data with it, requests of your own")
    if arguments.data is not None and arguments.model is None:
        parser.error("--data: expected --model with it")
    if arguments.check is not None and arguments.only is None:
        parser.error("--check: expected --only modality with it")
    parser.there(arguments, "model", "data", "checkpoint", "config", "check")
    if arguments.model is not None and arguments.batches != ["mixed"]:
        parser.error("--batches: found with --model, expected the tiny model")
    least = 2 * arguments.batch * (len(arguments.batches) if arguments.model is None else 1)
    if arguments.engine == "megatron" and (arguments.model is not None or set(arguments.batches) & LONG):
        parser.error(
            f"--engine megatron: found --model or --batches of {', '.join(sorted(LONG))}, expected the tiny "
            "model and shorter ones; for a model of your own see docs/tuning.md"
        )
    if arguments.requests < least:
        parser.error(f"--requests: found {arguments.requests}, expected two batches ({least}) or more")
    if arguments.compensation_rank is not None and arguments.compensation_rank < 0:
        parser.error(f"--compensation-rank: found {arguments.compensation_rank}, expected 0 or more")
    parser.positive(arguments, "targets")
    if arguments.engine != "plain":
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if arguments.ranks not in (None, processes):
            parser.error(f"--ranks: found {arguments.ranks} with {processes} processes of {arguments.engine}")
        if arguments.batch % processes:
            parser.error(f"--batch: found {arguments.batch}, expected a multiple of {processes} processes")
        arguments.ranks = processes
    arguments.ranks, arguments.split = arguments.ranks or 4, "validation"
    arguments.targets = sorted(set(arguments.targets), reverse=True)
    try:
        arguments.settings = {} if arguments.config is None else read_mapping(arguments.config)
        MACSConfig.from_dict(arguments.settings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def table_of(found: Sequence[dict[str, Any]], tuning: Tuning) -> Table:
    """What every target costs, with one limit and tuned; of many layers the lowest and the highest limit."""
    caption = (
        f"{tuning.requests} requests that verify, {tuning.ranks} ranks; KL x 1000 at the answers' tokens, "
        "one limit for all layers without compensation, and tuned; 95 % interval of their ratio, which is 1 "
        "where nothing was better"
    )
    rows = []
    for one in found:
        plain, used = one["plain"], one["used"]
        bounds = [f"{bound:.2f}" for bound in one["bounds"]]
        kl = f"{1e3 * plain.kl.mean():.3g}", f"{1e3 * used.kl.mean():.3g}", one["compensation"]
        ratio = f"{one['ratio'][1]:.2f}-{one['ratio'][2]:.2f}", f"{used.same.mean():.4f}"
        limits = " ".join(bounds) if len(bounds) <= 4 else f"{min(bounds)} to {max(bounds)}"
        rows.append((f"{one['target']:g}", f"{used.loads.mean():.3f}", *kl, *ratio, limits))
    kl_heads = "one limit", "tuned", "compensation", "ratio, 95 %"
    heads = ("target", "load", *kl_heads, "same answer", "limits by layer")
    return table(heads, rows, 0, caption=caption)


def shares_of(compensation: Compensation) -> Table:
    """By layer, how much of the routed output the estimates explain on the half that verifies."""
    caption = f"share of the squared routed output that estimates of rank {compensation.rank} explain"
    shares = enumerate(compensation.explained.tolist())
    rows = [(str(layer), f"{text:.3f}", f"{visual:.3f}") for layer, (text, visual) in shares]
    return table(("layer", "text", "visual"), rows, 0, caption=caption)


def main(given: Sequence[str] | None = None) -> None:
    """Measure, show, write."""
    arguments = parse_arguments(given)
    quiet()
    from .sources import opened
    from .tuning import tune

    shown = console(quiet=not first_process())
    if arguments.only == "modality":
        from .modality import measure

        measure(arguments, shown)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in sorted(vars(arguments).items())}
    about = json.dumps({name: value for name, value in settings.items() if name not in ("out", "targets")})
    try:
        with opened(arguments) as model:
            profile, found = tune(
                model,
                arguments.out,
                targets=arguments.targets,
                tries=arguments.tries,
                rank=arguments.compensation_rank,
                about=about,
                console=shown,
            )
    except KeyboardInterrupt:
        kept = arguments.out.with_suffix(".measured.jsonl")
        message = f"interrupted; what was measured is in {kept}, and the same command goes on from there"
        leave("macs tune", message, INTERRUPTED)
    if not first_process():
        return
    profile.save(arguments.out)
    shown.print(table_of(found, profile.tuning))
    if profile.compensation is not None:
        shown.print(shares_of(profile.compensation))
    shown.print(f"profile with the tuning in {arguments.out}; {model.passes} forward passes")
