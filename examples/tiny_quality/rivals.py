"""MACS beside visual-token pruning and expert balancing, at equal answers: KL against the time of a prefill.

    python examples/compare_pruning.py --tuning examples/tiny_vlm/tuning-4-ranks.safetensors --plot rivals.png

KL and loads are of a tiny model, planned in one process as ``--ranks`` expert-parallel ranks would. Times are
of a prefill of Qwen3-VL-30B-A3B by published costs (``macs when``), at the loads measured here: 16 k tokens a
rank, of prompts as ServeGen found them, with the vision encoder's time. Nothing overlaps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tiny_vlm import CHECKPOINT
from tiny_vlm.kinds import MIXES
from torch import Tensor

from macs import MACSConfig, Profile
from macs_tools.common.answers import read
from macs_tools.common.command import Parser, output_file
from macs_tools.common.intervals import bootstrap
from macs_tools.common.table import console, table
from macs_tools.hardware.machine import ENGINES, GPUS
from macs_tools.hardware.prefill import MODELS, Machine, Prefill, served_prompts
from macs_tools.report.placement import replicated
from macs_tools.tune import Scorer

from .model import scoring
from .picture import picture
from .points import profiles_of
from .pruning import AFTER, BEFORE, AfterLayer, Pruned

KEEPS = 0.95, 0.9, 0.75, 0.6, 0.5, 0.35, 0.25
BUDGETS = 3e-4, 1e-3, 3e-3, 1e-2, 1e-1
"""KL in nats within which the fastest point of every family is shown."""

SHAPE, TOKENS, RANKS, RANK = "qwen3-vl-30b-a3b", 16384, 8, 16
"""Of the prefill that is timed: model, tokens of a rank, expert-parallel ranks, rank of MACS's estimates."""

STACKED = 0.6, 0.4
"""Loads of MACS that are tried on top of pruning."""


@dataclass(frozen=True)
class Rival:
    """Pruning by a method to a share of the visual tokens, or none; then a target of MACS, or none."""

    method: str | None = None
    keep: float = 1.0
    target: float | None = None

    @property
    def title(self) -> str:
        pruning = f"{self.method}, {self.keep:g}" if self.method else ""
        ours = f"MACS {self.target:g}" if self.target else ""
        return " + ".join(filter(None, (pruning, ours))) or "as it is"


class Loads:
    """Rows of every expert by step and layer, before and after planning, of the tokens that are left."""

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts
        self.rows: list[Tensor] = []
        self.hidden: Tensor | None = None
        self.after = layers

    def __call__(self, event: Any) -> None:
        layer = len(self.rows) % self.layers
        counted = event.tokens.valid.flatten()
        if self.hidden is not None and layer >= self.after:
            counted = counted & ~self.hidden.flatten()
        both = [event.experts, event.experts if event.plan is None else event.plan.experts]
        chosen = (one[counted] for one in both)
        self.rows.append(
            torch.stack([torch.bincount(one[one >= 0], minlength=self.experts) for one in chosen])
        )

    def taken(self) -> np.ndarray:
        """[2, N, L, E], and forget them."""
        found = torch.stack(self.rows).view(-1, self.layers, 2, self.experts).movedim(2, 0)
        self.rows.clear()
        return found.double().numpy()


