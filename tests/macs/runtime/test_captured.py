"""Layers inside captured graphs: what a replay reads, and that it plans as an eager step does.

A CUDA graph replays kernels on the addresses it saw. On a CPU ``make_fx`` stands in for it: it records
operators on the very tensors they were called with, and replays them without any Python of ours.
"""

import pytest
import torch
from support.cases import AnyAdapter
from support.kernels import same
from torch.fx.experimental.proxy_tensor import make_fx

import macs
from macs import MACSConfig, Modality, Runtime, Topology
from macs.runtime.modality import ModalityBuffers

BATCH, LENGTH, HIDDEN, EXPERTS, TOP_K = 2, 48, 16, 8, 2
SETTINGS = [
    {"policy": "paper"},
    {"policy": "paper", "max_drop": 0.1},
    {"policy": "padded"},
    {"reroute": "group"},
    {"weighting": "constant", "spare_text": True},
    {"target_load": 0.7, "level": "expert"},
    {"target_load": 0.7, "reroute": "group"},
]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def step(seed, device="cpu"):
    """What a layer gets in a step, and what is known of its tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = BATCH * LENGTH
    scores = torch.rand(count, EXPERTS, generator=generator).softmax(1)
    weights, experts = scores.topk(TOP_K, 1)
    hidden = torch.randn(count, HIDDEN, generator=generator)
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.6
    valid = torch.rand(BATCH, LENGTH, generator=generator) < 0.9
    inputs = [one.to(device) for one in (hidden, experts, weights, scores)]
    return inputs, Modality.of(mask.to(device), valid=valid.to(device))


def layer_of(settings):
    bound = {} if "target_load" in settings else {"capacity_factor": 0.7}
    given = {**bound, "min_tokens": 8, **settings}
    policy = given.pop("policy", "macs")
    generator = torch.Generator().manual_seed(99)
    router = torch.randn(EXPERTS, HIDDEN, generator=generator)
    runtime = Runtime(MACSConfig(**given), policy=policy)
    return runtime.add_layer(AnyAdapter(lambda: router, Topology(EXPERTS, 2, sources=(0,)), TOP_K))


def planned(layer, inputs, device):
    """The plan of a layer under the modality in force, as an engine's layer asks for it."""
    hidden, experts, weights, scores = inputs
    tokens = layer.tokens(BATCH, LENGTH, True, torch.device(device))
    plan = layer.plan(hidden, experts, weights, scores, tokens)
    return plan.experts, plan.weights


def eager(settings, seed, device="cpu"):
    layer = layer_of(settings)
    inputs, modality = step(seed, device)
    with macs.modality(modality):
        return planned(layer, inputs, device), layer.recorder.read()


@pytest.fixture
def static(monkeypatch):
    """Shapes follow no values, as on a GPU."""
    for module in ("rerouting", "weighting"):
        monkeypatch.setattr(f"macs.steps.{module}.indices_of", lambda chosen: torch.arange(len(chosen)))


@pytest.mark.usefixtures("static")
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_replayed_layer_plans_as_an_eager_one(settings):
    layer, buffers = layer_of(settings), ModalityBuffers()
    layer.prepare(torch.device("cpu"))
    inputs, modality = step(0)
    with macs.modality(buffers.hold(modality)):
        graph = make_fx(lambda *given: planned(layer, given, "cpu"))(*inputs)
    layer.recorder.clear()
    assert not torch.equal(eager(settings, 0)[0][0], eager(settings, 1)[0][0])  # nor is a replay its capture
    for seed in (1, 2, 1):
        inputs, modality = step(seed)
        buffers.hold(modality)
        found = graph(*inputs)
        expected, report = eager(settings, seed)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(layer.recorder.read().records[-1], report.records[0])
    assert len(layer.recorder.read().records) == 3
    assert not torch.equal(graph(*step(1)[0])[0], graph(*step(2)[0])[0])


@pytest.mark.usefixtures("static")
def test_a_replayed_layer_is_counted_planned_or_bypassed():
    layer, buffers = layer_of({"policy": "paper"}), ModalityBuffers()
    counters = layer.runtime.start_counting()
    layer.prepare(torch.device("cpu"))
    inputs, modality = step(0)

    def decoding(hidden):
        with layer.forward_pass(2, torch.device("cpu"), False):
            return hidden + 1

    with macs.modality(buffers.hold(modality)):
        graph = make_fx(lambda *given: planned(layer, given, "cpu"))(*inputs)
    decode = make_fx(decoding)(inputs[0])
    before, expected = counters.read(), 0
    for seed in (1, 2, 1):
        inputs, modality = step(seed)
        buffers.hold(modality)
        graph(*inputs)
        decode(inputs[0])
        decode(inputs[0])
        expected += int(eager({"policy": "paper"}, seed)[1].dropped[0])
    found = counters.read().since(before)
    assert found.layers[0].scalar("dropped") == expected > 0
    assert (found.planned_steps, found.bypassed_steps) == (3, 6)


def test_what_a_graph_captured_is_not_changed_under_it(monkeypatch):
    layer, (inputs, modality) = layer_of({"policy": "paper"}), step(0)
    runtime = layer.runtime
    for module in ("layer", "modality"):
        monkeypatch.setattr(f"macs.runtime.{module}.capturing", lambda device: True)
    refusal = pytest.raises(RuntimeError, match="would replay the mask of this one step")
    with refusal, macs.modality(modality):
        planned(layer, inputs, "cpu")
    with macs.modality(ModalityBuffers().hold(modality)):
        planned(layer, inputs, "cpu")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="use: a CUDA graph has captured MACS layers"):
        runtime.use("vanilla")
    layer.graphed = True  # as ``entering`` notes
    with pytest.raises(RuntimeError, match="enabled: a CUDA graph has captured MACS layers"):
        runtime.enabled = False
    with pytest.raises(RuntimeError, match="calibration: a CUDA graph"), runtime.calibration():
        pass
    assert runtime.policy == "paper" and not runtime.calibrating


def test_buffers_keep_their_memory_and_follow_every_layout():
    buffers = ModalityBuffers()
    first = buffers.hold(step(0)[1])
    layouts = first.tokens(True), first.tokens(sources=2), first.columns(8, 16).tokens(True)
    places = [one.data_ptr() for one in (first.ids, *(one.modality for one in layouts))]
    fresh = step(1)[1]
    with torch.inference_mode():
        held = buffers.hold(fresh)
    assert held is first
    assert [one.data_ptr() for one in (first.ids, *(one.modality for one in layouts))] == places
    expected = fresh.tokens(True), fresh.tokens(sources=2), fresh.columns(8, 16).tokens(True)
    for one, other in zip(layouts, expected, strict=True):
        assert same(one, other)
    assert buffers.hold(Modality.of(torch.zeros(1, 4, dtype=torch.bool))) is not first


@gpu
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_cuda_graph_plans_as_an_eager_step(settings):
    layer, buffers = layer_of(settings), ModalityBuffers()
    layer.prepare(torch.device("cuda"))
    inputs, modality = step(0, "cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with macs.modality(buffers.hold(modality)):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            planned(layer, inputs, "cuda")
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            found = planned(layer, inputs, "cuda")
    for seed in (1, 2, 1):
        given, modality = step(seed, "cuda")
        for place, value in zip(inputs, given, strict=True):
            place.copy_(value)
        buffers.hold(modality)
        graph.replay()
        expected, _ = eager(settings, seed, "cuda")
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
