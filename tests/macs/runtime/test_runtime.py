"""The runtime, its records, and the planner's own doors."""

import json

import pytest
import torch
from support.cases import AnyAdapter, build_policy

from macs import MACSConfig, Planner, Profile, Runtime, Topology, modality
from macs.adapters import ProcessError, leave
from macs.planner import router_similarity
from macs.records.load import LayerRecorder
from macs.records.profile import router_fingerprint

ROUTER = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def inputs(count=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, 4, generator=generator).softmax(1)
    weights, experts = scores.topk(2)
    return torch.randn(count, 8, generator=generator), experts, weights, scores


def run(layer, count=32):
    hidden, experts, weights, scores = inputs(count)
    tokens = layer.tokens(2, count // 2, sequence_major=False, device=hidden.device)
    return layer.plan(hidden, experts, weights, scores, tokens)


def test_policies_switch_while_it_runs():
    runtime = Runtime(MACSConfig(capacity_factor=0.5, min_tokens=0), policy="token-drop")
    layer = runtime.add_layer(AnyAdapter(lambda: ROUTER, Topology(4, 2), 2))
    first = run(layer)
    assert int(first.statistics.dropped) > 0
    runtime.use("vanilla")
    assert int(run(layer).statistics.dropped) == 0
    runtime.enabled = False
    assert run(layer) is None
    runtime.enabled = True
    runtime.use("macs", MACSConfig(min_tokens=1000))
    assert int(run(layer).statistics.planned) == 0


def test_reports_add_up_and_clear():
    runtime = Runtime(MACSConfig(capacity_factor=0.5, min_tokens=0))
    layer = runtime.add_layer(AnyAdapter(lambda: ROUTER, Topology(4, 2), 2))
    for _ in range(3):
        plan = run(layer)
    (report,) = runtime.reports()
    assert len(report.records) == 3
    assert report.rows_of_experts("after")[0].tolist() == plan.statistics.load_after.tolist()
    ranks = plan.statistics.load_after.view(2, 2).sum(1)
    assert report.rows_of_ranks("after")[0].tolist() == ranks.tolist()
    assert float(report.load("after")[0]) == pytest.approx(float(ranks.max()) / 32)
    actions = "kept", "rerouted", "dropped"
    assert sum(report.share(name) for name in actions) == pytest.approx(1)
    assert sum(report.share(f"{name}_mass") for name in actions) == pytest.approx(1)
    with pytest.raises(AttributeError, match="scalars: tokens, weight"):
        _ = report.nothing
    runtime.clear()
    assert len(runtime.reports()[0].records) == 0
    runtime.recording = False
    run(layer)
    assert len(runtime.reports()[0].records) == 0


def test_the_recorder_keeps_the_latest_steps_in_order():
    policy = build_policy("vanilla", MACSConfig(min_tokens=0), Topology(4), 2)
    recorder = LayerRecorder(Topology(4), 2, steps=3)
    with pytest.raises(ValueError, match="no step was recorded"):
        recorder.read()
    for count in (1, 2, 3, 4, 5):
        recorder.record(policy.plan(*inputs(count)).statistics)
    assert recorder.read().tokens.tolist() == [3, 4, 5]


def test_records_outlive_inference_mode_and_keep_no_graph():
    runtime = Runtime(MACSConfig(min_tokens=0))
    layer = runtime.add_layer(AnyAdapter(lambda: ROUTER, Topology(4, 2), 2))
    with torch.inference_mode():
        run(layer)
    hidden, experts, weights, scores = inputs()
    tokens = layer.tokens(1, 32, sequence_major=False, device=hidden.device)
    layer.plan(hidden, experts, weights.requires_grad_(), scores.requires_grad_(), tokens)
    runtime.clear()
    run(layer)
    assert not runtime.reports()[0].records.requires_grad
    with runtime.calibration():
        with torch.inference_mode():
            run(layer)
        run(layer)
    assert int(runtime.measured_profile().visual.sum() + runtime.measured_profile().text.sum()) == 2 * 32 * 2


def test_a_refused_switch_changes_nothing():
    runtime = Runtime(MACSConfig(capacity_factor=2.0))
    with pytest.raises(ValueError, match="unknown policy"):
        runtime.use("drop", MACSConfig(capacity_factor=3.0))
    assert (runtime.policy, runtime.config.capacity_factor) == ("macs", 2.0)


def test_virtual_ranks_need_one_real_rank():
    runtime = Runtime(virtual_ranks=2)
    assert runtime.add_layer(AnyAdapter(lambda: ROUTER, Topology(4), 2)).topology.sources == (0, 1)
    with pytest.raises(ValueError, match="virtual_ranks: found 2, but the engine itself has 4"):
        runtime.add_layer(AnyAdapter(lambda: ROUTER, Topology(4, 4), 2))


def test_a_profile_moves_capacity():
    counts = torch.tensor([[9, 1, 1, 9]])
    profile = Profile(counts, counts.flip(1) * torch.tensor([1, 20, 20, 1]), (router_fingerprint(ROUTER),), 2)
    runtime = Runtime(MACSConfig(min_tokens=0), policy="paper", profile=profile)
    layer = runtime.add_layer(AnyAdapter(lambda: ROUTER, Topology(4), 2))
    assert layer.planner._bias.tolist() == [1.0, -1.0, -1.0, 1.0]


def test_without_a_mask_every_token_is_text_with_one_warning(caplog):
    runtime = Runtime(MACSConfig(min_tokens=0))
    layer = runtime.add_layer(AnyAdapter(lambda: ROUTER, Topology(4), 2))
    run(layer), run(layer)
    assert [record.message for record in caplog.records].count(
        "MACS: no modality mask around this forward pass, so every token counts as text; call "
        "attach_modality on the model, or macs.modality around the call"
    ) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, e, w, s: (h[0], e, w, s), ValueError, "hidden: found shape (8,), expected (any, any)"),
        (lambda h, e, w, s: (h.long(), e, w, s), TypeError, "hidden: found torch.int64"),
        (
            lambda h, e, w, s: (h, e[:, :1], w, s),
            ValueError,
            "experts: found 1 a token, expected top_k = 2",
        ),
        (
            lambda h, e, w, s: (h, e.int(), w, s),
            TypeError,
            "experts: found torch.int32, expected torch.int64",
        ),
        (lambda h, e, w, s: (h, e, w[1:], s), ValueError, "weights: found shape (31, 2), expected (32, 2)"),
        (lambda h, e, w, s: (h, e, w, s[:, 1:]), ValueError, "scores: found shape (32, 3), expected (32, 4)"),
        (lambda h, e, w, s: (h, e, w, s.to("meta")), ValueError, "scores: found on meta, expected on cpu"),
    ],
)
def test_the_planner_names_what_does_not_fit(change, error, message):
    planner = Planner(MACSConfig(min_tokens=0), Topology(4), 2)
    with pytest.raises(error) as caught:
        planner.plan(*change(*inputs()))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Topology(6, 4), "topology: found 6 experts on 4 ranks, expected ranks that divide them"),
        (lambda: Topology(4, 2, (0, 0, 0, 1)), "found (0, 0, 0, 1), expected each of 2 ranks 2 times"),
        (lambda: Topology(4, 2, sources=(2,)), "topology.sources: found (2,), expected ranks from 0 to 1"),
        (lambda: Topology(0), "found 0 experts on 1 ranks"),
        (lambda: Planner(MACSConfig(), Topology(4), 5), "top_k: found 5, expected 1 to 4"),
        (
            lambda: Planner(MACSConfig(), Topology(4), 2, modality_bias=[0.0]),
            "modality_bias: found shape (1,)",
        ),
        (
            lambda: Planner(MACSConfig(), Topology(4), 2, similarity=torch.ones(2, 2)),
            "similarity: found shape (2, 2)",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_when_built(build, message):
    with pytest.raises(ValueError, match=r".") as caught:
        build()
    assert message in str(caught.value)


def test_similarity_of_router_rows():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    expected = [[1, 1, 0.5, 0], [1, 1, 0.5, 0], [0.5, 0.5, 1, 0.5], [0, 0, 0.5, 1]]
    assert router_similarity(rows).tolist() == expected


def test_too_large_a_plan_is_refused():
    from macs.steps.demand import key_bits

    with pytest.raises(ValueError, match="plan fewer tokens or sources at once"):
        key_bits(1 << 30, 1 << 20)


@pytest.mark.e2e
def test_macs_needs_torch_alone(program):
    code = (
        "import sys\n"
        "class Only:\n"
        "    blocked = 'yaml safetensors megatron deepspeed rich transformers prometheus_client'.split()\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in self.blocked: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Only())\n"
        "import macs; macs.Runtime()\n"
        "try:\n"
        "    import megatron_macs\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'macs-moe[megatron]'\" in str(error), error\n"
        "else:\n"
        "    raise SystemExit('megatron_macs imported without megatron-core')\n"
        "try:\n"
        "    macs.serve_metrics(macs.Runtime(), 0)\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'macs-moe[metrics]'\" in str(error), error\n"
        "else:\n"
        "    raise SystemExit('metrics were served without prometheus-client')\n"
    )
    program("-c", code)


def test_drift_compares_what_ran_with_the_profile(caplog):
    runtime = Runtime(MACSConfig(min_tokens=0), profile=None)
    layer = runtime.add_layer(AnyAdapter(lambda: ROUTER, Topology(4, 2), 2))
    with pytest.raises(ValueError, match="drift: no profile to compare with"):
        runtime.drift()
    mask = torch.tensor([[True] * 8 + [False] * 8] * 2)
    with runtime.calibration(), modality(mask):
        run(layer)
    measured = runtime.measured_profile()
    runtime.use("macs", MACSConfig(min_tokens=0), measured)
    with modality(mask):
        run(layer)
    assert runtime.reports()[0].rows_of_experts("visual").sum() == 8 * 2 * 2
    assert runtime.drift() == [(0.0, 0.0)] and "calibrate again" not in caplog.text
    alone = torch.tensor([[0, 0, 0, 9999]])  # then all visual tokens went to one expert
    other = Profile(alone, measured.text, measured.fingerprints, 2)
    runtime.use("macs", MACSConfig(min_tokens=0), other)
    with modality(mask):
        run(layer)
    ((visual, text),) = runtime.drift()
    assert visual > 0.3 and text == 0.0 and "calibrate again" in caplog.text


def test_an_error_of_one_process_is_printed_by_it(monkeypatch, capsys):
    """As a port that is taken on rank 1; what all have in common is printed by the first alone."""
    monkeypatch.setattr("macs.runtime.launch.rank_and_world", lambda: (1, 2))
    for error, printed in ((ValueError("all have it"), ""), (ProcessError("a port"), "x, rank 1: a port\n")):
        with pytest.raises(SystemExit):
            leave("x", error)
        assert capsys.readouterr().err == printed


@pytest.mark.parametrize("rank", [0, 1])
def test_torchruns_summary_shows_the_error(monkeypatch, tmp_path, rank):
    """That of the process which leaves first: torchrun may end the others before they print."""
    monkeypatch.setattr("macs.runtime.launch.rank_and_world", lambda: (rank, 2))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        leave("x", "found 3, expected 4")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"].endswith(
        "x: found 3, expected 4"
    )
