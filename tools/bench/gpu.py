"""What only a GPU can tell of the planner, in one command.

    macs bench gpu                  # a JSON line a section
    macs bench gpu --dry            # the same sections on a CPU, small, in Triton's interpreter

Every section runs in a process of its own, for a minute at most (``--limit``): one that fails or hangs
costs no other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..common.command import Parser
from .gpu_layers import DRY, QWEN3_VL_30B, SETTINGS, SIZES, Size, case_of, experts_of, inputs, planner_of

LIMIT = 60.0
"""Seconds of a section."""


def milliseconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """Median of a call."""
    from ..common import clock

    work()
    return statistics.median(clock.milliseconds(work) for _ in range(repeats))


def captured(work: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of a call, and what the call gave while it was captured."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph, found


def environment(dry: bool) -> dict[str, Any]:
    """Versions, the device, and the bandwidth of a copy."""
    import torch
    import triton

    on_gpu = torch.cuda.is_available()
    one = torch.empty(1 << (20 if dry else 30), dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    other = torch.empty_like(one)
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "copy GB/s": 2 * one.nbytes / milliseconds(lambda: other.copy_(one)) / 1e6,
    }


def kernels_equal(dry: bool, size: Size) -> dict[str, Any]:
    """Plans by kernels and by plain torch, repeated."""
    from macs.steps.kernels.dispatch import kernels

    different: dict[str, float] = {}
    for name, settings in SETTINGS.items():
        planner, given = planner_of(size, settings), inputs(size)
        with kernels("torch"):
            expected = planner.plan(*given)
        for _ in range(1 if dry else 3):
            with kernels("triton"):
                found = planner.plan(*given)
            share = float((found.experts != expected.experts).double().mean())
            different[name] = max(different.get(name, 0.0), share)
    # Weights of tokens may differ by one in 65536, and with them who of two neighbours goes first.
    return {"share of assignments that differ": different, "ok": max(different.values()) < 1e-3}


def no_sync(dry: bool) -> dict[str, Any]:
    """The plan and its map wait for the device nowhere."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    planner, given = planner_of(QWEN3_VL_30B, {}), inputs(QWEN3_VL_30B)
    planner.plan(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        planner.plan(*given).as_map(QWEN3_VL_30B.experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


def launches(dry: bool) -> dict[str, Any]:
    """Launches by step as counted on fake tensors, and what a profile of a real plan counts."""
    import torch

    from ..common.launches import count

    size = DRY if dry else QWEN3_VL_30B
    shape = size.tokens, size.hidden, size.experts, size.top_k, size.ranks
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        found[name] = {"counted": dict(count(*case_of(settings), shape).by_step)}
        if torch.cuda.is_available():
            planner, given = planner_of(size, settings), inputs(size)
            planner.plan(*given)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                planner.plan(*given)
                torch.cuda.synchronize()
            events = [one for one in profile.events() if one.device_type == torch.profiler.DeviceType.CUDA]
            found[name]["profiled"] = len(events)
    return found


def times(dry: bool) -> dict[str, Any]:
    """Milliseconds of a plan, eager, captured and by step, and of one balanced rank's experts."""
    from unittest import mock

    import torch

    from ..common.clock import clocked

    size = DRY if dry else QWEN3_VL_30B
    found: dict[str, Any] = {}
    rows = [size.tokens * size.top_k // size.experts] * (size.experts // size.ranks)
    experts = experts_of(size, [count * size.ranks for count in rows])
    if experts is not None:
        found["experts ms"] = milliseconds(experts)
    for name, settings in SETTINGS.items():
        planner, given = planner_of(size, settings), inputs(size)
        work = partial(planner.plan, *given, statistics=False)
        one: dict[str, Any] = {"eager ms": milliseconds(work, 2 if dry else 20)}
        steps: dict[str, float] = {}
        with mock.patch("macs.planner.step", partial(clocked, steps)):
            work()
        one["steps ms"] = steps
        if torch.cuda.is_available():
            graph, _ = captured(work)
            one["captured ms"] = milliseconds(graph.replay)
        if "experts ms" in found:
            one["share"] = one.get("captured ms", one["eager ms"]) / found["experts ms"]
        found[name] = one
    return found


def under_capacity(dry: bool) -> dict[str, Any]:
    """With room for all, the plan is the router's choice, bit for bit."""
    import torch

    size = DRY if dry else QWEN3_VL_30B
    given = inputs(size)
    plan = planner_of(size, {"capacity_factor": 1e6}).plan(*given)
    return {"ok": torch.equal(plan.experts, given[1]) and torch.equal(plan.weights, given[2])}


def graphs(dry: bool) -> dict[str, Any]:
    """A captured plan, replayed on other inputs, is the eager plan of those."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    planner, static = planner_of(QWEN3_VL_30B, {}), inputs(QWEN3_VL_30B)
    graph, plan = captured(lambda: planner.plan(*static))
    same = []
    for seed in (1, 2):
        other = inputs(QWEN3_VL_30B, seed)
        expected = planner.plan(*other)
        for held, fresh in zip(static[:4], other[:4], strict=True):
            held.copy_(fresh)
        for name, held in vars(static[4]).items():
            if held is None:
                continue
            held.copy_(getattr(other[4], name))
        graph.replay()
        torch.cuda.synchronize()
        same.append(
            torch.equal(plan.experts, expected.experts) and torch.equal(plan.weights, expected.weights)
        )
    return {"ok": all(same)}


def decoding(dry: bool) -> dict[str, Any]:
    """A plan for a decoding step beside its experts, to choose ``min_tokens`` by."""
    found: dict[str, Any] = {}
    for tokens in (16,) if dry else (64, 256, 512):
        base = DRY if dry else QWEN3_VL_30B
        size = Size(tokens, base.hidden, base.ffn, base.experts, base.top_k, base.ranks)
        work = partial(planner_of(size, {}).plan, *inputs(size), statistics=False)
        one: dict[str, Any] = {"plan ms": milliseconds(work, 2 if dry else 20)}
        rows = max(1, size.tokens * size.top_k // size.experts * size.ranks)
        experts = experts_of(size, [rows] * (size.experts // size.ranks))
        if experts is not None:
            one["experts ms"] = milliseconds(experts)
        found[str(tokens)] = one
    return found


def flood(dry: bool) -> dict[str, Any]:
    """The largest rank of an image flood whose sources are all alike, before and after: its rows, and its
    experts' time."""
    size = DRY if dry else QWEN3_VL_30B
    plan = planner_of(size, {}).plan(*inputs(size))
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        loads = getattr(plan.statistics, f"load_{when}").view(size.ranks, -1)
        busiest = loads[loads.sum(1).argmax()]
        found[when] = {"load": float(busiest.sum()) / (size.tokens * size.top_k / size.ranks)}
        experts = experts_of(size, (busiest * size.ranks).tolist())
        if experts is not None:
            found[when]["experts ms"] = milliseconds(experts)
    return found


def sections(dry: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is checked, in order."""
    sizes = (DRY,) if dry else SIZES
    return {
        "environment": partial(environment, dry),
        **{
            f"kernels equal, T {size.tokens} D {size.hidden} E {size.experts} k {size.top_k}": partial(
                kernels_equal, dry, size
            )
            for size in sizes
        },
        "no sync": partial(no_sync, dry),
        "launches": partial(launches, dry),
        "times": partial(times, dry),
        "under capacity": partial(under_capacity, dry),
        "graphs": partial(graphs, dry),
        "decoding": partial(decoding, dry),
        "image flood": partial(flood, dry),
    }


def _answer(connection: Any, name: str, dry: bool) -> None:
    """A section, in its own process."""
    try:
        connection.send({"ok": True, **sections(dry)[name]()})
    except Exception as error:
        connection.send({"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]})


def checked(name: str, dry: bool, limit: float) -> dict[str, Any]:
    """What a section found, within its time."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    started = time.perf_counter()
    process = context.Process(target=_answer, args=(theirs, name, dry), daemon=True)
    process.start()
    theirs.close()
    try:
        done = ours.poll(limit)
        found = ours.recv() if done else {"ok": False, "error": f"no answer in {limit:g} s"}
    except EOFError:
        found = {"ok": False, "error": "its process died"}
    process.kill()
    process.join()
    return {"section": name, "s": round(time.perf_counter() - started, 1), **found}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(given: Sequence[str] | None = None) -> int:
    parser = Parser("macs bench gpu", __doc__)
    parser.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter, small")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a section")
    arguments = parser.parse_args(given)
    if not arguments.dry and not _has_gpu():
        parser.error("found no GPU that torch can use, expected one, or --dry")
    if arguments.dry:
        os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    failed = 0
    for name in sections(arguments.dry):
        found = checked(name, arguments.dry, arguments.limit)
        failed += not found["ok"]
        print(json.dumps(found), flush=True)
    return min(failed, 1)
