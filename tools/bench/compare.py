"""The planner of this checkout beside that of another, in one process: time, operators, plans, and its way.

    git worktree add /tmp/before ba85d0f
    macs bench compare --against /tmp/before              # times in turn, one thread; operators
    macs bench compare --against /tmp/before --plans      # plans on what the tiny model's routers chose
    macs bench compare --way                              # where the features go, function by function

Times are medians of calls in turn; a step of weights stands beside a log-softmax over the same features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from macs.config import RENAMED

from ..common.command import Parser
from ..common.launches import CASES

HERE = Path(__file__).resolve().parents[2]
SHAPES = ((2400, 128, 16, 2, 2), (4096, 1024, 64, 4, 8), (8192, 2048, 128, 8, 8))
"""T tokens, D features, E experts, k of a token, R ranks."""

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **CASES,
    "fast": ("macs", {"preset": "fast"}),
    "safe, hard": ("macs", {"preset": "safe", "max_load_factor": 1.1, "max_drop": 0.005}),
    "by picture": ("macs", {"weighting": "entropy", "normalization": "image"}),
    "vanilla": ("vanilla", {}),
}


def macs_of(root: Path) -> ModuleType:
    """The package ``macs`` of a checkout, beside any that is loaded already."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "macs"}
    sys.path.insert(0, str(root))
    try:
        import macs

        if not Path(str(macs.__file__)).is_relative_to(root):
            raise ValueError(f"planners: found macs at {macs.__file__}, expected it in {root}")
        return macs
    finally:
        sys.path.remove(str(root))
        for name in list(sys.modules):
            if name.split(".")[0] == "macs":
                del sys.modules[name]
        sys.modules.update(kept)


