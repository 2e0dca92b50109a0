"""``macs bench layer``: Megatron's real MoE layer, all expert-parallel ranks at once."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from macs import Modality, Topology
from macs.adapters import loads_of

from ..common.command import quiet
from ..common.cost_model import CostModel
from ..common.layers import (
    Asked,
    Oracle,
    Side,
    build_layer,
    device,
    engine,
    force,
    join,
    layout_of,
    median_of,
    over_ranks,
    same_output,
    together,
)
from ..common.workloads import NOTHING_OVER, VANILLA, Batch, features
from .arguments import running, steps_of
from .costs import Costs, calibrating, order_of
from .report import machine, table_of
from .results import Done, row_of, sound


class Collectives(TorchDispatchMode):
    """Counts the collectives within its block, whoever calls them, and the elements they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            self.counts[name] += 1
            given = torch.utils._pytree.tree_leaves((args, kwargs))
            self.counts[f"{name} elements"] += sum(one.numel() for one in given if isinstance(one, Tensor))
        return func(*args, **(kwargs or {}))


def layer_rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """One expert-parallel rank of the layer benchmark; the first writes what was found."""
    quiet(arguments.threads)
    with engine(), torch.inference_mode():
        join(rank, arguments.ranks, folder)
        found = _layer_rank(rank, arguments)
        if rank == 0:
            (Path(folder) / "found.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()


Step = tuple[Tensor, Modality, Tensor]
"""hidden [T, 1, D], modality, and the logits that the router is to see."""


def _layer_rank(rank: int, arguments: argparse.Namespace) -> dict[str, Any]:
    shape, asked = arguments.shape, Asked()
    stock = build_layer(shape, None)
    force(stock, asked)
    oracle = Oracle(shape, stock)
    contenders = running(arguments)
    rank_of_estimates = arguments.compensation_rank
    sides = {title: Side(shape, one, stock, asked, rank_of_estimates) for title, one in contenders.items()}
    rows: list[dict[str, Any]] = []
    same: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), disable=rank > 0) as progress:
        bar = progress.add_task("measuring", total=len(arguments.workloads) * arguments.repeats)
        costs = Costs(shape, arguments.ranks, stock, asked, arguments.seed)
        for workload in arguments.workloads:
            costs.sample()
            batch_of = steps_of(arguments, workload)
            batches = [batch_of(step, rank) for step in range(arguments.steps)]
            steps = [
                layout_of(batch, features(batch, shape.hidden, step, rank, arguments.seed))
                for step, batch in enumerate(batches)
            ]
            done = {title: Done(Topology(shape.experts, arguments.ranks), shape.top_k) for title in sides}
            good = dict.fromkeys(sides, True)
            for step, batch in zip(steps, batches, strict=True):
                asked.logits = step[2]
                for title, side in sides.items():
                    good[title] &= _checked(side, step, batch, stock, oracle, done[title])
            good = {
                title: bool(over_ranks(torch.tensor(int(value)), dist.ReduceOp.MIN))
                for title, value in good.items()
            }
            works = {VANILLA: lambda hidden, modality: stock(hidden)}
            works |= {title: side for title, side in sides.items() if title != VANILLA and good[title]}
            turns: dict[str, list[float]] = {title: [] for title in works}
            for turn in range(arguments.repeats):
                spent = dict.fromkeys(works, 0.0)
                for number, (hidden, modality, asked.logits) in enumerate(steps):
                    for title in order_of(works, turn, number):
                        spent[title] += together(partial(works[title], hidden, modality))
                for title, value in spent.items():
                    turns[title].append(value)
                progress.advance(bar)
            for title in sides:
                if good[VANILLA] and title in works:
                    base = turns[VANILLA]
                    rows.append(row_of(workload, title, done[title], done[VANILLA], turns[title], base))
                else:
                    rows.append({"workload": workload, "policy": title, "failed": "wrong output"})
            if NOTHING_OVER in sides and not same:
                asked.logits = steps[0][2]
                same = _nothing_more(stock, sides[NOTHING_OVER], *steps[0][:2])
        # Planners on a batch of no workload, in which as much is over capacity as in a middling one.
        batch = calibrating(shape, rank, arguments.seed)
        hidden, modality, asked.logits = layout_of(batch, features(batch, shape.hidden, 0, rank))
        planning = {}
        for title, side in list(sides.items())[1:]:
            side(hidden, modality)
            planning[title] = median_of(side.planning(), 5)
        origin = f"measured: {arguments.ranks} processes, {machine(arguments)['device']}"
        costs.sample()
        model = costs.model(planning, origin)
    return {"rows": rows, "under_capacity": same, "cost_model": asdict(model)}


def _checked(side: Side, step: Step, batch: Batch, stock: Any, oracle: Oracle, done: Done) -> bool:
    """Whether a layer was routed as asked, made a sound plan, and computed what the plan says; what it did
    is added to ``done``. Vanilla's output must be stock Megatron's, too."""
    hidden, modality, _ = step
    side.runtime.recording = True  # for the plan to say what it did; not where it is timed
    output, plan = side(hidden, modality), side.plan
    side.runtime.recording = False
    assert plan is not None
    done.records.append(over_ranks(plan.statistics.record).cpu())
    routed = torch.equal(plan.statistics.load_before.cpu(), loads_of(batch.experts, side.shape.experts))
    good = routed and sound(plan, side.shape)
    good &= same_output(output, oracle(hidden, plan))
    if side.runtime.policy == VANILLA:
        own = stock(hidden)[0]
        # On a GPU the engine itself adds up in another order every time.
        exact = device().type == "cpu"
        good &= torch.equal(output, own) if exact else same_output(output, own)
    return good


def _nothing_more(stock: Any, side: Side, hidden: Tensor, modality: Modality) -> dict[str, Any]:
    """What stock Megatron sends, and what MACS does where nothing is over capacity."""
    with Collectives() as before:
        expected = stock(hidden)[0]
    with Collectives() as after:
        found = side(hidden, modality)
    return {
        "stock": dict(before.counts),
        "macs": dict(after.counts),
        "same_collectives": before.counts == after.counts,
        "same_bits": torch.equal(found, expected),
    }


def run_layer(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(layer_rank, (arguments, folder), nprocs=arguments.ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    shape = arguments.shape
    caption = (
        f"Megatron-Core {megatron.core.__version__}, all-to-all, {arguments.ranks} processes of "
        f"{arguments.threads} thread(s), T {shape.tokens}, D {shape.hidden}, FFN {shape.ffn} (gated), "
        f"E {shape.experts}, k {shape.top_k}; {arguments.steps} steps, {arguments.repeats} turns, medians ± "
        "half the quartile distance. Ratios: to stock Megatron in the same turn. Ideal: ratio of the busiest "
        "ranks' rows."
    )
    console.print(table_of(found["rows"], caption))
    same = found["under_capacity"]
    if same:
        console.print(
            f"Nothing over capacity: collectives {'the same' if same['same_collectives'] else 'NOT the same'}"
            f" ({same['stock']}), output bit for bit {'the same' if same['same_bits'] else 'NOT the same'}."
        )
    if arguments.save_cost_model:
        CostModel(**found["cost_model"]).save(arguments.save_cost_model)
    return found
