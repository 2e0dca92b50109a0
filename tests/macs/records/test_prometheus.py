"""Counters of a process and the endpoint that serves them."""

import gc
import json
import os
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from support.cases import AnyAdapter

import macs
from macs import MACSConfig, Modality, Runtime, Topology, serve_metrics
from macs.adapters import CallReader, ModalityHook
from macs.records import prometheus
from macs.records.prometheus import Collector

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

from prometheus_client.parser import text_string_to_metric_families

EXPERTS, RANKS, TOP_K, LAYERS = 8, 4, 2, 3
DOCS = Path(__file__).parents[3] / "docs"


def started(policy="macs", **settings):
    """A runtime of three layers that counts, and the layers."""
    torch.manual_seed(0)
    routers = [torch.randn(EXPERTS, 16) for _ in range(LAYERS)]
    runtime = Runtime(MACSConfig(**{"target_load": 0.8, "min_tokens": 0, **settings}), policy=policy)
    layers = [
        runtime.add_layer(AnyAdapter(lambda router=router: router, Topology(EXPERTS, RANKS), TOP_K))
        for router in routers
    ]
    return runtime, layers


def calibrated(**options):
    """A runtime with a profile, its layers, and a collector that has seen a step."""
    runtime, layers = started()
    with runtime.calibration():
        step(layers, 64, 0)
    runtime.use("macs", MACSConfig(min_tokens=0), runtime.measured_profile())
    collector = Collector(runtime, **options)
    step(layers, 64, 1)
    return runtime, layers, collector


def values(collector):
    """Every sample by its name and the values of its labels."""
    return {
        (one.name, *one.labels.values()): one.value
        for family in collector.collect()
        for one in family.samples
    }


