"""Hours of service in minutes: two engines under mixed traffic, watched from outside.

    python tests/soak.py --minutes 30             # both engines at once; needs Megatron-Core 0.18 for one
    python tests/soak.py --minutes 2 --engines deepspeed

Megatron's dynamic engine (one process, planned as two ranks) and DeepSpeed's AutoEP (two processes) answer
requests with and without pictures, while metrics are scraped each second, the policy is switched every minute
and one client misbehaves: NaN features, empty prompts, masks of the wrong length. At the end one rank is
killed. What must hold: memory and tensors do not grow; every step is counted, as the recorders' own sums say;
counters never fall; the answers at the end are those at the beginning; nobody waits for the rank that is
gone.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.workers import Hung, Pool, RankFailed, free_port  # noqa: E402

WORLD = {"megatron": 1, "deepspeed": 2}
STOP, GO, SWITCH = range(3)
SAMPLE_SECONDS, PATIENCE = 3.0, 120.0
HELD = 32
"""Tensors that a scrape may hold at the moment at which they are counted."""

SETTLED = 75.0
"""Seconds until everything has been made that is kept: an endpoint keeps the readings of a minute."""

MISBEHAVES = 10
"""In every so many rounds one request is not as it should be."""

SUMS = (
    "tokens",
    "visual",
    "kept",
    "rerouted",
    "dropped",
    "visual_kept",
    "visual_rerouted",
    "nonfinite",
    "unmet",
)


class Ledger:
    """What the recorders say, added up before each time they forget."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.sums = [dict.fromkeys(SUMS, 0) for _ in runtime.layers]
        self.steps = 0

    def take(self) -> None:
        """Add what was recorded since, and clear it."""
        for sums, layer in zip(self.sums, self.runtime.layers, strict=True):
            if layer.recorder.started:
                report = layer.recorder.read()
                for name in SUMS:
                    sums[name] += int(getattr(report, name).sum())
        last = self.runtime.layers[-1].recorder
        self.steps += len(last.read().records) if last.started else 0
        self.runtime.clear()


