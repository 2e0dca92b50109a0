"""Tables of the pages, from docs/results.json.

Each stands between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from macs_tools import when
from macs_tools.common.cost_model import break_even, captured
from macs_tools.common.workloads import SHAPES
from macs_tools.hardware.machine import machine

from .points import SETTINGS
from .rivals import BUDGETS, best_times
from .statistics import best_baseline, least_load

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "results.json"
PAGES = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "when.md"
MODELS = "main", "balanced", "unbalanced", "easy-vqa"
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Points = list[dict[str, Any]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def kl_of(point: dict[str, Any], interval: bool = False) -> str:
    """KL x 1000, with its 95 % interval."""
    mean, low, high = (f"{float(f'{1e3 * value:.2g}'):g}" for value in point["kl"])
    return f"{mean} ({low}-{high})" if interval else mean


def at(points: Points, title: str, target: float) -> dict[str, Any] | None:
    """The point of that title and target, if it was measured."""
    return next((one for one in points if (one["title"], one["target"]) == (title, target)), None)


def grid(
    corner: str,
    heads: Sequence[str],
    rows: Mapping[str, Sequence[dict[str, Any] | None]],
    cell: Callable[[dict[str, Any]], str] = kl_of,
) -> str:
    """Points by row and column, empty where none was measured."""
    shown = [[title, *("" if one is None else cell(one) for one in row)] for title, row in rows.items()]
    return table([corner, *heads], shown)


def targets_of(points: Points) -> list[float]:
    return sorted({one["target"] for one in points}, reverse=True)


def by_target(points: Points, interval: bool) -> str:
    """KL of every policy by target."""
    targets, titles = targets_of(points), dict.fromkeys(one["title"] for one in points)
    rows = {title: [at(points, title, target) for target in targets] for title in titles}
    return grid("KL x 1000", [*map("{:g}".format, targets)], rows, lambda one: kl_of(one, interval))


def models(runs: dict[str, Points]) -> str:
    """Loads by layer and right answers of every model without a limit."""
    rows = []
    for model in MODELS:
        one, eight = runs[f"frontier/{model}"][0], runs[f"8-ranks/{model}"][0]
        loads = one["vanilla_loads"]
        mean, of_eight = (sum(each) / len(each) for each in (loads, eight["vanilla_loads"]))
        by_layer = ", ".join(f"{load:.2f}" for load in loads)
        rows.append([model, by_layer, f"{mean:.2f}", f"{of_eight:.2f}", f"{one['vanilla_right']:.3f}"])
    return table(["model", "load by layer, 4 ranks", "mean", "8 ranks", "right answers"], rows)


def equal_kl(runs: dict[str, Points]) -> str:
    """The least load at the KL of the best baseline at 1.05."""
    rows = []
    for model in MODELS:
        points = runs[f"frontier/{model}"]
        known = best_baseline(points, 1.05)
        assert known is not None
        vanilla = sum(known["vanilla_loads"]) / len(known["vanilla_loads"])
        titles = ("token-drop, tuned", "macs", "macs, compensated", "macs, tuned")
        loads = (least_load(points, title, known["kl"][0]) for title in titles)
        cells = ["> 1.05" if load is None else f"{load:.2f}" for load in loads]
        rows.append([model, f"{vanilla:.2f}", known["title"], kl_of(known), *cells])
    head = ["model", "vanilla's load", "best baseline at 1.05", "its KL x 1000"]
    return table([*head, "token drop, tuned", "macs", "macs, compensated", "macs, tuned"], rows)


def same(runs: dict[str, Points]) -> str:
    """Share of answers that are vanilla's, word for word."""
    rows, targets = {}, targets_of(runs["frontier/main"])
    for model in MODELS:
        points = runs[f"frontier/{model}"]
        for title in ("token-drop", "macs", "macs, tuned"):
            rows[f"{model}: {title}"] = [at(points, title, target) for target in targets]
    return grid("same answer", [*map("{:g}".format, targets)], rows, lambda one: f"{one['same']:.3f}")


