"""When MACS pays: the time of a prefill by model, GPU, engine, EP size and load, beside the alternatives.

    macs when                                                     # Qwen3-VL-30B-A3B on H100s under vLLM
    macs when --models all --engines all --hardware all --loads 1.2 2
    macs when --target 0.4 --keep 0.5 --tokens 4096               # other limits, other prompts

Every rank reads --tokens of prompts as ServeGen found them in production (572 text and 870 visual tokens of
two images). Times by published costs (``macs_tools.hardware``): of the vision encoder, attention with all
dense layers, experts, exchange and plan; nothing overlaps. Load: rows of the largest rank over the mean,
without MACS (``macs report`` measures yours). Balanced: the most that EPLB can reach; no answer changes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from .common.command import Parser
from .common.table import console, table
from .hardware.machine import DTYPE_BYTES, ENGINES, GPUS, figures
from .hardware.prefill import MODELS, Machine, Prefill, served_prompts

ENCODER, LITTLE = 0.35, 0.05
"""Shares of the time: of the vision encoder, from which it is the first thing to move; of a gain, below which
it is not worth a change."""

BALANCE = 1.05
"""Target of MACS that balances only."""

PARTS = ("vision", "attention", "moe", "exchange")


def first(today: Prefill, gains: dict[str, float]) -> str:
    """What to do first: what changes no answer before what does."""
    if today.vision / today.total >= ENCODER:
        return "move the encoder"
    if gains["balanced"] >= LITTLE:
        return "EPLB, then MACS" if gains["macs"] >= gains["balanced"] + LITTLE else "EPLB"
    return "tune MACS, or prune" if max(gains["macs"], gains["pruned"]) >= LITTLE else "none of these"


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each case, times in ms."""
    prompts = served_prompts(arguments.tokens)
    pruned = prompts.pruned(arguments.keep)
    rank = arguments.compensation_rank
    cases = itertools.product(
        arguments.models, arguments.hardware, arguments.engines, arguments.sizes, arguments.loads
    )
    for name, gpu, engine, size, load in cases:
        model = MODELS[name]
        if model.experts % size or load > size:
            continue
        machine = Machine(gpu, engine, model, arguments.dtype)
        today = machine.prefill(prompts, size, load)
        others = {"balanced": machine.prefill(prompts, size, 1.0)}
        for title, limit, estimates in (("bound", BALANCE, 0), ("macs", arguments.target, rank)):
            others[title] = machine.prefill(prompts, size, load, limit, estimates)
        others["pruned"] = machine.prefill(pruned, size, load, encoded=prompts)
        others["both"] = machine.prefill(pruned, size, load, arguments.target, rank, encoded=prompts)
        gains = {title: 1 - float(one.total / today.total) for title, one in others.items()}
        yield {
            "model": name,
            "gpu": gpu,
            "engine": ENGINES[engine],
            "ranks": size,
            "load": load,
            "ms": float(today.total),
            **{part: float(getattr(today, part) / today.total) for part in PARTS},
            **{title: 1 - gain for title, gain in gains.items()},
            "first": first(today, gains),
        }


def columns(arguments: argparse.Namespace) -> dict[str, str]:
    """Headings by key of a row."""
    return {
        "model": "model",
        "gpu": "GPU",
        "engine": "engine",
        "ranks": "EP",
        "load": "load",
        "ms": "ms",
        "vision": "vision",
        "attention": "attention",
        "moe": "MoE",
        "exchange": "exchange",
        "balanced": "balanced",
        "bound": f"MACS {BALANCE:g}",
        "macs": f"MACS {arguments.target:g}" + (" with estimates" if arguments.target == BALANCE else ""),
        "pruned": f"pruned to {arguments.keep:g}",
        "both": "both",
        "first": "do first",
    }


def cell(key: str, value: Any) -> str:
    if key in PARTS:
        return f"{value:.0%}"
    if key in ("balanced", "bound", "macs", "pruned", "both"):
        return f"{value:.2f}"
    return f"{value:.0f}" if key == "ms" else f"{value:g}" if isinstance(value, float) else str(value)


def legend(arguments: argparse.Namespace) -> str:
    source = figures()["source"]
    return (
        f"{arguments.tokens} tokens a rank, {arguments.dtype}. Shares of today's time to the first token, "
        f"the columns behind them times over today's. MACS {arguments.target:g} with estimates of rank "
        f"{arguments.compensation_rank} for what is dropped. Fitted to measurements that {source['package']} "
        f"{source['version']} publishes; for Kimi-VL and DeepSeek-VL2 to those of other shapes; extrapolated "
        "beyond 16384 tokens of all ranks together, and for two and eight nodes."
    )


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("macs when", __doc__)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, "all"), default=["qwen3-vl-30b-a3b"])
    parser.add_argument("--hardware", nargs="+", choices=(*GPUS, "all"), default=["h100"])
    parser.add_argument("--engines", nargs="+", choices=(*ENGINES, "all"), default=["vllm"])
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bf16", help="of the weights")
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 32], help="EP sizes, 8 ranks a node")
    parser.add_argument("--loads", nargs="+", type=float, default=[1.1, 1.2, 1.5, 2.0, 3.0])
    parser.add_argument("--tokens", type=int, default=16384, help="of a rank in a step")
    parser.add_argument("--target", type=float, default=0.6, help="limit of MACS below the mean")
    parser.add_argument("--keep", type=float, default=0.5, help="share of visual tokens that pruning keeps")
    parser.add_argument("--compensation-rank", type=int, default=16, help="of MACS's estimates; 0: none")
    arguments = parser.parse_args(given)
    for name, known in (("models", MODELS), ("hardware", GPUS), ("engines", ENGINES)):
        if "all" in getattr(arguments, name):
            setattr(arguments, name, list(known))
    parser.positive(arguments, "sizes", "loads", "tokens", "target", "keep")
    if arguments.keep > 1:
        parser.error(f"--keep: found {arguments.keep}, expected at most 1")
    if arguments.compensation_rank < 0:
        parser.error(f"--compensation-rank: found {arguments.compensation_rank}, expected 0 or more")
    if min(arguments.loads) < 1:
        parser.error(f"--loads: found {min(arguments.loads)}, expected 1 or more")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(given)
    found, heads = list(rows(arguments)), columns(arguments)
    if not found:
        raise ValueError("macs when: found no case, expected EP sizes that divide a model's experts")
    # What all rows share is not repeated.
    same = [key for key in ("model", "gpu", "engine") if len({one[key] for one in found}) == 1]
    shown = {key: head for key, head in heads.items() if key not in same}
    title = ", ".join(found[0][key] if key != "gpu" else found[0][key].upper() for key in same)
    cells = ([cell(key, one[key]) for key in shown] for one in found)
    names = sum(key in ("model", "gpu", "engine") for key in shown)
    console().print(table(list(shown.values()), cells, names, title=title, caption=legend(arguments)))


if __name__ == "__main__":
    main()
