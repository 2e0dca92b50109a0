"""What MACS costs and what it gains, beside the baselines and beside what is possible.

    macs bench planner        # the planner alone: its parts, its share of a layer, its memory
    macs bench layer          # Megatron's real MoE layer on two expert-parallel processes

Every policy runs on the same inputs in the same turns, one after the other, first come first in turn; the
time of a step is its slowest rank's. A policy is timed only after its output has been checked against
the same plan computed by another dispatcher. Ratios are to vanilla, stock Megatron, in the same turn. The
ideal ratio is that of the largest ranks' rows; its share is the ideal ratio over the measured one.

Shapes: T tokens of a source rank, D features, E experts, k experts a token, R ranks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..common.command import Parser, output_file
from ..common.traces import load_recordings
from ..common.workloads import (
    LADDER,
    NOTHING_OVER,
    SHAPES,
    VANILLA,
    WORKLOADS,
    Batch,
    Contender,
    contenders,
    draw,
    loosened,
    replay,
)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("macs bench", __doc__)
    parser.add_argument("mode", choices=("planner", "layer"))
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--tokens", type=int, help="of a source rank, instead of the shape's")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--policies", nargs="+", help="titles to run beside vanilla (default: all)")
    parser.add_argument("--load", type=float, default=1.05, help="target_load of every policy")
    parser.add_argument(
        "--ladder", nargs="*", type=float, default=[], help="further bounds for the drops and for macs"
    )
    parser.add_argument(
        "--compensation-rank",
        type=int,
        help="of layer: macs under each bound with estimates of this rank, too",
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, help="of each process (default: all cores, divided)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a workload")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recordings", nargs="+", type=Path, help="one file for each source rank, instead")
    parser.add_argument("--layer", type=int, default=0, help="layer of the recordings")
    parser.add_argument("--experts", type=int, help="of a layer, where a trace does not say")
    parser.add_argument("--json", type=output_file, help="append the result, one line")
    parser.add_argument("--save-cost-model", type=Path, help="write this machine's, for macs report")
    arguments = parser.parse_args(given)
    arguments.shape_name, arguments.shape = arguments.shape, SHAPES[arguments.shape]
    if arguments.mode == "planner" and arguments.shape_name == "cpu":
        arguments.shape = replace(arguments.shape, tokens=4096)
    if arguments.tokens:
        arguments.shape = replace(arguments.shape, tokens=arguments.tokens)
    if arguments.recordings:
        if arguments.mode != "layer":
            parser.error(f"--recordings: found mode {arguments.mode}, expected layer")
        recordings = load_recordings(arguments.recordings, arguments.experts)
        arguments.played = replay(recordings, arguments.layer, arguments.shape.tokens)
        arguments.ranks, arguments.workloads = len(recordings), ["recording"]
        arguments.shape = replace(
            arguments.shape,
            experts=recordings[0].num_experts,
            top_k=recordings[0].top_k,
            tokens=len(arguments.played[0][0].ids),
        )
    parser.positive(arguments, "ranks", "steps", "repeats", "threads", "tokens")
    if arguments.mode != "planner" and arguments.shape.experts % arguments.ranks:
        parser.error(
            f"--ranks: found {arguments.ranks}, expected a divisor of the {arguments.shape.experts} experts"
        )
    if arguments.compensation_rank is not None and arguments.mode != "layer":
        parser.error(f"--compensation-rank: found mode {arguments.mode}, expected layer")
    if arguments.threads is None:
        processes = arguments.ranks if arguments.mode == "layer" else 1
        arguments.threads = max(1, (os.cpu_count() or 1) // processes)
    known_titles = contenders(arguments.load)
    for title in arguments.policies or ():
        if title not in known_titles:
            parser.error(f"--policies: found {title!r}, expected some of {', '.join(known_titles)}")
    return arguments


def running(arguments: argparse.Namespace) -> dict[str, Contender]:
    """The policies asked for, vanilla first."""
    chosen = contenders(arguments.load)
    titles = [VANILLA, *(arguments.policies or list(chosen)[1:])]
    found = {title: chosen[title] for title in dict.fromkeys(titles)}
    for title in LADDER:
        if title in found:
            found.update(loosened(title, chosen[title], bound) for bound in arguments.ladder)
    if arguments.compensation_rank is not None:
        for title, one in list(found.items()):
            if one.policy == "macs" and title not in (NOTHING_OVER, "macs fast", "macs safe"):
                compensated = one.config.updated(compensation="all")
                found[f"{title}, compensated"] = replace(one, config=compensated)
    return found


def steps_of(arguments: argparse.Namespace, workload: str) -> Callable[[int, int], Batch]:
    """The batch of a step and source rank."""
    if arguments.recordings:
        batches = arguments.played
        return lambda step, rank: batches[step % len(batches)][rank]
    return lambda step, rank: draw(workload, arguments.shape, step, rank, arguments.ranks, arguments.seed)
