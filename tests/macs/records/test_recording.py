"""Recording: what is kept of a run's routing, how much of it, and how a file is read back."""

import logging
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cases import AnyAdapter

import macs
from macs import MACSConfig, Recording, Runtime, Topology, files
from macs.records.recording import OVERHEAD, RoutingRecorder, rank_path
from macs.tokens import Modality

TOKENS, HIDDEN, EXPERTS, TOP_K = 24, 8, 6, 2


def running(layers=2):
    runtime = Runtime(MACSConfig(capacity_factor=0.5, min_tokens=0))
    router = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    topology = Topology(EXPERTS, 2, sources=(0,))
    runtime.kept = [runtime.add_layer(AnyAdapter(lambda: router, topology, TOP_K)) for _ in range(layers)]
    return runtime


def step(runtime, seed):
    """A forward pass over 20 tokens and 4 of padding; what every layer's router chose."""
    chosen = []
    for index, layer in enumerate(runtime.layers):
        generator = torch.Generator().manual_seed(10 * seed + index)
        scores = torch.rand(TOKENS, EXPERTS, generator=generator).softmax(1)
        weights, experts = scores.topk(TOP_K, 1)
        mask = (torch.arange(TOKENS) % 3 == 0)[None]
        with macs.modality(Modality.of(mask, valid=(torch.arange(TOKENS) < 20)[None])):
            tokens = layer.tokens(1, TOKENS, False, torch.device("cpu"))
        hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
        layer.plan(hidden, experts, weights, scores, tokens)
        chosen.append((experts, weights, scores, tokens.modality))
    return chosen


@pytest.mark.parametrize("with_scores", [False, True])
def test_what_was_recorded_comes_back(tmp_path, with_scores):
    runtime, path = running(), tmp_path / "routing.safetensors"
    step(runtime, 9)
    with runtime.record_routing(path, scores=with_scores) as recorder:
        steps = [step(runtime, seed) for seed in range(3)]
        assert len(recorder) == 6
    step(runtime, 9)
    found = Recording.load(path)
    assert (found.num_experts, found.num_ranks, found.top_k) == (EXPERTS, 2, TOP_K)
    assert [(one.layer, one.step) for one in found.records] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 2),
    ]
    for record in found.records:
        experts, weights, scores, modality = (part[:20] for part in steps[record.step][record.layer])
        assert torch.equal(record.experts, experts) and torch.equal(record.modality, modality)
        assert torch.equal(record.weights, weights.half().float())
        assert torch.equal(record.scores, scores.half().float()) if with_scores else record.scores is None


def test_it_stays_within_its_bounds(tmp_path, caplog):
    runtime = running(1)
    one = 20 * (TOP_K * 4 + 1) + OVERHEAD
    with runtime.record_routing(tmp_path / "a", every=3) as recorder:
        for seed in range(7):
            step(runtime, seed)
    assert [record.step for record in Recording.load(tmp_path / "a").records] == [0, 3, 6]
    with (
        caplog.at_level(logging.WARNING),
        runtime.record_routing(tmp_path / "b", max_bytes=2 * one) as recorder,
    ):
        for seed in range(7):
            step(runtime, seed)
    assert len(recorder) == 2 and caplog.text.count("the recording is full") == 1
    assert [record.step for record in Recording.load(tmp_path / "b").records] == [0, 1]
    with runtime.record_routing(tmp_path / "c"):
        pass
    assert not (tmp_path / "c").exists() and "nothing was recorded" in caplog.text


def test_mistakes_are_named(tmp_path):
    runtime = running()
    assert runtime.save_routing(tmp_path / "a") is None
    with runtime.record_routing(tmp_path / "a"):
        with pytest.raises(ValueError, match="found another recording, expected one"):
            runtime.start_routing()
        step(runtime, 0)
    assert (tmp_path / "a").is_file()
    with pytest.raises(ValueError, match="found no folder"), runtime.record_routing(tmp_path / "no" / "a"):
        pass
    recorder = RoutingRecorder()
    tokens = macs.Tokens.all_text(3, "cpu")
    recorder.observe(0, torch.zeros(3, 2).long(), torch.ones(3, 2), torch.ones(3, 6), tokens)
    with pytest.raises(ValueError, match=r"layer 1 has \(k, E\) = \(2, 8\), expected \(2, 6\)"):
        recorder.observe(1, torch.zeros(3, 2).long(), torch.ones(3, 2), torch.ones(3, 8), tokens)
    path = tmp_path / "b"
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="not a recording"):
        Recording.load(path)
    save_file({"layers": torch.zeros(1)}, path, metadata={"macs": '{"format": "macs-profile-1"}'})
    with pytest.raises(ValueError, match="expected format 'macs-routing-2'"):
        Recording.load(path)
    save_file({"experts": torch.zeros(1)}, path, metadata={"macs": '{"format": "macs-routing-2"}'})
    with pytest.raises(ValueError, match=r"recording .*: found no 'num_experts'"):
        Recording.load(path)
    with pytest.raises(ValueError, match="found max_bytes 268435456 and every 0, expected 1 or more"):
        runtime.start_routing(every=0)
    save_file({"layers": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"found header \{\}, expected format 'macs-routing-2'"):
        Recording.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.tensor([3])}, "do not add up"),
        ({"modality": torch.zeros(3, dtype=torch.int8)}, "do not add up"),
        ({"modality": torch.full((20,), 9, dtype=torch.int8)}, "found modality ids outside 0..3"),
        ({"weights": torch.full((20, TOP_K), torch.nan)}, "found weights that are not finite"),
        ({"experts": torch.full((20, TOP_K), EXPERTS, dtype=torch.int16)}, "experts outside -1..5"),
        ({"experts": torch.full((20, TOP_K), 3, dtype=torch.int16)}, "found a token with an expert twice"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    from safetensors import safe_open

    runtime, path = running(1), tmp_path / "routing"
    with runtime.record_routing(path):
        step(runtime, 0)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({**load_file(path), **change}, path, metadata=header)
    with pytest.raises((ValueError, TypeError), match=message):
        Recording.load(path)


def test_every_rank_has_a_file_of_its_own(tmp_path, monkeypatch):
    assert rank_path(tmp_path / "a.b") == tmp_path / "a.b"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank_path(tmp_path / "a.b") == tmp_path / "a.rank3.b"


def test_ranks_that_torch_alone_knows_write_files_of_their_own(monkeypatch):
    """Processes of spawn, srun or Ray have no RANK; their group may be closed when the file is written."""
    monkeypatch.setattr(files, "_place", [])
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    runtime = running()  # layers are built while the group is there
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    assert len(runtime.layers) == 2 and rank_path(Path("a/b.x")) == Path("a/b.rank1.x")


def test_sigterm_keeps_a_recording(program, tmp_path):
    """What SLURM and Kubernetes send; a handler of the application's own stays."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import os, signal, sys, time, torch
from macs import Topology
from macs.adapters import LayerAdapter, Options
from macs.tokens import Tokens

class Adapter(LayerAdapter):
    def router_weight(self):
        return torch.ones(4, 8)

options = Options.of({"record": sys.argv[1], "min_tokens": 0})
runtime = options.runtime()
layer = runtime.add_layer(Adapter(Topology(4), 2))
scores = torch.rand(8, 4)
weights, experts = scores.topk(2)
layer.plan(torch.randn(8, 8), experts, weights, scores, Tokens.all_text(8, "cpu"))
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
finally:
    options.finish(runtime)
"""
    )
    program(script, tmp_path / "routing.safetensors", status=128 + signal.SIGTERM)
    assert len(Recording.load(tmp_path / "routing.safetensors").records) == 1
