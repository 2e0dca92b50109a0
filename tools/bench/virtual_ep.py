"""``macs bench virtual-ep``: one process, every rank's experts in turn."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from macs import Modality, Plan, Topology
from support.cases import build_policy

from ..common.clock import milliseconds
from ..common.cost_model import CostModel
from ..common.layers import build_layer, device, engine, join, median_of, run_experts
from ..common.workloads import VANILLA, Batch, Contender, Shape, features
from .arguments import running, steps_of
from .costs import calibrating, curve_rows, experts_of_rank, order_of
from .report import table_of
from .results import Done, row_of, sent_by, sound


def run_virtual(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Layer time = slowest source + exchanges + slowest rank's experts: planners and experts are measured,
    the rest follows the figures of ``--cost-model``, or copies in memory where none is given."""
    shape, ranks = arguments.shape, arguments.ranks
    rows: list[dict[str, Any]] = []
    chosen = running(arguments)
    with engine(), torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        join(0, 1, folder)
        # A rank's share of the experts, whose weights play every rank's in turn.
        layer = build_layer(replace(shape, experts=shape.experts // ranks, top_k=1), None)
        model = virtual_costs(arguments, chosen, layer)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("measuring", total=len(arguments.workloads) * arguments.steps)
            curves = []
            for workload in arguments.workloads:
                curves.append(sampled_curve(shape, ranks, layer))
                rows += _virtual_workload(arguments, workload, chosen, layer, model, progress, bar)
            curves.append(sampled_curve(shape, ranks, layer))
        # As in ``Costs``: experts as they are in the median, and how slow the machine was meanwhile.
        usual = np.median(curves, axis=0)
        model = replace(model, ms=np.maximum.accumulate(usual).tolist())
        pace = np.array(curves)[:, 1:].sum(1) / usual[1:].sum()
        slowness = dict(zip(arguments.workloads, ((pace[:-1] + pace[1:]) / 2).tolist(), strict=True))
        dist.destroy_process_group()
    caption = (
        f"One process of {arguments.threads} thread(s) as {ranks} ranks, T {shape.tokens} a rank, "
        f"D {shape.hidden}, FFN {shape.ffn} (gated), E {shape.experts}, k {shape.top_k}. Experts are "
        "measured on every rank's real rows, planners on the first source's; routers, permutations and "
        f"exchanges are modelled ({model.origin})."
    )
    console.print(table_of(rows, caption))
    if arguments.save_cost_model:
        model.save(arguments.save_cost_model)
    return {"rows": rows, "cost_model": asdict(model), "slowness": slowness}


def virtual_costs(arguments: argparse.Namespace, chosen: dict[str, Contender], layer: Any) -> CostModel:
    """This process's times of experts and planners; the rest as ``--cost-model`` says, if it is given."""
    shape, ranks = arguments.shape, arguments.ranks
    size = shape.hidden * next(layer.experts.parameters()).element_size()
    curve = sampled_curve(shape, ranks, layer)
    rows, ms = curve_rows(experts_of_rank(shape, ranks)[1]), np.maximum.accumulate(curve).tolist()
    batch = calibrating(shape, 0, arguments.seed)
    planning = {}
    for title, contender in list(chosen.items())[1:]:
        planning[title] = median_of(planned(shape, contender, ranks, 0, batch, 0), 5)
    given = torch.zeros(shape.tokens * shape.top_k, shape.hidden, device=device())
    copy = median_of(given.clone, 5)
    own = CostModel(
        rows=rows,
        ms=ms,
        fixed_ms=0.0,
        row_ms=2 * copy / len(given),
        latency_ms=0.0,
        inside_gbs=given.nbytes / copy / 1e6,
        beyond_gbs=given.nbytes / copy / 1e6,
        node=ranks,
        row_bytes=size,
        hidden=shape.hidden,
        ffn=shape.ffn,
        tokens=shape.tokens,
        planner_ms=planning,
        origin="as copies in memory",
    )
    if arguments.cost_model is None:
        return own
    rest = CostModel.load(arguments.cost_model)
    rest.check(shape)
    # Ranks are played one after the other: each has the machine to itself.
    return replace(rest, rows=rows, ms=ms, node=ranks, alone=1.0, planner_ms=planning, tokens=shape.tokens)


def sampled_curve(shape: Shape, ranks: int, layer: Any) -> np.ndarray:
    """ms of an expert for ``curve_rows``, of one call each after one that does not count."""
    count, even = experts_of_rank(shape, ranks)
    return np.array(
        [median_of(run_experts(layer, [one] * count, shape.hidden), 1) / count for one in curve_rows(even)]
    )


def _virtual_workload(
    arguments: argparse.Namespace,
    workload: str,
    chosen: dict[str, Contender],
    layer: Any,
    model: CostModel,
    progress: Progress,
    bar: Any,
) -> list[dict[str, Any]]:
    shape, ranks = arguments.shape, arguments.ranks
    batch_of = steps_of(arguments, workload)
    done = {title: Done(Topology(shape.experts, ranks), shape.top_k) for title in chosen}
    measured, modelled = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0.0)
    good = dict.fromkeys(chosen, True)
    for step in range(arguments.steps):
        batches = [batch_of(step, rank) for rank in range(ranks)]
        loads: dict[str, Tensor] = {}
        for title, contender in chosen.items():
            statistics_of, sent, parts = [], torch.zeros(()), []
            for rank, batch in enumerate(batches):
                work = planned(shape, contender, ranks, step, batch, rank, arguments.seed)
                plan = work()
                good[title] &= sound(plan, shape)
                if title != VANILLA and rank == 0:
                    measured[title] += median_of(work, 3)
                statistics_of.append(plan.statistics.record)
                parts.append(plan.statistics.load_after)
                sent = sent + sent_by(plan, Topology(shape.experts, ranks), rank).cpu()
            done[title].add(torch.stack(statistics_of).sum(0), sent)
            loads[title] = torch.stack(parts).cpu()
            rest = model.layer(loads[title].numpy())
            modelled[title] += rest.source + rest.exchange
        times: dict[str, list[list[float]]] = {title: [] for title in chosen}
        for turn in range(arguments.repeats + 1):
            for title in order_of(chosen, turn, step):
                by_rank = loads[title].view(ranks, ranks, -1).sum(0).tolist()
                works = [run_experts(layer, [int(count) for count in rows], shape.hidden) for rows in by_rank]
                times[title].append([milliseconds(work) for work in works])
        for title, turns in times.items():
            # The first turn warms up. A rank's time is its median: a maximum of single ones would be noise.
            measured[title] += float(np.median(turns[1:], axis=0).max())
        progress.advance(bar)
    rows = []
    for title in chosen:
        if not good[title]:
            rows.append({"workload": workload, "policy": title, "failed": "unsound plan"})
            continue
        total, base = measured[title] + modelled[title], measured[VANILLA] + modelled[VANILLA]
        row = row_of(workload, title, done[title], done[VANILLA], [total], [base])
        rows.append(row | {"measured_ms": measured[title] / arguments.steps})
    return rows


def planned(
    shape: Shape,
    contender: Contender,
    ranks: int,
    step: int,
    batch: Batch,
    rank: int,
    seed: int = 0,
) -> Callable[[], Plan]:
    """A call that plans a source rank's batch."""
    topology = Topology(shape.experts, ranks, sources=(rank,))
    policy = build_policy(contender.policy, contender.config, topology, shape.top_k)
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    hidden = features(batch, shape.hidden, step, rank, seed).to(device(), kind)
    experts, weights, scores = (one.to(device()) for one in (batch.experts, batch.weights, batch.scores))
    tokens = Modality.of(batch.kinds[None].to(device())).batch_major()
    return partial(policy.plan, hidden, experts, weights, scores, tokens)
