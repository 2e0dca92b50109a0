"""Measure which expert of a model serves which modality, and keep it as a profile.

    macs calibrate                                     # the tiny model, pictures of its own
    macs calibrate --engine megatron --data pictures/
    torchrun --nproc-per-node 8 -m macs_tools calibrate --model DIR --data requests.jsonl

``--data`` is a folder of pictures and ``.txt`` files (``cat.txt`` beside ``cat.png`` is the question
about it), or a file of JSON lines ``{"text": ..., "image": path}``, either of which may be missing.
``--model`` is a checkpoint directory in Hugging Face format, with its processor, run by DeepSpeed's
AutoEP; for a model of Megatron's own, run its own script under
``python -m megatron_macs.launch SCRIPT ... --moe-macs --moe-macs-calibrate FILE``.

Shows every layer's experts by modality bias, how stable that is (profiles of two disjoint halves of
the requests against each other), and how many requests are enough. An existing profile is checked
against the model with ``--check``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from macs import Profile
from macs.runtime.launch import first_process

from ..common.command import Parser, output_file, quiet
from ..common.requests import read_requests
from .stability import AGREEMENT, bias_table, check, counted, enough, plot, stability


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("macs calibrate", __doc__)
    parser.add_argument("--engine", choices=("deepspeed", "megatron"), default="deepspeed")
    parser.add_argument("--model", type=Path, help="a checkpoint directory in Hugging Face format")
    parser.add_argument("--dtype", default="auto", help="of --model: auto, float32, bfloat16, ...")
    parser.add_argument("--checkpoint", type=Path, help="of the tiny model")
    parser.add_argument("--data", type=Path, help="a folder, or a file of JSON lines")
    parser.add_argument("--samples", type=int, default=448, help="requests at most")
    parser.add_argument("--batch", type=int, default=14, help="requests asked at once, on each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.1, help="[tau] of a modality bias")
    parser.add_argument("--out", type=output_file, default=Path("runs") / "model.safetensors")
    parser.add_argument("--plot", type=output_file, help="a picture of every expert's visual preference")
    parser.add_argument("--check", type=Path, help="a profile to hold against the model instead")
    arguments = parser.parse_args(given)
    if arguments.model is not None and arguments.engine == "megatron":
        parser.error(
            "--model: with Megatron run a script of your own under megatron_macs.launch, with "
            "--moe-macs --moe-macs-calibrate FILE"
        )
    if arguments.model is not None and arguments.data is None:
        parser.error("--model: expected --data with it, a sample of your own requests")
    if not 0 <= arguments.threshold <= 0.5:
        parser.error(f"--threshold: found {arguments.threshold}, expected a value from 0 to 0.5")
    if arguments.batch < 1:
        parser.error(f"--batch: found {arguments.batch}, expected 1 or more")
    for name in ("model", "checkpoint", "data", "check"):
        path = getattr(arguments, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}: found nothing at {path}")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Measure, show, write."""
    arguments = parse_arguments(given)
    profile = None if arguments.check is None else Profile.load(arguments.check)
    requests = None if arguments.data is None else read_requests(arguments.data)
    quiet()
    from . import engines

    console = Console(quiet=not first_process())
    with engines.ENGINES[arguments.engine](arguments) as (runtime, engine), torch.inference_mode():
        if profile is not None:
            check(profile, runtime)
            console.print(f"{arguments.check} was measured on this model")
            return
        batches = engines.own_batches(arguments, requests)
        profiles = counted(runtime, engine, batches, console)
        size = arguments.batch * dist.get_world_size()
    if first_process():
        show(arguments, profiles, size, console)


def show(arguments: argparse.Namespace, profiles: Sequence[Profile], size: int, console: Console) -> None:
    """The profile of all batches, ``size`` requests each, how stable it is, and its file."""
    profile, threshold = Profile.merged(profiles), arguments.threshold
    found = stability(profiles, size, threshold)
    console.print(bias_table(profile, threshold, found[-1]))
    for one in found:
        console.print(
            f"{one.requests:6d} requests a half: {float(one.alike.mean()):.0%} of the experts alike, "
            f"q differs by {float(one.difference.mean()):.3f}"
        )
    least = enough(found)
    console.print(
        f"enough: {least} requests ({AGREEMENT:.0%} alike)"
        if least is not None
        else f"not enough yet: two halves class fewer than {AGREEMENT:.0%} of the experts alike; give more"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    profile.save(arguments.out)
    console.print(f"profile of {len(profiles) * size} requests in {arguments.out}")
    if arguments.plot is not None:
        plot(profile, threshold, arguments.plot)
