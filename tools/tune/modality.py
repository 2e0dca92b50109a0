"""``macs tune --only modality``: which experts serve which modality, and how stable that is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from macs import POLICIES, Profile, Runtime
from macs.runtime.launch import first_process

from ..common.requests import question_of, read_requests
from ..common.table import table
from .engines import rank_of, running

THRESHOLD = POLICIES["paper"].bias_threshold
"""[tau] of a modality bias."""

AGREEMENT = 0.95
"""Two halves that class this share of the experts alike are a profile."""


def batches_of(arguments: argparse.Namespace) -> list[list[Any]]:
    """What the engine is asked, in batches; every rank has its part, and equally many batches."""
    if arguments.data is None:
        from tiny_vlm import data

        questions: list[Any] = data.draw_samples(arguments.seed, "train", data.TASKS, arguments.requests)
    else:
        requests = read_requests(arguments.data)
        # In their order, pictures of one kind would make up one half, or all that is taken.
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(arguments.seed))
        requests = [requests[i] for i in order[: arguments.requests].tolist()]
        questions = [question_of(one) for one in requests]
    count = len(questions) // arguments.batch
    if count < 2:
        raise ValueError(
            f"--data: found {len(questions)} requests, expected two batches ({2 * arguments.batch}) or more"
        )
    rank, ranks = rank_of()
    size = arguments.batch // ranks
    return [questions[n * arguments.batch + rank * size :][:size] for n in range(count)]


def counted(runtime: Runtime, engine: Any, batches: Sequence[list[Any]], console: Console) -> list[Profile]:
    """A profile of every batch, over all processes."""
    group = dist.group.WORLD if dist.is_initialized() else None
    profiles = []
    for batch in track(batches, "counting", console=console, transient=True):
        with runtime.calibration():
            engine.generate(batch, tokens=1)
        profiles.append(runtime.measured_profile(group))
    return profiles


def measure(arguments: argparse.Namespace, console: Console) -> None:
    """Measure, show and write a profile of modality, or hold one against the model."""
    profile = None if arguments.check is None else Profile.load(arguments.check)
    with running(arguments) as (runtime, engine), torch.inference_mode():
        if profile is not None:
            for layer in runtime.layers:
                profile.row_of(layer.adapter.router_weight(), layer.top_k)
            console.print(f"{arguments.check} was measured on this model")
            return
        profiles = counted(runtime, engine, batches_of(arguments), console)
    if first_process():
        show(arguments, profiles, console)


def show(arguments: argparse.Namespace, profiles: Sequence[Profile], console: Console) -> None:
    """The profile of all batches, how stable it is, and its file."""
    profile, size = Profile.merged(profiles), arguments.batch
    steps = stability(profiles, size, THRESHOLD)
    console.print(bias_table(profile, THRESHOLD, steps[-1]))
    for one in steps:
        console.print(
            f"{one.requests:6d} requests a half: {float(one.alike.mean()):.0%} of the experts alike, "
            f"q differs by {float(one.difference.mean()):.3f}"
        )
    least = enough(steps)
    console.print(
        f"enough: {least} requests ({AGREEMENT:.0%} alike)"
        if least is not None
        else f"not enough yet: two halves class fewer than {AGREEMENT:.0%} of the experts alike; give more"
    )
    profile.save(arguments.out)
    console.print(f"profile of {len(profiles) * size} requests in {arguments.out}")


@dataclass(frozen=True)
class Stability:
    """Two profiles of so many requests each, on disjoint ones: the share of experts that both class
    alike, and the mean difference of their visual preference q, by layer [L]."""

    requests: int
    alike: torch.Tensor
    difference: torch.Tensor


def stability(profiles: Sequence[Profile], requests: int, threshold: float) -> list[Stability]:
    """Halves of even and odd batches against each other, of 1, 2, 4, ... batches and of all of them.

    ``requests``: in a batch, over all processes.
    """
    even, odd = profiles[::2], profiles[1::2]
    most = min(len(even), len(odd))
    sizes = [2**n for n in range(most.bit_length()) if 2**n < most]
    found = []
    for size in [*sizes, most]:
        one, other = Profile.merged(even[:size]), Profile.merged(odd[:size])
        alike = (one.bias(threshold) == other.bias(threshold)).double().mean(1)
        apart = (one.visual_preference() - other.visual_preference()).abs().mean(1)
        found.append(Stability(size * requests, alike, apart))
    return found


def enough(found: Sequence[Stability]) -> int | None:
    """Requests from which on two profiles class ``AGREEMENT`` of the experts alike; none if never."""
    answer = None
    for one in reversed(found):
        if float(one.alike.mean()) < AGREEMENT:
            break
        answer = one.requests
    return answer


def bias_table(profile: Profile, threshold: float, halves: Stability) -> Table:
    """Every layer's experts by modality bias."""
    bias, preference = profile.bias(threshold), profile.visual_preference()
    rows = []
    for layer in range(profile.num_layers):
        counts = [int((bias[layer] == sign).sum()) for sign in (1.0, 0.0, -1.0)]
        ends = [int(preference[layer].argmax()), int(preference[layer].argmin())]
        own = [f"{one}: {preference[layer, one]:.2f}" for one in ends]
        apart = f"{halves.alike[layer]:.0%}", f"{halves.difference[layer]:.3f}"
        rows.append([str(layer), *map(str, counts), *own, *apart])
    caption = (
        "q: 1 serves visual tokens alone, 0 text alone; alike, apart: experts that two halves of the "
        "requests class alike, and their mean difference of q"
    )
    heads = ("layer", "visual", "both", "text", "most visual", "least visual", "alike", "apart")
    return table(heads, rows, 0, title="experts by modality bias", caption=caption)
