"""Hours of service in minutes: two engines under mixed traffic, watched from outside.

    python tests/soak.py --minutes 30             # both engines at once; needs Megatron-Core 0.19 for one
    python tests/soak.py --minutes 2 --engines deepspeed

Megatron's dynamic engine (one process, planned as two ranks) and DeepSpeed's AutoEP (two processes) answer
requests with and without pictures, while metrics are scraped each second, the policy is switched every minute
and one client misbehaves: NaN features, empty prompts, masks of the wrong length. At the end one rank is
killed. What must hold: memory and tensors do not grow; every step is counted, as the recorders' own sums say;
counters never fall; the answers at the end are those of a fresh process; nobody waits for the rank that is
gone.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]

import torch  # noqa: E402

WORLD = {"megatron": 1, "deepspeed": 2}
POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("macs", {"target_load": 0.8}),
    ("vanilla", {}),
    ("token-drop", {"target_load": 1.05}),
    ("paper", {}),
    ("macs", {"preset": "safe", "target_load": 0.9}),
    ("rank-balanced", {"target_load": 1.05}),
)
STOP, GO, SWITCH = range(3)
MIN_TOKENS = 64
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


def config_of(settings: dict[str, Any]) -> Any:
    """One of the ``POLICIES``' settings."""
    from macs import MACSConfig

    return MACSConfig.from_dict({"min_tokens": MIN_TOKENS, **settings})


class Megatron:
    """Megatron's dynamic engine around a small model: packed prompts, a paged cache."""

    def __init__(self, rank: int, port: int) -> None:
        from support import megatron_dynamic as dynamic

        import macs

        self.dynamic, self.macs = dynamic, macs
        self.runtime = macs.Runtime(config_of(POLICIES[0][1]), virtual_ranks=2)
        macs.serve_metrics(self.runtime, port)
        self.model = dynamic.build_model(self.runtime, True)
        with torch.no_grad():  # a token whose features are NaN
            self.model.embedding.word_embeddings.weight[dynamic.IMAGE - 1] = float("nan")
        context = dynamic.DynamicInferenceContext(
            model_config=self.model.config,
            inference_config=dynamic.InferenceConfig(
                block_size_tokens=16,
                buffer_size_gb=0.05,
                max_requests=8,
                max_tokens=512,
                max_sequence_length=256,
            ),
        )
        wrapper = dynamic.GPTInferenceWrapper(self.model, context)
        controller = dynamic.TextGenerationController(wrapper, dynamic.Tokenizer())
        self.engine = dynamic.DynamicInferenceEngine(controller, context)
        self.count = 0

    def requests(self, seed: int, bad: str | None = None) -> list[list[int]]:
        """Prompts with a run of image tokens in the middle, or none; the last may be of the bad client."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for length in torch.randint(30, 120, (4,), generator=generator).tolist():
            ids = torch.randint(1, self.dynamic.IMAGE - 1, (length,), generator=generator)
            if float(torch.rand(1, generator=generator)) < 0.7:
                ids[4 : 4 + length // 2] = self.dynamic.IMAGE
            found.append(ids.tolist())
        if bad == "nan":
            found[-1][2] = self.dynamic.IMAGE - 1
        if bad == "empty":
            found[-1] = []
        return found

    def answer(self, prompts: Sequence[list[int]]) -> list[list[int] | None]:
        """An empty prompt is refused here, as by a server: the engine itself ends with an assertion."""
        numbers: list[int | None] = []
        for prompt in prompts:
            if prompt:
                sampling = self.dynamic.SamplingParams(top_k=1, num_tokens_to_generate=4)
                self.engine.add_request(self.count, list(prompt), sampling)
            numbers.append(self.count if prompt else None)
            self.count += 1
        said: dict[int, list[int]] = {}
        while self.engine.has_unfinished_requests():
            for record in self.engine.step_modern()["finished_request_records"]:
                request = record.requests[-1]
                said[request.request_id] = list(request.generated_tokens)
        return [None if number is None else said[number] for number in numbers]

    def send_wrong_mask(self) -> None:
        """Straight to a layer, with a mask of other tokens; MACS has to say so."""
        hidden = torch.zeros(80, 1, self.model.config.hidden_size)
        with self.macs.modality(self.macs.Modality.of(torch.zeros(1, 9, dtype=torch.int8))):
            try:
                self.model.decoder.layers[0].mlp(hidden)
            except ValueError as error:
                if "modality mask: found shape (1, 9)" in str(error):
                    return
        raise AssertionError("a mask of the wrong length was taken")


class DeepSpeed:
    """The trained tiny model under AutoEP, its experts on two processes, real pictures."""

    def __init__(self, rank: int, port: int) -> None:
        from support import deepspeed_tiny_jobs as tiny_jobs

        self.jobs, self.rank = tiny_jobs, rank
        block = {"target_load": 0.8, "min_tokens": MIN_TOKENS, "metrics_port": port}
        self.engine = tiny_jobs.tiny_engine(block)
        self.runtime = self.engine.macs

    def requests(self, seed: int, bad: str | None = None) -> dict[str, Any]:
        """A batch as a processor makes it: padded on the left, each rank's own."""
        data = self.jobs.data
        samples = data.draw_samples(2 * seed + self.rank, "test", data.TASKS, 4)
        lengths = [100 if one.pixels is not None else 30 for one in samples]
        inputs = self.jobs.padded_inputs(samples, lengths)
        if bad == "nan" and inputs.get("pixel_values") is not None:
            inputs["pixel_values"] = (
                inputs["pixel_values"].clone().index_fill_(0, torch.tensor([0]), float("nan"))
            )
        if bad == "empty":
            texts = [row for row, one in enumerate(samples) if one.pixels is None]
            for row in texts[-1:]:
                inputs["input_ids"][row] = self.jobs.FILL
                inputs["attention_mask"][row] = 0
        if bad == "mask":
            inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, 3:]
        return inputs

    def answer(self, inputs: dict[str, Any]) -> list[list[int] | None]:
        """Ranks agree that all inputs are well-formed before any of them begins, as servers do: one that
        raised alone would leave the others in a collective."""
        import torch.distributed as dist

        good = torch.tensor(int(inputs["mm_token_type_ids"].shape == inputs["input_ids"].shape))
        dist.all_reduce(good, op=dist.ReduceOp.MIN)
        if not int(good):
            return [None] * len(inputs["input_ids"])
        out = self.engine.module.generate(
            **inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4, synced_gpus=True
        )
        return [row[inputs["input_ids"].shape[1] :].tolist() for row in out]

    def send_wrong_mask(self) -> None:
        if any(self.answer(self.requests(0, "mask"))):
            raise AssertionError("a mask of the wrong length was taken")


