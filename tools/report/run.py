"""Recorded traffic, and what would be won on it, as one page that needs no network.

    macs report runs/routing.rank*.safetensors --out report.html
    macs report router_trace_rank*.jsonl --experts 128 --out report.html     # Megatron's routing traces
    macs report routing.safetensors --profile model.safetensors --out report.html
    macs report --workload W6 --shape cpu --out report.html                  # one that is drawn, to see

Is the traffic skewed, by layer, expert, modality and over time; what would each policy and target make of it
on clusters of several sizes, beside balancers that move weights; what to put on the command line, and when
not to. Record with --moe-macs-record, the DeepSpeed block's "record", or Runtime.record_routing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from macs import Profile, Recording
from macs.version import __version__

from ..common.command import Parser, output_file, quiet
from ..common.cost_model import CostModel, stated_h100
from ..common.traces import load_recordings
from ..common.workloads import SHAPES, WORKLOADS, Shape, draw
from .advice import Advice, advise
from .figures import THEMES, Figure, figures
from .prediction import Prediction, predict, sizes_for
from .traffic import Traffic, default_ranks, measured

MOST_TOKENS, FEWEST_TOKENS = 1024, 64
"""Of a rank, in what is predicted for: a plan of more takes its time here."""


def render(
    traffic: Traffic, prediction: Prediction, advice: Advice, shown: list[Figure], sources: str
) -> str:
    """The page."""
    import jinja2
    from plotly.offline import get_plotlyjs

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (Path(__file__).parent / "page.html").read_text()
    )
    return template.render(
        title="MoE traffic, and what MACS would win on it",
        traffic=traffic,
        prediction=prediction,
        advice=advice,
        figures=shown,
        sources=sources,
        themes=THEMES,
        themes_json=json.dumps(THEMES),
        plotly=get_plotlyjs(),
        version=__version__,
    )


def drawn(workload: str, shape: Shape, ranks: int = 8, layers: int = 4, steps: int = 16) -> list[Recording]:
    """Traffic of a workload as every rank would have recorded it, each layer's of another seed."""
    found = []
    for rank in range(ranks):
        batches = [
            draw(workload, shape, step, rank, ranks, layer)
            for step in range(steps)
            for layer in range(layers)
        ]
        found.append(
            Recording(
                shape.experts,
                ranks,
                {
                    "layers": torch.arange(layers, dtype=torch.int32).repeat(steps),
                    "steps": torch.arange(steps).repeat_interleave(layers),
                    "counts": torch.tensor([len(one.ids) for one in batches]),
                    "experts": torch.cat([one.experts for one in batches]).short(),
                    "weights": torch.cat([one.weights for one in batches]).half(),
                    "modality": torch.cat([one.ids for one in batches]),
                },
            )
        )
    return found


def report(
    recordings: Sequence[Recording],
    out: Path,
    *,
    profile: Path | None = None,
    ranks: int | None = None,
    sizes: Sequence[int] | None = None,
    tokens: int | None = None,
    shape: Shape = SHAPES["qwen3-vl-30b-a3b"],
    model: CostModel | None = None,
    sources: str = "",
) -> Advice:
    """Write the page of these recordings to ``out``; see the command's help for the rest."""
    traffic = measured(recordings, default_ranks(recordings) if ranks is None else ranks)
    typical = int(np.median(traffic.tokens))
    count = min(MOST_TOKENS, max(FEWEST_TOKENS, typical)) if tokens is None else tokens
    shape = replace(shape, tokens=count, experts=traffic.experts, top_k=traffic.top_k)
    model = stated_h100(shape) if model is None else model
    model.check(shape)
    loaded = None if profile is None else Profile.load(profile)
    chosen = sizes_for(traffic.experts) if sizes is None else sizes
    prediction = predict(recordings, traffic, loaded, model, shape, chosen)
    advice = advise(traffic, prediction, loaded, profile)
    out.write_text(render(traffic, prediction, advice, figures(traffic, prediction), sources))
    return advice


def main(given: Sequence[str] | None = None) -> None:
    parser = Parser("macs report", __doc__)
    parser.add_argument("recordings", nargs="*", type=Path, help="of each rank of one run")
    parser.add_argument("--workload", choices=WORKLOADS, help="instead: drawn traffic, of --shape, 8 ranks")
    parser.add_argument("--out", type=output_file, required=True, help="the page, .html")
    parser.add_argument("--profile", type=Path, help="perhaps tuned: its verified KL is shown")
    parser.add_argument("--experts", type=int, help="of a layer, where a trace does not say")
    parser.add_argument("--ranks", type=int, help="whose load is shown (default: the run's)")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        help="ranks to predict for (default: of 8, 32, 128, 512 those that divide the experts)",
    )
    parser.add_argument(
        "--tokens", type=int, help=f"of a rank (default: the median step's, to {MOST_TOKENS})"
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="qwen3-vl-30b-a3b", help="whose experts' size to reckon with"
    )
    parser.add_argument("--cost-model", type=Path, help="of macs bench layer (default: an H100 as stated)")
    arguments = parser.parse_args(given)
    if bool(arguments.recordings) == bool(arguments.workload):
        parser.error("expected recordings, or a --workload")
    for path in (*arguments.recordings, *filter(None, (arguments.profile, arguments.cost_model))):
        if not path.is_file():
            parser.error(f"found no file {str(path)!r}")
    for name in ("ranks", "tokens", "experts"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name}: found {getattr(arguments, name)}, expected 1 or more")
    quiet()
    if arguments.workload:
        recordings = drawn(arguments.workload, SHAPES[arguments.shape])
    else:
        recordings = load_recordings(arguments.recordings, arguments.experts)
    experts = recordings[0].num_experts
    for size in arguments.sizes or ():
        if size < 2 or experts % size:
            parser.error(f"--sizes: found {size}, expected divisors of the {experts} experts, 2 or more")
    advice = report(
        recordings,
        arguments.out,
        profile=arguments.profile,
        ranks=arguments.ranks,
        sizes=arguments.sizes,
        tokens=arguments.tokens,
        shape=SHAPES[arguments.shape],
        model=CostModel.load(arguments.cost_model) if arguments.cost_model else None,
        sources=", ".join(path.name for path in arguments.recordings) or f"workload {arguments.workload}",
    )
    console = Console(soft_wrap=True)
    console.print(advice.verdict)
    console.print(f"{arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
