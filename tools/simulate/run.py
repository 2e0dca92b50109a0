"""How long MoE layers take on clusters nobody has at hand, by policy, from routings and measured costs.

    macs simulate --shape wide --ranks 8 16 32 64 128 256 512        # synthetic traffic
    macs simulate --recordings runs/routing.rank*.safetensors        # one's own
    macs simulate --check runs/layer.jsonl                           # against measurements

Every source rank's tokens are drawn, or taken from a recording, and planned by the real planner; the rows
that result go through a cost model (tools/common/cost_model.py) whose figures come from ``macs bench
layer --save-cost-model`` or are stated. Beside the policies stand bounds that move weights instead of
tokens: EPLB with replicated experts (placed by the loads of the step before), least-loaded EP (spills to
idle ranks, weights sent along), and ideal balance; what they take in memory and traffic is counted, and
not overlapped with anything.

Shapes: R ranks, E experts; asked [R, E] rows that each source sends to each expert.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from macs import Recording

from ..common.command import Parser, output_file, output_folder, quiet
from ..common.cost_model import CostModel, on_network, stated_h100
from ..common.traces import load_recordings
from ..common.workloads import (
    SHAPES,
    VANILLA,
    WORKLOADS,
    Batch,
    contenders,
    stream,
    with_visual_share,
)
from .layers import resampled, simulate, synthetic
from .report import plot_over, show, show_break_even


def parse_arguments(given: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[Recording]]:
    """The command line, and the recordings it names."""
    parser = Parser("macs simulate", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--tokens", type=int, default=1024, help="of a source rank")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["image-flood"])
    parser.add_argument(
        "--recordings", nargs="+", type=Path, help="one's own, or Megatron's routing traces (.jsonl)"
    )
    parser.add_argument("--layer", type=int, default=0, help="layer of the recordings")
    parser.add_argument("--experts", type=int, help="of a layer, where a trace does not say")
    parser.add_argument("--policies", nargs="+", help="titles beside vanilla (default: all with a bound)")
    parser.add_argument("--load", type=float, default=1.05)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=48, help="MoE layers of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", nargs="*", type=int, default=[1, 2], help="of EPLB, on every rank")
    parser.add_argument("--interval", type=int, default=100, help="steps between placements of EPLB")
    parser.add_argument("--cost-model", type=Path, help="of macs bench layer (default: an H100 as stated)")
    parser.add_argument("--inside-gbs", type=float, help="10^9 bytes/s of a rank within its node")
    parser.add_argument("--beyond-gbs", type=float, help="10^9 bytes/s of a rank beyond it")
    parser.add_argument("--node", type=int, help="ranks of a node")
    parser.add_argument("--shares", nargs="*", type=float, default=[], help="visual shares to sweep")
    parser.add_argument(
        "--break-even", action="store_true", help="from how many tokens a rank on a plan pays, alone"
    )
    parser.add_argument("--plots", type=output_folder)
    parser.add_argument("--json", type=output_file, help="append the result, one line")
    arguments = parser.parse_args(given)
    known = contenders(arguments.load)
    for title in arguments.policies or ():
        if title not in known:
            parser.error(f"--policies: found {title!r}, expected some of {', '.join(known)}")
    if arguments.steps < 1 or arguments.interval < 1:
        parser.error("--steps, --interval: expected 1 or more")
    experts = SHAPES[arguments.shape].experts
    if arguments.experts is not None and not arguments.recordings:
        parser.error("--experts: found without --recordings, whose traces it is of")
    recordings = []
    if arguments.recordings:
        recordings = load_recordings(arguments.recordings, arguments.experts)
        experts = recordings[0].num_experts
    for count in arguments.ranks:
        if count < 1 or experts % count:
            parser.error(f"--ranks: found {count}, expected divisors of the {experts} experts")
    return arguments, recordings


def main(given: Sequence[str] | None = None) -> None:
    arguments, recordings = parse_arguments(given)
    quiet()
    console = Console(width=None if sys.stdout.isatty() else 165)
    result: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(arguments).items()}}
    if arguments.break_even:
        show_break_even(SHAPES[arguments.shape], arguments.ranks[0], console)
    else:
        result |= run(arguments, recordings, console)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(result) + "\n")


def run(arguments: argparse.Namespace, recordings: Sequence[Recording], console: Console) -> dict[str, Any]:
    shape = replace(SHAPES[arguments.shape], tokens=arguments.tokens)
    model = CostModel.load(arguments.cost_model) if arguments.cost_model else stated_h100(shape)
    model.check(shape)
    model = on_network(model, arguments.inside_gbs, arguments.beyond_gbs, arguments.node)
    known = contenders(arguments.load)
    titles = arguments.policies or [title for title in list(known)[1:] if "nothing" not in title]
    chosen = {title: known[title] for title in (VANILLA, *titles)}
    options = {
        "steps": arguments.steps,
        "replicas": arguments.replicas,
        "interval": arguments.interval,
        "seed": arguments.seed,
    }
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {"cost_model": asdict(model), "sizes": {}, "shares": []}
    names = ["recording"] if recordings else arguments.workloads
    for name in names:
        rows: list[dict[str, Any]] = []
        for ranks in track(arguments.ranks, name, console=console):
            if recordings:
                shape, batch_of = resampled(recordings, arguments.layer, shape, arguments.seed)
            else:
                batch_of = synthetic(name, shape, ranks, arguments.seed)
            rows += simulate(shape, ranks, batch_of, chosen, model, **options)
        everything["sizes"][name] = rows
        for ranks in arguments.ranks:
            show([row for row in rows if row["ranks"] == ranks], name, arguments.layers, model, console)
        if arguments.plots:
            title = f"{name}, T {shape.tokens} a rank, E {shape.experts}, k {shape.top_k}; {model.origin}"
            plot_over(rows, "ranks", arguments.plots / f"size-{name}.png", title, "expert-parallel ranks")
    if arguments.shares:
        ranks = arguments.ranks[-1]
        for share in track(arguments.shares, "shares", console=console):
            flood = with_visual_share(share)

            def batch_of(step: int, rank: int, flood: Any = flood, share: float = share) -> Batch:
                return flood(shape, step, rank, ranks, stream(f"share {share}", arguments.seed, step, rank))

            rows = simulate(shape, ranks, batch_of, chosen, model, **options)
            everything["shares"] += [row | {"share": share} for row in rows]
        if arguments.plots:
            title = f"{ranks} ranks, T {shape.tokens} a rank, E {shape.experts}; {model.origin}"
            plot_over(everything["shares"], "share", arguments.plots / "share.png", title, "visual share")
    return everything