SERVICES = {"megatron": Megatron, "deepspeed": DeepSpeed}


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


def serve(name: str, rank: int, port: int, store: str, minutes: float, switch: float, tell: Any) -> None:
    """A worker's life: answer until time is up, and say what was done."""
    logging.disable(logging.WARNING)
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    import torch.distributed as dist

    world = WORLD[name]
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        _engine(name)(_serve)(name, rank, port, minutes, switch, tell)
    except BaseException:
        tell.send({"error": traceback.format_exc()})
        os._exit(1)


def _engine(name: str) -> Any:
    if name == "megatron":
        from support.megatron_jobs import on_megatron

        return on_megatron
    from support.deepspeed_jobs import on_deepspeed

    return on_deepspeed


def _serve(name: str, rank: int, port: int, minutes: float, switch: float, tell: Any) -> None:
    if name == "megatron":
        from support.megatron_dynamic import pretended_cuda

        with pretended_cuda():
            _answer(Megatron(rank, port), name, rank, minutes, switch, tell)
    else:
        _answer(DeepSpeed(rank, port), name, rank, minutes, switch, tell)


def _answer(service: Any, name: str, rank: int, minutes: float, switch: float, tell: Any) -> None:
    import torch.distributed as dist

    runtime = service.runtime
    ledger = Ledger(runtime)
    started = sampled = switched = time.monotonic()
    rounds = requests = switches = bad = 0
    kinds = ("nan", "empty", "mask")
    tell.send({"ready": True})
    while True:
        now = time.monotonic()
        order = GO if now - started < 60 * minutes else STOP
        order = SWITCH if order == GO and now - switched >= switch else order
        if WORLD[name] > 1:
            said = torch.tensor(order)
            dist.broadcast(said, 0)
            order = int(said)
        if order == STOP:
            break
        if order == SWITCH:
            ledger.take()
            switches, switched = switches + 1, now
            policy, settings = POLICIES[switches % len(POLICIES)]
            runtime.use(policy, config_of(settings))
        kind = kinds[rounds // MISBEHAVES % 3] if rounds % MISBEHAVES == MISBEHAVES - 1 else None
        if kind == "mask":
            service.send_wrong_mask()
        else:
            # Every second round is one of a hundred that come again.
            given = service.requests(rounds if rounds % 2 else rounds % 100, kind)
            said = service.answer(given)
            requests += len(said)
        bad += kind is not None
        rounds += 1
        if rounds % 40 == 0:
            ledger.take()
        if now - sampled >= SAMPLE_SECONDS:
            sampled = now
            tell.send({"sample": (now - started, *memory(), switches % len(POLICIES))})
    ledger.take()
    totals = runtime.counters.read()
    counted = [{one: int(layer.scalar(one)) for one in SUMS} for layer in totals.layers]
    kept = totals.planned_steps + totals.bypassed_steps - totals.bypassed
    runtime.use(POLICIES[0][0], config_of(POLICIES[0][1]))
    answers = [service.answer(service.requests(10_000 + number)) for number in range(4)]
    tell.send(
        {
            "answers": answers,
            "same counts": counted == ledger.sums and kept == ledger.steps,
            "counts": counted[0] if counted else {},
            "steps": {"recorded": ledger.steps, "bypassed": totals.bypassed},
            "rounds": rounds,
            "requests": requests,
            "switches": switches,
            "misbehaved": bad,
        }
    )
    while minutes:  # until somebody ends it
        service.answer(service.requests(rounds))
        rounds += 1


class Scraper(threading.Thread):
    """Asks an endpoint each second, as Prometheus does, and looks whether counters only rise."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.waits, self.faults, self.last = port, [], [], {}
        self._done = threading.Event()

    def once(self) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        begun = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        self.waits.append(time.monotonic() - begun)
        found = {
            (one.name, *sorted(one.labels.items())): one.value
            for family in text_string_to_metric_families(text)
            for one in family.samples
            if one.name.endswith("_total")
        }
        self.faults += [f"{key} fell" for key, value in self.last.items() if found.get(key, 0) < value]
        self.last = found

    def run(self) -> None:
        while not self._done.wait(1.0):
            try:
                self.once()
            except Exception as error:
                self.faults.append(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        self._done.set()
        self.join()


def soaked(name: str, minutes: float, switch: float) -> dict[str, Any]:
    """One engine's run, watched; what was found, and what was not as it should be."""
    from support.workers import free_port

    world, context = WORLD[name], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:

        def start(length: float, port: int) -> tuple[list[Any], list[Any]]:
            ends, workers = [], []
            for rank in range(world):
                mine, theirs = context.Pipe()
                store = str(Path(folder) / f"store-{length}")
                given = (name, rank, port, store, length, switch, theirs)
                worker = context.Process(target=serve, args=given, daemon=True)
                worker.start()
                theirs.close()  # so that its end is heard
                ends.append(mine)
                workers.append(worker)
            return ends, workers

        port = free_port(world)
        ends, workers = start(minutes, port)
        samples: list[list[tuple[float, float, int, int]]] = [[] for _ in ends]
        scrapers: list[Scraper] = []
        for rank, end in enumerate(ends):
            first = _heard(end, 900.0)
            if "error" in first:
                return {"engine": name, "faults": [first["error"]]}
            scrapers.append(Scraper(port + rank))
        for scraper in scrapers:
            scraper.start()
        results = _results(ends, samples, 60 * minutes + PATIENCE)
        for scraper in scrapers:
            scraper.stop()
        faults = [one["error"] for one in results if "error" in one]
        gone = None
        if not faults and world > 1:
            workers[-1].kill()
            begun = time.monotonic()
            workers[0].join(PATIENCE)
            gone = time.monotonic() - begun
            if workers[0].exitcode in (None, 0):
                faults.append(f"rank 0 had not ended {gone:.0f} s after rank {world - 1} was killed")
        for worker in workers:
            worker.kill()
        fresh = []
        if not faults:
            ends, workers = start(0.0, free_port(world))
            for end in ends:
                said = _heard(end, 900.0)
                fresh.append(_heard(end, 900.0) if "ready" in said else said)
            for worker in workers:
                worker.kill()
    found: dict[str, Any] = {"engine": name, "minutes": minutes, "faults": faults, "gone_s": gone}
    if faults:
        return found
    for rank, (result, again, scraper) in enumerate(zip(results, fresh, scrapers, strict=True)):
        if result["answers"] != again.get("answers"):
            faults.append(
                f"rank {rank}: the answers at the end are not those of a fresh process: "
                f"{result['answers']}, fresh {again.get('answers')}"
            )
        if not result["same counts"]:
            faults.append(f"rank {rank}: counters and recorders differ")
        faults += [f"rank {rank}: {one}" for one in scraper.faults]
        faults += [f"rank {rank}: {one}" for one in _grown(samples[rank])]
    first = results[0]
    found |= {
        name: first[name] for name in ("rounds", "requests", "switches", "misbehaved", "counts", "steps")
    }
    found["scrapes"] = sum(len(one.waits) for one in scrapers)
    waits = sorted(wait for one in scrapers for wait in one.waits) or [0.0]
    found["scrape_ms"] = [1e3 * waits[len(waits) // 2], 1e3 * waits[int(len(waits) * 0.99)]]
    found["memory"] = [
        {"rss": [one[1] for one in mine], "tensors": [one[2] for one in mine]} for mine in samples
    ]
    return found


def _results(
    ends: Sequence[Any], samples: Sequence[list[tuple[float, float, int, int]]], seconds: float
) -> list[dict[str, Any]]:
    """What every worker says at its end; whoever speaks meanwhile is heard, or it would wait."""
    found: dict[int, dict[str, Any]] = {}
    until = time.monotonic() + seconds
    while len(found) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in found]
        spoke = connection.wait(waiting, max(0.0, until - time.monotonic()))
        for rank, end in enumerate(ends):
            if rank not in found and (end in spoke or not spoke):
                said = _heard(end, 0.0)
                if "sample" in said:
                    samples[rank].append(said["sample"])
                else:
                    found[rank] = said
    return [found[rank] for rank in range(len(ends))]


def _heard(end: Any, seconds: float) -> dict[str, Any]:
    if not end.poll(seconds):
        return {"error": "a worker said nothing in time"}
    try:
        return end.recv()
    except EOFError:
        return {"error": "a worker ended without a word"}


def _thirds(values: Sequence[float]) -> tuple[list[float], list[float]]:
    third = len(values) // 3
    return list(values[third : 2 * third]), list(values[2 * third :])


def _grown(samples: Sequence[tuple[float, float, int, int]]) -> list[str]:
    """What is more in the last third than in the middle one: by 1 % of the memory; or tensors, in
    the second half, under the same policy."""
    samples = [one for one in samples if one[0] >= SETTLED]
    if len(samples) < 6:
        return []
    found = []
    middle, last = _thirds([one[1] for one in samples])
    before, after = sorted(middle)[len(middle) // 2], sorted(last)[len(last) // 2]
    if after > 1.01 * before + 2:
        found.append(f"resident memory grew from {before:.1f} to {after:.1f} MB")
    half = len(samples) // 2
    for policy in range(len(POLICIES)):
        parts = [[one[2] for one in part if one[3] == policy] for part in (samples[:half], samples[half:])]
        if all(parts) and max(parts[1]) > max(parts[0]) + HELD:
            found.append(f"tensors under {POLICIES[policy]} grew from {max(parts[0])} to {max(parts[1])}")
    return found


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"soak: {found['engine']}, {found.get('minutes', 0):g} minutes", show_header=False)
    for name in ("rounds", "requests", "switches", "misbehaved", "steps", "scrapes", "counts"):
        if name in found:
            table.add_row(name, str(found[name]))
    if "scrape_ms" in found:
        table.add_row("a scrape, ms", "median {:.1f}, p99 {:.1f}".format(*found["scrape_ms"]))
    for rank, one in enumerate(found.get("memory", ())):
        for what, form in (("rss", ".1f"), ("tensors", ".0f")):
            if len(one[what]) >= 6:
                middle, last = _thirds(one[what])
                shown = (format(sorted(part)[len(part) // 2], form) for part in (middle, last))
                table.add_row(f"rank {rank}: {what}, middle and last third", ", ".join(shown))
    if found.get("gone_s") is not None:
        table.add_row("end of the rank left alone, s", f"{found['gone_s']:.1f}")
    table.add_row("faults", "\n".join(found["faults"]) or "none")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--switch", type=float, default=60.0, help="seconds between policies")
    parser.add_argument("--engines", nargs="+", choices=SERVICES, default=list(SERVICES))
    parser.add_argument("--json", type=Path, help="append what was found, one line an engine")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    threads = [
        threading.Thread(
            target=lambda name=name: results.append(soaked(name, arguments.minutes, arguments.switch))
        )
        for name in arguments.engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        show(found)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(found) + "\n")
    return int(len(results) < len(threads) or any(found["faults"] for found in results))


if __name__ == "__main__":
    raise SystemExit(main())