def kinds(runs: dict[str, Points]) -> str:
    """Of every kind of question: the best baseline at 1.05 beside MACS tuned on all kinds."""
    rows, asked = {}, [(title, target) for title in ("macs", "macs, tuned") for target in (1.05, 0.6, 0.4)]
    for model in ("main", "balanced", "unbalanced"):
        for kind in ("mixed", "small", "pair", "read"):
            mine = [one for one in runs[f"kinds/{model}"] if one["batches"] == kind]
            rows[f"{model}: {kind}"] = [best_baseline(mine, 1.05), *(at(mine, *one) for one in asked)]
    heads = [f"{title.removeprefix('macs, ')} {target}" for title, target in asked]
    return grid("KL x 1000", ["best baseline at 1.05", *heads], rows)


def settings(runs: dict[str, Points]) -> str:
    """KL of every setting; bold where its 95 % interval does not meet that of the defaults."""
    rows = []
    for title, (policy, _) in SETTINGS.items():
        cells = []
        for model in MODELS:
            for target in (1.05, 0.6):
                one = at(runs[f"settings/{model}"], title, target)
                default = at(runs[f"settings/{model}"], policy, target)
                assert one is not None and default is not None
                apart = one["kl"][1] > default["kl"][2] or one["kl"][2] < default["kl"][1]
                cells.append(f"**{kl_of(one)}**" if apart else kl_of(one))
        rows.append([title, *cells])
    head = [f"{model} {target}" for model in MODELS for target in (1.05, 0.6)]
    return table(["KL x 1000", *head], rows)


def texts(runs: dict[str, Points]) -> str:
    """Batches of text alone."""
    rows = {
        f"{model}: {title}": [at(runs[f"texts/{model}"], title, target) for target in (1.05, 0.6, 0.4)]
        for model in ("main", "balanced")
        for title in ("macs", "spare_text: true")
    }
    return grid(
        "KL x 1000", ["1.05", "0.6", "0.4"], rows, lambda one: f"{kl_of(one)}, load {one['load']:.2f}"
    )


def rivals(runs: dict[str, Points]) -> str:
    """Of every method the least time within a KL; the least of a model in bold."""
    rows = []
    for model in MODELS:
        points = runs[f"rivals/{model}"]
        eplb = next(one for one in points if one["title"].startswith("EPLB"))
        times = best_times(points)
        least = [min(filter(None, column), default=None) for column in zip(*times.values(), strict=True)]
        rows.append([f"**{model}** (EPLB alone {eplb['ratio']:.2f})", *[""] * len(BUDGETS)])
        for family, mine in times.items():
            shown = [f"{time:.2f}" if time else "" for time in mine]
            cells = [
                f"**{text}**" if text and text == f"{best:.2f}" else text
                for text, best in zip(shown, least, strict=True)
            ]
            rows.append([family, *cells])
    return table(["time / today's", *(f"KL x 1000 <= {1e3 * budget:g}" for budget in BUDGETS)], rows)


def layer(runs: dict[str, Points]) -> str:
    """Megatron's layer on two processes: time over vanilla's beside what rows alone say."""
    rows = [
        [
            f"{one['workload']}: {one['policy']}",
            f"{one['ratio']:.3f} ± {one['ratio_spread'] / 2:.3f}",
            f"{one['ideal']:.3f}",
            f"{one['load_after']:.2f}",
            f"{one['dropped']:.1%}",
            f"{one['kept_mass']:.3f}",
        ]
        for one in runs["bench/layer"]
    ]
    return table(["workload: policy", "time / vanilla", "by rows", "load", "dropped", "kept weight"], rows)


def planner(runs: dict[str, Points]) -> str:
    """Milliseconds of a plan, and its share of a vanilla layer."""
    titles = {
        "bench/planner-tiny": "T 2400, D 128, E 16, k 2, R 8",
        "bench/planner": "T 4096, D 1024, E 64, k 4, R 8",
    }
    rows = [
        [title, *(f"{one['ms']:.1f} ms, {one['ms'] / one['layer_ms']:.1%}" for one in runs[name])]
        for name, title in titles.items()
    ]
    return table(["", *(one["policy"] for one in runs["bench/planner"])], rows)


