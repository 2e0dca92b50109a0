"""How many kernels a plan launches on a GPU, step by step, counted without one.

    macs bench launches                     # the defaults, the presets and the baselines
    macs bench launches --shape 8192 2048 128 8 8

Mask, adapter, planner and recorder run on fake CUDA tensors: every operator that would launch is counted by
what it launches, every Triton kernel is one, and what would read a value on the host is an error.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from macs import MACSConfig, Modality, Planner, Topology
from macs.adapters import candidate_scores, routing_from_map
from macs.planner import STEPS
from macs.records.load import LayerRecorder
from macs.steps.kernels.dispatch import kernels
from macs.steps.record import TOTALS, Totals

from .command import Parser
from .table import console, table

LAUNCHES = {
    "aten.index_add.default": 2,
    "aten.scatter_add.default": 2,
    "aten.scatter.src": 2,
    "aten.scatter.value": 2,
    "aten.scatter_reduce.two": 2,
    "aten.index_put.default": 2,
    "aten.masked_fill.Scalar": 2,
    "aten.sort.default": 3,
    "aten.sort.stable": 3,
    "aten.argsort.default": 3,
    "aten.argsort.stable": 3,
    "aten.nonzero.default": 4,
}
"""Of operators that launch more than one kernel: a copy of what they change, or the passes of a sort."""

NOTHING = (
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.new_empty.default",
    "aten.empty_strided.default",
    "aten.new_empty_strided.default",
    "aten.detach.default",
    "aten.alias.default",
    "aten.lift_fresh.default",
)
"""Operators that launch none, beside views."""


OTHER = "beside the steps"
"""What a plan launches before and between them: the memory of its sums."""


class Launches(TorchDispatchMode):
    """Counts launches by step, and by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.by_step: Counter[str] = Counter()
        self.by_operator: Counter[tuple[str, str]] = Counter()
        self._step = OTHER

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """What is launched in this block belongs to the step."""
        before, self._step = self._step, name
        try:
            yield
        finally:
            self._step = before

    def add(self, name: str, launches: int = 1) -> None:
        self.by_step[self._step] += launches
        self.by_operator[self._step, name] += launches

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        name = str(function)
        on_gpu = any(isinstance(one, torch.Tensor) and one.is_cuda for one in tree_leaves((args, found)))
        idle = function.is_view or name in NOTHING or "view" in name or name.startswith("prim.")
        if on_gpu and not idle:
            self.add(name, LAUNCHES.get(name, 1))
        return found


@contextlib.contextmanager
def counting() -> Iterator[Launches]:
    """Within this block tensors on "cuda" are fake, and what they would launch is counted."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    launches = Launches()

    def launch(kernel: Any, *args: Any, **named: Any) -> None:
        launches.add(f"triton {getattr(kernel, 'fn', kernel).__name__}")

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch("torch.cuda.device", return_value=contextlib.nullcontext()),  # there is none
        kernels("triton"),
        launches,
        mock.patch("macs.planner.step", launches.step),
    ):
        yield launches


def count(
    policy: str,
    settings: dict[str, Any],
    shape: Sequence[int],
    statistics: bool = True,
    counted: bool = False,
    group: bool = False,
) -> Launches:
    """The launches of one plan, for T tokens of size D, E experts, k each, R ranks: shape (T, D, E, k, R);
    counted: with a row of ``Counters`` beside the record; group: among ranks, without their all-reduce."""
    tokens, size, experts, top_k, ranks = shape
    topology = Topology(experts, ranks)
    config = MACSConfig.from_dict(settings).updated(min_tokens=0)  # small shapes too
    planner = Planner(config, topology, top_k, policy)
    recorder = LayerRecorder(topology, top_k)
    with counting() as launches:
        device = torch.device("cuda", 0)
        planner.constants(device)
        recorder.prepare(device)
        hidden = torch.empty(tokens, size, dtype=torch.bfloat16, device=device)
        logits = torch.empty(tokens, experts, dtype=torch.bfloat16, device=device)
        chosen = torch.empty(tokens, experts, dtype=torch.bool, device=device)
        probs = torch.empty(tokens, experts, device=device)
        mask = torch.empty(2, tokens // 2, dtype=torch.bool, device=device)
        launches.by_step.clear()
        launches.by_operator.clear()
        with launches.step(MASK):
            found = Modality.of(mask).tokens(True)
        with launches.step(ADAPTER):
            choice = routing_from_map(chosen, probs, top_k)
            scores = candidate_scores(logits, choice[0], "softmax")
        named = {"sum_over_group": lambda rows: None} if group else {}
        planned = planner.plan(hidden, *choice, scores, found, statistics=statistics, **named)
        with launches.step(ADAPTER):
            routing_map, _ = planned.as_map(experts)
            routing_map.sum()
        if planned.statistics is not None:
            sums = torch.empty(len(TOTALS) + len(planned.statistics.record), dtype=torch.int64, device=device)
            row = Totals(sums, torch.empty(ranks, experts // ranks, dtype=torch.int64, device=device))
            with launches.step(RECORD):
                recorder.record(planned.statistics, row if counted else None)
    return launches


MASK, ADAPTER, RECORD = "mask and layout, once a pass", "Megatron's adapter", "record"

PLANS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "defaults": (8, "macs", {}),
    "with rerouting": (12, "macs", {"reroute": "group"}),
    "paper": (11, "paper", {}),
    "paper at 1.05": (14, "paper", {"target_load": 1.05}),
    "macs safe": (16, "macs", {"preset": "safe"}),
    "padded": (16, "padded", {}),
    "token drop": (7, "token-drop", {}),
    "rank-balanced": (10, "rank-balanced", {}),
    "expanded drop": (8, "expanded-drop", {}),
}
"""What a plan launches, its policy and settings: a test holds every plan to its number; the cost model uses
it."""

AROUND = 6
"""What Megatron's adapter and the recorder launch beside it."""


def launches_by_step(shape: Sequence[int]) -> Table:
    """Launches of every plan by step."""
    found = [count(policy, settings, shape).by_step for _, policy, settings in PLANS.values()]
    steps = [*STEPS, OTHER]

    def row(step: str) -> list[str]:
        return [step, *(str(one[step] or "") for one in found)]

    whole = ["a plan", *(str(sum(one[step] for step in steps)) for one in found)]
    around = map(row, (ADAPTER, RECORD, MASK))
    rows = [*map(row, steps), None, whole, *around]
    return table(["", *PLANS], rows, title="kernels launched by a plan")


def main(given: Sequence[str] | None = None) -> None:
    parser = Parser("macs bench launches", __doc__)
    parser.add_argument(
        "--shape", nargs=5, type=int, metavar=("T", "D", "E", "K", "R"), default=(8192, 2048, 128, 8, 8)
    )
    console().print(launches_by_step(parser.parse_args(given).shape))