def step(layers, count, seed, continues=False):
    """A step of all layers; what each planned."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(1, count, generator=generator) < 0.6).to(torch.int8)
    ids[0, -1] = macs.TEXT
    valid = torch.rand(1, count, generator=generator) < 0.9
    plans = []
    with macs.modality(Modality.of(ids, valid=valid)):
        for layer in layers:
            hidden = torch.randn(count, 16, generator=generator)
            scores = hidden.new_empty(count, EXPERTS).exponential_(generator=generator)
            scores[:, 0] += 1
            scores = scores / scores.sum(1, keepdim=True)
            weights, experts = scores.topk(TOP_K)
            with layer.forward_pass(count, hidden.device, False, continues) as acts:
                if acts:
                    tokens = layer.tokens(1, count, False, hidden.device)
                    plans.append((experts, tokens, layer.plan(hidden, experts, weights, scores, tokens)))
    return plans


def samples(text):
    """Every sample of an answer, as Prometheus's own parser reads it."""
    return {
        (one.name, *sorted(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def scrape(server):
    with urllib.request.urlopen(f"http://{server.address}:{server.port}/metrics", timeout=10) as answer:
        return samples(answer.read().decode())


def test_counts_equal_an_independent_count():
    runtime, layers = started(reroute="group")
    server = serve_metrics(runtime, 0)
    expected = {}

    def count(name, amount):
        expected[name] = expected.get(name, 0) + amount

    for number in range(60):
        small = number % 5 == 4
        if number == 20:
            runtime.use("token-drop", MACSConfig(target_load=0.9, min_tokens=20))
        if number == 40:
            runtime.clear()
            runtime.use("macs", MACSConfig(target_load=0.7, min_tokens=20, reroute="group"))
        plans = step(layers, 4 if small else 64, number)
        for layer, (experts, tokens, plan) in enumerate(plans):
            for kind in ("text", "visual"):
                mine = tokens.valid & (tokens.visual if kind == "visual" else ~tokens.visual)
                final = plan.experts[mine]
                count((layer, kind, "rerouted"), int(plan.rerouted[mine].sum()))
                count((layer, kind, "dropped"), int((final < 0).sum()))
                count((layer, kind, "kept"), int((final == experts[mine]).sum()))
                if layer == LAYERS - 1:
                    count(kind, int(mine.sum()))
        planned = bool(plans) and not (small and number >= 20)
        count("planned" if planned else "bypassed", 1)
        if number % 20 == 5:  # while it runs
            assert scrape(server)
    server.close()
    families = values(Collector(runtime))
    assert expected[0, "visual", "rerouted"] > 0 and expected[0, "visual", "dropped"] > 0
    for name, amount in expected.items():
        series = "macs_steps_total" if name in ("planned", "bypassed") else "macs_tokens_total"
        key = ("macs_assignments_total", *map(str, name)) if isinstance(name, tuple) else (series, name)
        assert families[key] == amount, name


def steps_of(runtime):
    found = values(Collector(runtime))
    return found["macs_steps_total", "planned"], found["macs_steps_total", "bypassed"]


def test_prompts_in_chunks_are_counted_once():
    """Each layer gets every chunk, one after the other, before the next layer has any."""
    runtime, layers = started(min_tokens=20)
    runtime.start_counting()
    for number in range(5):
        for count in (64, 4):
            for layer in layers:
                for continues in (False, True):
                    step([layer], count, number, continues)
    assert steps_of(runtime) == (5, 5)
    found = values(Collector(runtime))
    tokens = sum(value for name, value in found.items() if name[0] == "macs_tokens_total")
    assert tokens == sum(int(layer.recorder.read().tokens.sum()) for layer in layers[:1])


class Part(torch.nn.Module):
    """A model of some layers, whose call is a step of them."""

    def __init__(self, layers):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Identity() for _ in layers)
        for part, layer in zip(self.parts, layers, strict=True):
            part.macs = layer
        self.eval()

    def forward(self, input_ids):
        step([part.macs for part in self.parts], input_ids.numel(), 0)


def test_the_models_of_a_runtime_are_counted_apart():
    """A target and its draft, both built before either runs: every one's passes and tokens count."""
    runtime, layers = started(min_tokens=20)
    models = [Part(layers[:2]), Part(layers[2:])]
    for model in models:
        ModalityHook(model, CallReader(text_only=True))
    runtime.start_counting()
    for _ in range(5):
        models[0](torch.ones(1, 64, dtype=torch.int64))
        models[1](torch.ones(1, 64, dtype=torch.int64))
        models[1](torch.ones(1, 4, dtype=torch.int64))
    assert steps_of(runtime) == (10, 5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_worker_forked_after_the_endpoint_raises_with_the_way_out():
    runtime, layers = started()
    server = serve_metrics(runtime, 0)
    step(layers, 64, 0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # a worker: no test runner, no clean-up
        try:
            step(layers, 64, 1)
            os.write(writer, b"nothing")
        except RuntimeError as error:
            os.write(writer, str(error).encode())
            own = serve_metrics(runtime, 0)
            step(layers, 64, 1)
            os.write(writer, f" {own.port != server.port} {steps_of(runtime)}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reader, 10000).decode()
    assert "found a process forked after it" in told and told.endswith(" True (1, 0)")
    assert steps_of(runtime) == (1, 0)
    server.close()


def test_gauges_agree_with_the_recorders_reports_and_look_back_a_window(monkeypatch):
    runtime, layers = started()
    collector = Collector(runtime)
    for number in range(8):
        step(layers, 64, number)

    found = values(collector)
    for number, report in enumerate(runtime.reports()):
        mean = report.tokens * TOP_K / RANKS
        for stage in ("before", "after"):
            load = float(report.rows_of_ranks(stage).amax(1).sum() / mean.sum())
            assert found["macs_rank_load", str(number), stage] == pytest.approx(load)
            rows = report.rows_of_experts(stage)
            imbalance = float(rows.amax(1).sum() / rows.mean(1).sum())
            assert found["macs_expert_imbalance", str(number), stage] == pytest.approx(imbalance)
    loads = [found["macs_rank_load", str(number), "after"] for number in range(LAYERS)]
    assert found["macs_rank_load_of_layers", "after", "0.5"] == pytest.approx(sorted(loads)[1])
    assert 0 < found["macs_visual_ratio",] < 1
    # Far later, the steps of then are behind the window; what was scraped then is where it begins.
    now = time.monotonic()
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: now + 1000)
    assert ("macs_rank_load", "0", "after") not in values(collector)
    runtime.use("vanilla", MACSConfig(min_tokens=0))
    step(layers, 64, 100)
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: now + 1001)
    found = values(collector)
    assert found["macs_rank_load", "0", "after"] == found["macs_rank_load", "0", "before"]


def test_the_endpoint(tmp_path):
    runtime, layers = started()
    server = serve_metrics(runtime, 0)
    try:
        assert scrape(server)["macs_steps_total", ("decision", "planned")] == 0
        step(layers, 64, 0)
        found = scrape(server)
        assert found["macs_steps_total", ("decision", "planned")] == 1
        (info,) = (dict(key[1:]) for key in found if key[0] == "macs_info")
        assert info["policy"] == "macs" and info["target_load"] == "0.8" and info["split"] == "uniform"
        runtime.use("macs", MACSConfig(target_load=0.5, min_tokens=0))
        assert scrape(server)["macs_steps_total", ("decision", "planned")] == 1
        other = started()[0]
        with pytest.raises(ValueError, match=rf"metrics port: cannot listen on .*port {server.port}"):
            serve_metrics(other, server.port)
        assert other.counters is None
    finally:
        server.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((server.address, server.port), timeout=2)
    with pytest.raises(ValueError, match="metrics port: found -1"):
        serve_metrics(runtime, -1)


def test_processes_of_a_machine_have_ports_of_their_own(monkeypatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    monkeypatch.setenv("LOCAL_RANK", "1")
    server = serve_metrics(started()[0], port)
    server.close()
    assert server.port == port + 1


@pytest.mark.parametrize("per_expert", [False, True])
def test_as_many_series_as_documented(per_expert):
    _, layers, collector = calibrated(per_expert=per_expert)
    count = sum(len(family.samples) for family in collector.collect())
    assert count == 12 * len(layers) + 14 + (2 * EXPERTS * LAYERS if per_expert else 0)


def test_drift_is_what_the_runtime_finds():
    runtime, layers, collector = calibrated()
    for number in range(4, 8):
        step(layers, 64, number)
    found = values(collector)
    for number, (visual, text) in enumerate(runtime.drift()):
        assert found["macs_drift", str(number), "visual"] == pytest.approx(visual)
        assert found["macs_drift", str(number), "text"] == pytest.approx(text)


def test_nothing_is_counted_where_nobody_asked(monkeypatch):
    runtime, layers = started()
    step(layers, 64, 0)
    assert runtime.counters is None
    # A graph of a step that is too small to plan would not count either.
    monkeypatch.setattr("macs.runtime.layer.capturing", lambda device: True)
    runtime.use("macs", MACSConfig(min_tokens=1000))
    step(layers, 64, 0)
    with pytest.raises(RuntimeError, match="counting: a CUDA graph has captured"):
        serve_metrics(runtime, 0)


def test_layers_that_join_later_are_counted():
    runtime, layers = started()
    counters = runtime.start_counting()
    step(layers, 64, 0)
    router = torch.randn(EXPERTS, 16)
    more = runtime.add_layer(AnyAdapter(lambda: router, Topology(EXPERTS, RANKS), TOP_K))
    step([*layers, more], 64, 1)
    assert [one.total("steps") for one in counters.read().layers] == [2, 2, 2, 1]


def test_passes_that_end_before_the_last_layer_are_counted():
    """As of a copy of a model, whose layers are in the same runtime, and do not run; or after an error."""
    runtime, layers = started(min_tokens=20)
    counters = runtime.start_counting()
    for number in range(4):
        step(layers[:2], 64, number)
    found = counters.read()
    # The first pass is told when the second begins.
    assert [one.total("steps") for one in found.layers] == [4, 4, 0] and found.planned_steps == 4
    for number, count in enumerate((4, 4, 4, 64)):
        step(layers, count, number)
    assert steps_of(runtime) == (5, 3) and counters.read().layers[2].total("steps") == 1


def test_a_deleted_model_is_no_longer_served():
    runtime, layers = started()
    collector = Collector(runtime)
    step(layers, 64, 0)
    list(collector.collect())
    del layers
    gc.collect()
    router = torch.randn(EXPERTS, 16)
    adapter = AnyAdapter(lambda: router, Topology(EXPERTS, RANKS), TOP_K)
    new = [runtime.add_layer(adapter) for _ in range(2)]
    step(new, 64, 1)
    families = {family.name: family for family in collector.collect()}
    assert {one.labels["layer"] for one in families["macs_assignments"].samples} == {"0", "1"}
    assert [one.value for one in families["macs_steps"].samples] == [1, 0]
    assert len(families["macs_rank_load"].samples) == 4


def test_the_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    _, layers, collector = calibrated()
    names = {name[0] for name in values(collector)}
    assert layers  # which the runtime does not keep
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"macs_[a-z_]+", target["expr"]))
    assert asked <= names
    assert asked >= {"macs_rank_load", "macs_assignments_total", "macs_steps_total", "macs_info"}