def prefill(*asked: str) -> str:
    """Rows of ``macs when``; what all of them share is left out."""
    arguments = when.parse_arguments([*asked, "--sizes", "8"])
    found, heads = list(when.rows(arguments)), when.columns(arguments)
    shown = [key for key in heads if key not in ("ranks", "ms") and len({one[key] for one in found}) > 1]
    return table(
        [heads[key] for key in shown], [[when.cell(key, one[key]) for key in shown] for one in found]
    )


def break_evens() -> str:
    """Tokens a rank from which balance alone pays for a plan, on 8 H100s; in brackets in a CUDA graph."""
    shape = SHAPES["qwen3-vl-30b-a3b"]
    engines = [machine("h100", engine, shape) for engine in ("trtllm", "vllm")]
    rows = [
        [
            f"{load:g}",
            *(
                f"{break_even(model, shape, 8, load)} ({break_even(captured(model), shape, 8, load)})"
                for model in engines
            ),
        ]
        for load in (1.1, 1.2, 1.5, 2.0)
    ]
    return table(["load", "TensorRT-LLM", "vLLM"], rows)


def front(runs: dict[str, Points]) -> str:
    """The README's: the main model, KL and predicted time by limit."""
    points, times = runs["frontier/main"], runs["rivals/main"]
    targets = (1.05, 0.8, 0.6, 0.4)
    ours = [at(points, "macs, tuned", target) for target in targets]
    baselines = [one for one in points if one["baseline"]]
    plain = [
        min((one for one in baselines if one["target"] == target), key=lambda one: one["kl"][0])
        for target in targets
    ]
    ratios = {one["target"]: one["ratio"] for one in times if one["target"] and not one["method"]}
    loads = ours[0]["vanilla_loads"] if ours[0] else []
    none = f"{sum(loads) / len(loads):.2f} (none)"
    rows = [
        ["KL x 1000, best baseline", "0", *map(kl_of, plain)],
        ["KL x 1000, MACS tuned", "0", *(kl_of(one) for one in ours if one)],
        ["same answers, MACS tuned", "1", *(f"{one['same']:.3f}" for one in ours if one)],
        ["predicted prefill time", "1", *(f"{ratios[target]:.2f}" for target in targets)],
    ]
    return table(["load limit, over the mean", none, *map("{:g}".format, targets)], rows)


def origin(figures: dict[str, Any]) -> str:
    """Commits and dates of the runs, by table, and the machines."""
    rows: dict[tuple[str, str], dict[str, None]] = {}
    for name, run in figures.items():
        rows.setdefault((run["commit"], run["date"]), {})[name.split("/")[0]] = None
    machines = "; ".join(dict.fromkeys(run["machine"] for run in figures.values()))
    runs = [[*key, ", ".join(names)] for key, names in rows.items()]
    return table(["commit", "date", "runs"], runs) + f"\nOn {machines}.\n"


def tables() -> dict[str, str]:
    """All of them, by name."""
    figures = json.loads(FIGURES.read_text())["runs"]
    runs = {name: run["points"] for name, run in figures.items()}
    made = {f"frontier-{model}": by_target(runs[f"frontier/{model}"], interval=True) for model in MODELS}
    made |= {f"8-ranks-{model}": by_target(runs[f"8-ranks/{model}"], interval=False) for model in MODELS}
    for make in (models, equal_kl, same, kinds, settings, texts, rivals, layer, planner, front):
        made[make.__name__.replace("_", "-")] = make(runs)
    made["prefill"] = prefill("--engines", "all", "--loads", "1.2", "1.5", "2", "3")
    several = ("--models", "all", "--hardware", "h100", "b200")
    made["prefill-models"] = prefill(*several, "--loads", "2")
    made["break-even"] = break_evens()
    return {**made, "origin": origin(figures)}


def written(page: str, made: dict[str, str]) -> str:
    """A page with its tables as they should be.

    Raises:
        KeyError: the page names a table that there is not
    """
    return BLOCK.sub(lambda block: block[1] + made[block[2]] + block[4], page)


def write_pages() -> None:
    """Write every page that has tables."""
    made = tables()
    for path in PAGES:
        path.write_text(written(path.read_text(), made))
