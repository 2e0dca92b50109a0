"""Recorded traffic, and what policies and balancers would win on it, on clusters of several sizes.

    macs report runs/routing.rank*.safetensors                               # tables in the terminal
    macs report runs/routing.rank*.safetensors --out report.html             # and a page
    macs report router_trace_rank*.jsonl --experts 128                       # Megatron's routing traces
    macs report router_trace_rank0.jsonl --to routing.safetensors            # convert, either way

Shows load by layer, expert, modality and time; predicts the time of a MoE layer by policy and target beside
EPLB, least-loaded EP and ideal balance, with the real planner and a cost model; says which flags to use, and
when not to. Record with --moe-macs-record, the DeepSpeed block's "record", or Runtime.record_routing.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from macs import TEXT, Profile, Recording
from macs.version import __version__

from ..common.command import Parser, output_file, quiet
from ..common.cost_model import CostModel
from ..common.table import console
from ..common.traces import is_trace, load_recordings, write_trace
from ..common.workloads import SHAPES, Shape
from ..hardware.machine import DTYPE_BYTES, ENGINES, GPUS, machine
from .advice import Advice, advise
from .figures import figures
from .prediction import TARGETS, Prediction, predict, sizes_for
from .table import COLUMNS, LEGEND, cells, show
from .traffic import Traffic, default_ranks, measured

MOST_TOKENS, FEWEST_TOKENS = 1024, 64
"""Of a rank, in what is predicted for: a plan of more takes its time here."""


def render(traffic: Traffic, prediction: Prediction, advice: Advice, sources: str) -> str:
    """The page."""
    import jinja2

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (Path(__file__).parent / "page.html").read_text()
    )
    return template.render(
        title="MoE traffic, and what MACS would win on it",
        traffic=traffic,
        prediction=prediction,
        advice=advice,
        figures=figures(traffic, prediction),
        columns=[heading for heading, _ in COLUMNS.values()],
        cells=cells,
        legend=LEGEND,
        sources=sources,
        version=__version__,
    )


def convert(paths: Sequence[Path], to: Path, experts: int | None, ranks: int | None) -> str:
    """Write one of Megatron's traces as a recording, or a recording as a trace; returns a summary."""
    if len(paths) != 1 or is_trace(paths[0]) == is_trace(to):
        names = [path.name for path in paths]
        raise ValueError(
            f"--to {to.name}: found {names}, expected one .jsonl for a .safetensors, or one back"
        )
    recording = load_recordings(paths, experts, ranks)[0]
    if is_trace(to):
        rank = re.search(r"rank(\d+)", paths[0].name)
        write_trace(recording, to, int(rank[1]) if rank else 0)
    else:
        recording.save(to)
    tensors = recording.tensors
    visual = float((tensors["modality"] != TEXT).double().mean())
    return (
        f"{len(tensors['counts'])} records of {int(tensors['layers'].max()) + 1} layers, "
        f"{len(tensors['modality'])} tokens, {visual:.0%} of them visual, {recording.top_k} of "
        f"{recording.num_experts} experts each: {to}"
    )