def memory() -> tuple[float, int]:
    """Resident megabytes of this process, and its tensors."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    gc.collect()
    # No other thread meanwhile: CPython fails to finish a tuple that somebody refers to before it is whole,
    # as a list of all objects does.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e3)
    time.sleep(0)  # who waits by the former interval has its turn
    try:
        tensors = sum(1 for one in gc.get_objects() if type(one) is torch.Tensor)
    finally:
        sys.setswitchinterval(interval)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, tensors


def serve(name: str, port: int, minutes: float, switch: float, folder: str) -> None:
    """A worker's life, in a pool: answer until time is up, and leave what was found in a file. Then the last
    rank ends itself; the other one, which goes on, has to notice."""
    from support.services import DeepSpeed, Megatron

    logging.disable(logging.WARNING)
    if name == "megatron":
        from support.dynamic_engine import pretended_cuda
        from support.megatron_ranks import Layout, megatron_on

        with megatron_on(Layout()), pretended_cuda():
            _answer(Megatron, port, minutes, switch, folder)
    else:
        from support.deepspeed_ranks import deepspeed_on

        with deepspeed_on():
            _answer(DeepSpeed, port, minutes, switch, folder)


def _answer(kind: Any, port: int, minutes: float, switch: float, folder: str) -> None:
    from support.services import POLICIES, config_of

    rank, world = dist.get_rank(), dist.get_world_size()
    service = kind(rank, port)
    runtime, ledger = service.runtime, Ledger(service.runtime)

    def answers() -> list[Any]:
        return [service.answer(service.requests(10_000 + number)) for number in range(4)]

    fresh, samples = answers(), []
    started = sampled = switched = time.monotonic()
    rounds = requests = switches = bad = 0
    mistakes = ("nan", "empty", "mask")
    while True:
        now = time.monotonic()
        order = GO if now - started < 60 * minutes else STOP
        order = SWITCH if order == GO and now - switched >= switch else order
        agreed = torch.tensor(order)
        dist.broadcast(agreed, 0)
        order = int(agreed)
        if order == STOP:
            break
        if order == SWITCH:
            ledger.take()
            switches, switched = switches + 1, now
            policy, settings = POLICIES[switches % len(POLICIES)]
            runtime.use(policy, config_of(settings))
        mistake = mistakes[rounds // MISBEHAVES % 3] if rounds % MISBEHAVES == MISBEHAVES - 1 else None
        if mistake == "mask":
            service.send_wrong_mask()
        else:
            # Every second round is one of a hundred that come again.
            requests += len(service.answer(service.requests(rounds if rounds % 2 else rounds % 100, mistake)))
        bad += mistake is not None
        rounds += 1
        if rounds % 40 == 0:
            ledger.take()
        if now - sampled >= SAMPLE_SECONDS:
            sampled = now
            samples.append((now - started, *memory(), switches % len(POLICIES)))
    ledger.take()
    totals = runtime.counters.read()
    counted = [{one: int(layer.scalar(one)) for one in SUMS} for layer in totals.layers]
    kept = totals.planned_steps + totals.bypassed_steps - totals.bypassed
    runtime.use(POLICIES[0][0], config_of(POLICIES[0][1]))
    faults = _grown(samples)
    if answers() != fresh:
        faults.append("the answers at the end are not those at the beginning")
    if counted != ledger.sums or kept != ledger.steps:
        faults.append("counters and recorders differ")
    found = {"faults": faults, "rounds": rounds, "requests": requests, "switches": switches}
    found |= {"misbehaved": bad, "steps": ledger.steps, "bypassed": totals.bypassed, "counts": counted[0]}
    found["rss MB"] = [round(one[1]) for one in samples[:: max(1, len(samples) // 10)]]
    Path(folder, str(rank)).write_text(json.dumps(found))
    dist.barrier()
    if rank == world - 1 > 0:
        os._exit(1)
    begun = time.monotonic()
    try:
        while world > 1:
            service.answer(service.requests(rounds))
    finally:
        Path(folder, "gone").write_text(str(time.monotonic() - begun))


def _grown(samples: Sequence[tuple[float, float, int, int]]) -> list[str]:
    """What is more in the last third than in the middle one: by 1 % of the memory; or tensors, in
    the second half, under the same policy."""
    samples = [one for one in samples if one[0] >= SETTLED]
    if len(samples) < 6:
        return []
    found, third, half = [], len(samples) // 3, len(samples) // 2
    parts = samples[third : 2 * third], samples[2 * third :]
    before, after = (statistics.median_high(one[1] for one in part) for part in parts)
    if after > 1.01 * before + 2:
        found.append(f"resident memory grew from {before:.1f} to {after:.1f} MB")
    for policy in sorted({one[3] for one in samples}):
        held = [[one[2] for one in part if one[3] == policy] for part in (samples[:half], samples[half:])]
        if all(held) and max(held[1]) > max(held[0]) + HELD:
            found.append(f"tensors under policy {policy} grew from {max(held[0])} to {max(held[1])}")
    return found


def scrape(port: int, until: Path) -> tuple[list[float], list[str]]:
    """Ask an endpoint each second, as Prometheus does, until a file is there; seconds of each, and faults."""
    from prometheus_client.parser import text_string_to_metric_families

    waits: list[float] = []
    faults: list[str] = []
    last: dict[Any, float] = {}
    while not until.exists():
        begun = time.monotonic()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except Exception as error:
            if waits and not until.exists():  # it is there, and not gone with its process
                faults.append(f"{type(error).__name__}: {error}")
        else:
            waits.append(time.monotonic() - begun)
            found = {
                (one.name, *sorted(one.labels.items())): one.value
                for family in text_string_to_metric_families(text)
                for one in family.samples
                if one.name.endswith("_total")
            }
            faults += [f"{key} fell" for key, value in last.items() if found.get(key, 0) < value]
            last = found
        time.sleep(1.0)
    if not waits:
        faults.append("its endpoint never answered")
    return sorted(waits), faults


def soaked(name: str, minutes: float, switch: float) -> dict[str, Any]:
    """One engine's run, watched; what was found, and what was not as it should be."""
    pool, world, faults = Pool(), WORLD[name], []
    port = free_port(world)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(world) as threads:
        files = [Path(folder, str(rank)) for rank in range(world)]
        scrapes = [threads.submit(scrape, port + rank, file) for rank, file in enumerate(files)]
        options = {"timeout": 60 * minutes + 900, "patience": timedelta(seconds=PATIENCE)}
        given = {"name": name, "port": port, "minutes": minutes, "switch": switch, "folder": folder}
        try:
            pool.run(serve, world, given, **options)
        except EOFError:
            pass  # of the rank that ended itself; the other one raised
        except (RankFailed, Hung) as error:
            faults.append(str(error))
        pool.close()
        results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        for file in files:
            file.touch()
        scraped = [one.result() for one in scrapes]
        if world > 1:
            gone = Path(folder, "gone")
            noticed = float(gone.read_text()) if gone.exists() else math.inf
            results[0]["seconds until a rank that is gone was noticed"] = noticed
            if noticed >= PATIENCE:
                faults.append(f"a rank that was gone was noticed after {noticed:.0f} s")
    found = {"engine": name, "minutes": minutes, **results[0], "faults": faults}
    for rank, (result, (waits, failed)) in enumerate(zip(results, scraped, strict=True)):
        failed += result.get("faults", ["it left no result"])
        faults += [f"rank {rank}: {one}" for one in failed]
        if waits:
            found["scrape ms, median and p99"] = [1e3 * waits[int(len(waits) * at)] for at in (0.5, 0.99)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--switch", type=float, default=60.0, help="seconds between policies")
    parser.add_argument("--engines", nargs="+", choices=WORLD, default=list(WORLD))
    arguments = parser.parse_args()
    with ThreadPoolExecutor() as threads:
        options = arguments.minutes, arguments.switch
        runs = [threads.submit(soaked, name, *options) for name in arguments.engines]
        found = [one.result() for one in runs]
    for one in found:
        print("\n".join(f"{name}: {value}" for name, value in one.items()))
    return int(any(one["faults"] for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