def drawn(shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """hidden, experts, weights, scores, mask: 0.7 of the tokens are of pictures, later experts preferred."""
    tokens, size, experts, top_k, _ = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator)
    logits = torch.randn(tokens, experts, generator=generator) + torch.linspace(0, 1.5, experts)
    scores = logits.softmax(-1)
    weights, chosen = scores.topk(top_k)
    mask = torch.zeros(4, tokens // 4, dtype=torch.bool)
    mask[:, tokens // 40 : tokens // 5] = True
    return hidden, chosen, weights, scores, mask


def config_of(macs: ModuleType, settings: dict[str, Any]) -> Any:
    """Settings by the names that they have in that checkout."""
    known = {"preset", *(one.name for one in dataclasses.fields(macs.MACSConfig))}
    former = {new: old for old, new in RENAMED.items()}
    return macs.MACSConfig.from_dict(
        {name if name in known else former[name]: value for name, value in settings.items()}
    )


def planned(macs: ModuleType, name: str, shape: Sequence[int], inputs: Sequence[Any]) -> Callable[[], Any]:
    """A call of a planner."""
    policy, settings = SETTINGS[name]
    topology = macs.Topology(shape[2], shape[4])
    planner = macs.build_policy(policy, config_of(macs, settings), topology, shape[3])
    tokens = macs.Modality.of(inputs[4]).batch_major(1)
    tokens = dataclasses.replace(tokens, segment=torch.arange(len(inputs[0])) // 64)
    return functools.partial(planner.plan, *inputs[:4], tokens)


class Operators(TorchDispatchMode):
    """Counts the operators that are called."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def seconds(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Of every work, all in turn: the median."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 3):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn >= 3:
                spent[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in spent.items()}


def weights_of(macs: ModuleType, name: str, shape: Sequence[int], inputs: Sequence[Any]) -> float:
    """The step of weights over a log-softmax of the same features."""
    spent: list[float] = []

    @contextlib.contextmanager
    def watch(step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if step == macs.STEPS[0]:
            spent.append(time.perf_counter() - started)

    work = planned(macs, name, shape, inputs)
    softmax: list[float] = []
    for _ in range(8):
        with macs.watching_steps(watch):
            work()
        started = time.perf_counter()
        torch.log_softmax(inputs[0], -1)
        softmax.append(time.perf_counter() - started)
    return statistics.median(spent[2:]) / statistics.median(softmax[2:])


def compare(packages: dict[str, ModuleType], shapes: Sequence[Sequence[int]], repeats: int) -> Table:
    """Times of both, by shape; operators; the step of weights of this checkout."""
    table = Table(title="a plan, ms; and operators")
    for heading in ("", "", *packages, "now / before", "weights / log-softmax"):
        table.add_column(heading, justify="right")
    for shape in shapes:
        inputs = drawn(shape)
        for name in ("defaults", "paper"):
            works = {title: planned(macs, name, shape, inputs) for title, macs in packages.items()}
            found = list(seconds(works, repeats).values())
            beside = weights_of(packages["now"], name, shape, inputs)
            told = "T {} D {} E {} k {} R {}".format(*shape)
            ratio = f"{found[-1] / found[0]:.2f}" if len(found) > 1 else ""
            table.add_row(told, name, *(f"{1e3 * one:.2f}" for one in found), ratio, f"{beside:.2f}")
    table.add_section()
    inputs = drawn(shapes[0])
    for name in SETTINGS:
        counts = []
        for macs in packages.values():
            work = planned(macs, name, shapes[0], inputs)
            work()
            with Operators() as operators:
                work()
            counts.append(str(operators.count))
        table.add_row("operators", name, *counts, "", "")
    return table


def chosen_by_the_tiny_model(batches: int) -> list[dict[str, Any]]:
    """What every layer's planner was given, in so many batches of image-flood."""
    from macs import MACSConfig, Planner

    from ..evaluate import importance, model

    arguments = importance.parse_arguments([])
    found: list[dict[str, Any]] = []
    with model.measuring():
        bench = model.Bench(arguments, 1)
        bench.runtime.use("macs", MACSConfig())
        plan = Planner.plan

        def kept(self: Planner, *inputs: Any, **named: Any) -> Any:
            *given, tokens = inputs
            fields = {name: one for name, one in vars(tokens).items() if name != "segment"}
            one = {"inputs": [each.clone() for each in given], "top_k": self.top_k}
            one |= {"tokens": {name: each.clone() for name, each in fields.items()}}
            found.append(one | {"bias": self._bias, "similarity": self._similarity})
            return plan(self, *inputs, **named)

        Planner.plan = kept  # type: ignore[method-assign, assignment]
        try:
            for batch in bench.batches("image-flood")[:batches]:
                importance.first_tokens(bench, batch)
        finally:
            Planner.plan = plan  # type: ignore[method-assign]
    return found


def same_plans(packages: dict[str, ModuleType], cases: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many plans of both are the same bit for bit, of one source and of four."""
    found: Counter[str] = Counter()
    for case in cases:
        experts, count = case["inputs"][3].shape[1], len(case["inputs"][0])
        for name, (policy, settings) in SETTINGS.items():
            for sources in ((0,), (0, 1, 2, 3)):
                plans = []
                for macs in packages.values():
                    topology = macs.Topology(experts, 4, sources=sources)
                    planner = macs.build_policy(
                        policy, config_of(macs, settings), topology, case["top_k"],
                        modality_bias=case["bias"], similarity=case["similarity"],
                    )  # fmt: skip
                    fields = {
                        **case["tokens"],
                        "segment": torch.arange(count) // 64,
                        "source": torch.arange(count) * len(sources) // count,
                    }
                    plans.append(planner.plan(*case["inputs"], macs.Tokens(**fields)))
                parts = ("experts", "weights", "rerouted")
                same = all(torch.equal(getattr(plans[0], part), getattr(plans[1], part)) for part in parts)
                found["same" if same else f"not the same: {name}"] += 1
    return found


def way(macs: ModuleType, root: Path) -> list[str]:
    """The functions of a plan that are called with the features, in order: file and name."""
    inputs = drawn(SHAPES[0])
    work = planned(macs, "defaults", SHAPES[0], inputs)
    work()
    found: list[str] = []

    def watch(frame: Any, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(root / "macs")):
            count = frame.f_code.co_argcount
            given = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:count]]
            if any(one is inputs[0] for one in given):
                found.append(f"{Path(file).relative_to(root / 'macs')} {frame.f_code.co_name}")

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = Parser("macs bench compare", __doc__)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout")
    parser.add_argument("--plans", action="store_true", help="compare plans, not times")
    parser.add_argument("--batches", type=int, default=2, help="of the tiny model, for --plans")
    parser.add_argument("--way", action="store_true", help="the way of the features")
    parser.add_argument("--shape", nargs=5, type=int, metavar=("T", "D", "E", "K", "R"), help="one alone")
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args(given)
    if arguments.plans and arguments.against is None:
        parser.error("--plans: found no --against, expected the checkout to compare with")
    roots = {} if arguments.against is None else {"before": arguments.against.resolve()}
    roots["now"] = HERE
    console = Console()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if arguments.plans:
            cases = chosen_by_the_tiny_model(arguments.batches)  # by this checkout, before others are loaded
        packages = {title: macs_of(root) for title, root in roots.items()}
        if arguments.plans:
            for told, count in same_plans(packages, cases).items():
                console.print(f"{count} plans {told}")
        elif arguments.way:
            for title, macs in packages.items():
                stations = way(macs, roots[title])
                console.print(f"{title}: {len(stations)} stations", *stations, sep="\n  ")
        else:
            shapes = SHAPES if arguments.shape is None else (arguments.shape,)
            console.print(compare(packages, shapes, arguments.repeats))