def report(
    recordings: Sequence[Recording],
    *,
    profile: Path | None = None,
    ranks: int | None = None,
    sizes: Sequence[int] | None = None,
    tokens: int | None = None,
    shape: Shape = SHAPES["qwen3-vl-30b-a3b"],
    model: CostModel | None = None,
    targets: Sequence[float] = TARGETS,
) -> tuple[Traffic, Prediction, Advice]:
    """What the recordings hold, what is predicted for them, and the advice; arguments as the command's."""
    traffic = measured(recordings, default_ranks(recordings) if ranks is None else ranks)
    typical = int(np.median(traffic.tokens))
    count = min(MOST_TOKENS, max(FEWEST_TOKENS, typical)) if tokens is None else tokens
    shape = replace(shape, tokens=count, experts=traffic.experts, top_k=traffic.top_k)
    model = machine("h100", "trtllm", shape) if model is None else model
    model.check(shape)
    loaded = None if profile is None else Profile.load(profile)
    chosen = sizes_for(traffic.experts) if sizes is None else sizes
    prediction = predict(recordings, traffic, loaded, model, shape, chosen, targets)
    return traffic, prediction, advise(traffic, prediction, loaded, profile)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("macs report", __doc__)
    parser.add_argument("recordings", nargs="+", type=Path, help="of each rank of one run")
    parser.add_argument("--out", type=output_file, help="a page with pictures, .html")
    parser.add_argument("--json", type=output_file, help="the prediction's rows, one JSON object")
    parser.add_argument(
        "--to", type=output_file, help="only convert: trace (.jsonl) or recording (.safetensors)"
    )
    parser.add_argument("--profile", type=Path, help="its tuned splits are predicted, its verified KL shown")
    parser.add_argument("--experts", type=int, help="of a layer, where a trace does not say")
    parser.add_argument("--ranks", type=int, help="whose load is shown (default: the run's)")
    sizes = "ranks to predict for (default: of 8, 32, 128, 512 those that divide the experts)"
    parser.add_argument("--sizes", nargs="+", type=int, help=sizes)
    tokens = f"of a rank (default: the median step's, to {MOST_TOKENS})"
    parser.add_argument("--tokens", type=int, help=tokens)
    shape = "sizes of the experts to predict for"
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-vl-30b-a3b", help=shape)
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="loads of MACS")
    parser.add_argument("--hardware", choices=GPUS, help="GPU whose published times are used (default: h100)")
    engine = "whose times of experts on it (default: trtllm, the nearest to Megatron's grouped GEMM)"
    parser.add_argument("--engine", choices=ENGINES, help=engine)
    parser.add_argument("--dtype", choices=DTYPE_BYTES, help="of the experts' weights (default: bf16)")
    parser.add_argument("--cost-model", type=Path, help="instead: a machine of macs bench layer")
    arguments = parser.parse_args(given)
    asked = [name for name in ("hardware", "engine", "dtype") if getattr(arguments, name)]
    if arguments.cost_model and asked:
        parser.error(f"--cost-model: found --{asked[0]} besides, expected one of them")
    for path in (*arguments.recordings, *filter(None, (arguments.profile, arguments.cost_model))):
        if not path.is_file():
            parser.error(f"found no file {str(path)!r}")
    parser.positive(arguments, "ranks", "tokens", "experts", "targets")
    if arguments.experts is not None and not any(map(is_trace, arguments.recordings)):
        parser.error("--experts: found without a trace (.jsonl), which it is of")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(given)
    if arguments.to:
        print(convert(arguments.recordings, arguments.to, arguments.experts, arguments.ranks))
        return
    quiet()
    shape = SHAPES[arguments.shape]
    recordings = load_recordings(arguments.recordings, arguments.experts, arguments.ranks)
    experts = recordings[0].num_experts
    for size in arguments.sizes or ():
        if size < 2 or experts % size:
            raise ValueError(f"--sizes: found {size}, expected divisors of the {experts} experts, 2 or more")
    if arguments.cost_model:
        model = CostModel.load(arguments.cost_model)
    else:
        shape = replace(shape, experts=experts, top_k=recordings[0].top_k)
        gpu, engine = arguments.hardware or "h100", arguments.engine or "trtllm"
        model = machine(gpu, engine, shape, arguments.dtype or "bf16")
    traffic, prediction, advice = report(
        recordings,
        profile=arguments.profile,
        ranks=arguments.ranks,
        sizes=arguments.sizes,
        tokens=arguments.tokens,
        shape=shape,
        model=model,
        targets=arguments.targets,
    )
    show(prediction, advice, console())
    if arguments.json:
        result = {"rows": prediction.rows, "layers": prediction.layers, "verdict": advice.verdict}
        arguments.json.write_text(json.dumps(result | {"costs": prediction.model.origin}) + "\n")
    if arguments.out:
        names = ", ".join(path.name for path in arguments.recordings)
        arguments.out.write_text(render(traffic, prediction, advice, names))
        print(f"{arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