class Comparison:
    """The tiny model under rivals, one batch after the other."""

    def __init__(self, scorer: Scorer, profile: Profile, ranks: int) -> None:
        self.scorer, self.profile, self.ranks = scorer, profile, ranks
        said: Any = scorer.said
        self.model, self.inputs_of = said.model, said.inputs_of
        text: Any = self.model.config.text_config
        self.loads = Loads(text.num_hidden_layers, text.num_experts)
        scorer.runtime.on_plan(self.loads)
        scorer.said = self.said
        self.rival, self.counted = Rival(), [0]
        self.mean, self.tokens = np.zeros(0), 0  # of vanilla: rows of a rank, and tokens

    @contextmanager
    def reading(self, rival: Rival, number: int, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The inputs as the rival leaves them, and the model as it changes it."""
        if rival.method in BEFORE:
            pruned = Pruned(self.model, inputs, rival.method, rival.keep, number)
            with pruned.applied():
                yield pruned.inputs
            return
        if rival.method is None:
            yield inputs
            return
        after = AfterLayer(self.model, 1 + AFTER.index(rival.method), rival.keep)
        after.begin(inputs["input_ids"])
        self.loads.after, hidden = after.after, self.loads
        handle = self.model.model.language_model.layers[after.after].register_forward_pre_hook(
            lambda *_: setattr(hidden, "hidden", None if after.stays is None else ~after.stays)
        )
        try:
            yield inputs
        finally:
            handle.remove()
            after.remove()
            self.loads.hidden, self.loads.after = None, self.loads.layers

    def said(self, samples: Any, answers: list[list[int]]) -> list[Tensor]:
        """``Scorer.said``, of prompts as the rival leaves them."""
        with self.reading(self.rival, len(self.counted), self.inputs_of(samples)) as given:
            self.counted.append(int(given.get("attention_mask", torch.ones_like(given["input_ids"])).sum()))
            return read(self.model, self.scorer.runtime, given).said_of(answers)

    def use(self, rival: Rival) -> tuple[str, MACSConfig, Profile]:
        """The arguments of ``Runtime.use`` for the rival's target, or for none."""
        config = MACSConfig() if rival.target is None else MACSConfig(target_load=rival.target, split="tuned")
        return "vanilla" if rival.target is None else "macs", config, self.profile

    def measure(self, rival: Rival) -> dict[str, Any]:
        """Answers and loads of a rival, held against the model as it is, which comes first."""
        self.rival, self.counted = rival, []
        found = self.scorer.under(*self.use(rival))
        by_expert = self.loads.taken()
        before, after = by_expert.reshape(*by_expert.shape[:3], self.ranks, -1).sum(-1)
        if not self.tokens:
            self.mean, self.tokens = after.mean(-1), sum(self.counted)
        return {
            **asdict(rival),
            "title": rival.title,
            "kl": bootstrap(found.kl),
            "same": float(found.same.mean()),
            "tokens": sum(self.counted) / self.tokens,
            # Over the mean of the router's choice: by itself, planned; and over that of the model as it is.
            "natural": float((before.max(-1) / before.mean(-1)).mean()),
            "load": float((after.max(-1) / before.mean(-1)).mean()),
            "rows": float((after.max(-1) / self.mean).mean()),
            "eplb": with_replicas(by_expert[0], self.ranks),
        }


@contextmanager
def comparing(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """The comparison that a command line asks for."""
    profile = profiles_of(arguments.tuning)["macs", arguments.ranks]
    with scoring(arguments, arguments.batches[0]) as scorer:
        yield Comparison(scorer, profile, arguments.ranks)


def with_replicas(rows: np.ndarray, ranks: int) -> float:
    """Load with one replica on every rank, as EPLB places it by the batch before: rows [N, L, E]."""
    loads = []
    for known, now in zip(
        rows[:-1].reshape(-1, rows.shape[2]), rows[1:].reshape(-1, rows.shape[2]), strict=True
    ):
        computed = now @ replicated(known, ranks, 1, 0).share
        loads.append(computed.max() / computed.mean())
    return float(np.mean(loads))


def time_of(found: dict[str, Any], machine: Machine) -> Prefill:
    """Of a prefill at the loads that were found; layers before those that pruning reaches run in full."""
    prompts = served_prompts(TOKENS)
    pruned = prompts.pruned(found["keep"])
    limit = None if found["target"] is None else found["load"]
    rank = RANK if limit else 0
    time = machine.prefill(pruned, RANKS, found["natural"], limit, rank, encoded=prompts)
    if found["method"] in AFTER:
        share = (1 + AFTER.index(found["method"])) / 4  # of the tiny model's layers
        whole = asdict(machine.prefill(prompts, RANKS, found["natural"]))
        return Prefill(**{part: share * whole[part] + (1 - share) * ms for part, ms in asdict(time).items()})
    return time


def rivals(targets: Sequence[float]) -> list[Rival]:
    """All that is compared; the model as it is comes first."""
    pruning = [Rival(method, keep) for method in (*BEFORE, *AFTER) for keep in KEEPS]
    stacked = [(keep, target) for keep in (0.75, 0.5) for target in STACKED]
    both = [Rival(method, *one) for method in BEFORE[1:] for one in stacked]
    return [Rival(), *pruning, *(Rival(target=target) for target in targets), *both]


def timed(found: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: what was found, with milliseconds; and what changes no answer."""
    machine = Machine(arguments.hardware, arguments.engine, MODELS[SHAPE])

    def row(one: dict[str, Any], load: float | None = None) -> dict[str, Any]:
        one = one if load is None else {**one, "natural": load}
        time = time_of(one, machine)
        parts = {part: float(value) for part, value in asdict(time).items()}
        return {**one, **parts, "ms": float(time.total)}

    stock = row(found[0])
    rows = [row(one) for one in found]
    for title, load in (("EPLB, 1 replica a rank", stock["eplb"]), ("ideal balance", 1.0)):
        rows.append({**row(found[0], load), "title": title, "rows": load, "method": None})
    for one in rows:
        one["ratio"] = one["ms"] / stock["ms"]
        # A pruned model can be balanced besides, which changes no answer.
        balanced = one["method"] and not one["target"]
        one["with_eplb"] = row(one, one["eplb"])["ms"] / stock["ms"] if balanced else one["ratio"]
    return rows


def table_of(rows: list[dict[str, Any]], caption: str) -> Table:
    """Every rival, by the time of its prefill."""
    parts = ("vision", "attention", "moe", "exchange", "planning")
    cells = []
    for one in sorted(rows, key=lambda one: one["ms"]):
        kl, low, high = (1e3 * value for value in one["kl"])
        shares = (f"{one['same']:.3f}", f"{one['tokens']:.2f}", f"{one['rows']:.2f}")
        ratios = f"{one['ratio']:.2f}", f"{one['with_eplb']:.2f}", f"{kl:.3g}", f"{low:.2g}-{high:.2g}"
        cells.append([one["title"], *ratios, *shares, *(f"{one[part]:.0f}" for part in parts)])
    heads = ("", "time", "with EPLB", "KL x 1000", "95 %", "same", "tokens", "rows", *parts)
    return table(heads, cells, title="KL x 1000 against the time of a prefill", caption=caption)


def families_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Points that change answers, by method."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        if one["kl"][0] > 0:
            both = " + MACS" if one["method"] and one["target"] else ""
            found.setdefault((one["method"] or "MACS") + both, []).append(one)
    return found


def best_times(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Of every family the least time within each of ``BUDGETS``; pruning with EPLB."""
    return {
        family: [
            min((one["with_eplb"] for one in mine if one["kl"][0] <= budget), default=None)
            for budget in BUDGETS
        ]
        for family, mine in families_of(rows).items()
    }


def fastest(rows: list[dict[str, Any]]) -> Table:
    times = best_times(rows).items()
    cells = [[family, *("" if one is None else f"{one:.2f}" for one in each)] for family, each in times]
    heads = ["", *(f"{1e3 * budget:g}" for budget in BUDGETS)]
    return table(heads, cells, title="time over today's at most so much KL x 1000")


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """KL against time, a curve for each family."""
    with picture(path, figsize=(8, 4.5)) as axes:
        colours: dict[str, Any] = {}
        for family, mine in families_of(rows).items():
            method, _, both = family.partition(" + ")
            mine.sort(key=lambda one: one["with_eplb"])
            x, kl = [one["with_eplb"] for one in mine], [one["kl"][0] for one in mine]
            look: dict[str, Any] = {"linestyle": "-" if family == "MACS" else "--", "marker": "o"}
            look |= {"linestyle": "none", "marker": "x"} if both else {}
            colour = colours.get(method)
            (line,) = axes.plot(x, kl, **look, markersize=5, label=family, color=colour)
            colours[method] = line.get_color()
        for one in rows:
            if one["kl"][0] <= 0 and one["title"] != "as it is":
                axes.axvline(one["ratio"], linestyle=":", color="grey", linewidth=1)
                style = {"rotation": 90, "fontsize": 7, "ha": "right"}
                axes.text(one["ratio"], 0.5, one["title"], transform=axes.get_xaxis_transform(), **style)
        axes.set(
            xlabel="time of a prefill over today's, pruning with EPLB",
            ylabel="KL to the model as it is (nats)",
            yscale="log",
        )
        axes.set_title(title.replace("; ", ";\n"), fontsize=8)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("compare_pruning.py", __doc__)
    parser.add_argument("--tuning", nargs=1, type=Path, required=True, help="a profile of `macs tune`")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--batches", nargs=1, choices=tuple(MIXES), default=["mixed"])
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--questions", type=int, default=896)
    parser.add_argument("--batch", type=int, default=56)
    parser.add_argument("--ranks", type=int, default=4, help="that the tiny model is planned for")
    parser.add_argument("--targets", nargs="+", type=float, default=[1.05, 0.8, 0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--hardware", choices=GPUS, default="h100")
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--json", type=output_file, help="what was found; read again if it is there")
    parser.add_argument("--times", action="store_true", help="only time prefills here, on this machine")
    parser.add_argument("--plot", type=output_file)
    parser.set_defaults(seed=0)
    return parser.parse_args(given)


def compared(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Rows of the table: measured, or read again where ``--json`` has them; timed in any case."""
    if arguments.json is not None and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    else:
        with comparing(arguments) as comparison:
            found = [comparison.measure(one) for one in track(rivals(arguments.targets), console=console)]
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return timed(found, arguments)


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and show what was measured."""
    arguments, shown = parse_arguments(given), console()
    if arguments.times:
        from .rival_times import show_times

        with comparing(arguments) as comparison:
            show_times(comparison, shown)
        return
    rows = compared(arguments, shown)
    where = f"{arguments.hardware.upper()}, {ENGINES[arguments.engine]}, EP {RANKS}"
    model = f"{arguments.checkpoint.name}, {arguments.batches[0]}, {arguments.split} split"
    caption = f"answers of {model}; time of {SHAPE} on {where}, by published costs"
    shown.print(table_of(rows, caption))
    shown.print(fastest(rows))
    if arguments.plot is not None:
        plot(rows, arguments.plot, caption)
