"""The plugin on a stub of vLLM: refusals, router, mask, plan, estimates and metrics. ``test_vllm.py`` has the
real engine."""

import sys
from types import SimpleNamespace

import pytest
import torch
from support.estimates import profile_of
from support.fake_vllm import (
    IDS,
    VISUAL,
    CompilationMode,
    CPURouter,
    CUDAGraphMode,
    D,
    E,
    K,
    Model,
    MoERunner,
    R,
    T,
    config_of,
    loaded,
    run,
    stub,
)
from torch import nn

import vllm_macs
from macs import IMAGE, MACSConfig, Modality, Planner, Runtime, Topology
from macs.adapters import current_modality
from vllm_macs import limits
from vllm_macs.config import MACSEntry, entry_of, warn_of_misspelling
from vllm_macs.metrics import Relay

ENTRY = {"target_load": 0.6, "min_tokens": 8}


@pytest.fixture
def engine(monkeypatch):
    return stub(monkeypatch)


def test_without_an_entry_vllm_runs_as_it_is(engine):
    model = loaded(engine)
    assert [type(layer.router) for layer in model.layers] == [CPURouter] * 2
    assert not hasattr(model.layers[0], "macs")


def test_a_step_is_planned_as_the_planner_plans_it(engine):
    model = loaded(engine, ENTRY)
    layer = model.layers[0]
    events = []
    layer.macs.on_plan(events.append)
    run(engine, model)
    (event,) = events
    assert torch.equal(event.tokens.visual, VISUAL) and current_modality() is None
    own = Planner(MACSConfig(**ENTRY), Topology(E, R), K)
    tokens = Modality.of((VISUAL * IMAGE).to(torch.int8)[None]).tokens()
    expected = own.plan(event.hidden, event.experts, event.weights, event.scores, tokens)
    assert torch.equal(expected.experts, event.plan.experts)
    assert torch.equal(layer.seen, expected.experts.int()) and layer.seen.dtype == torch.int32
    rows = [int(((layer.seen >= 0) & (layer.seen // (E // R) == rank)).sum()) for rank in range(R)]
    assert max(rows) <= 0.6 * T * K / R < T * K / R


def test_nothing_over_the_limit_is_bit_identical(engine):
    stock = run(engine, loaded(engine))
    assert torch.equal(run(engine, loaded(engine, {**ENTRY, "target_load": 8.0})), stock)
    assert not torch.equal(run(engine, loaded(engine, ENTRY)), stock)


@pytest.mark.parametrize(
    "step", [{"mode": CUDAGraphMode.FULL}, {"metadata": False}], ids=["in a CUDA graph", "a profile run"]
)
def test_other_steps_are_the_engines_own(engine, step):
    stock = run(engine, loaded(engine))
    model = loaded(engine, ENTRY)
    assert torch.equal(run(engine, model, **step), stock)
    assert not torch.equal(run(engine, model), stock)  # and the next one is planned


def test_a_text_only_model_is_planned_as_text(engine):
    engine.multimodal = False
    model = loaded(engine, ENTRY)
    events = []
    model.layers[0].macs.on_plan(events.append)
    with engine.step(), torch.no_grad():
        model(IDS, inputs_embeds=torch.nn.functional.one_hot(IDS % D, D).float())
    assert len(events) == 1 and not events[0].tokens.visual.any() and events[0].tokens.valid.all()


def test_a_step_without_its_mask_is_named_once(engine, caplog):
    model = loaded(engine, ENTRY)
    for _ in range(2):
        with engine.step(), torch.no_grad():
            model(IDS, inputs_embeds=torch.randn(T, D))
    assert caplog.text.count("without the mask of its visual tokens") == 1


def test_shared_experts_are_not_compensated(engine):
    """DeepSeek's layers return their shared and routed outputs apart."""
    model = loaded(engine, ENTRY)
    layer = model.layers[0]
    routed = layer._forward_impl
    layer.macs.compensate = lambda output: output + 1
    plain = torch.zeros(2, D)
    planned = routed.__self__
    planned._forward = lambda hidden: (plain, plain)
    shared, compensated = routed(plain)
    assert torch.equal(shared, plain) and torch.equal(compensated, plain + 1)


def test_ranks_that_plan_differently_are_refused(engine, monkeypatch):
    group = sys.modules["vllm.distributed"].get_tp_group()
    group.world_size = 2
    others = [None, None]

    def gather(digests, mine, group):
        digests[:] = [mine, others[1] or mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    run(engine, loaded(engine, ENTRY))
    others[1] = "another"
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp was planned differently on the 2 "):
        run(engine, loaded(engine, ENTRY))


def test_more_than_k_experts_are_refused(engine):
    with pytest.raises(ValueError, match="policy expanded-drop: vLLM's workspaces are sized for k experts"):
        loaded(engine, {**ENTRY, "policy": "expanded-drop"})


def test_padding_is_not_planned(engine):
    model = loaded(engine, ENTRY)
    events = []
    model.layers[0].macs.on_plan(events.append)
    padding = torch.arange(T) >= T - 5
    run(engine, model, padding=padding)
    with engine.step(), torch.no_grad():  # or rows behind those that the runner has embedded
        hidden = torch.cat([model.embed_input_ids(IDS[:40], None, is_multimodal=VISUAL[:40])] * 2)[:T]
        model(IDS, inputs_embeds=hidden)
    assert torch.equal(events[0].tokens.valid, ~padding)
    assert torch.equal(events[1].tokens.valid, torch.arange(T) < 40)


def test_a_stopped_pass_leaves_no_mask(engine):
    model = loaded(engine, ENTRY)
    handle = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(engine, model)
    handle.remove()
    assert current_modality() is None
    run(engine, model)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_adds_the_estimates(engine, tmp_path, rank):
    """The parts of two ranks are added up: estimates must not be there twice."""
    engine.rank = rank
    plain = run(engine, loaded(engine, ENTRY))
    stock = loaded(engine)
    torch.manual_seed(1)
    profile = profile_of([layer.gate.weight.detach() for layer in stock.layers], K)
    profile.save(tmp_path / "profile")
    found = run(
        engine, loaded(engine, {**ENTRY, "profile": str(tmp_path / "profile"), "compensation": "all"})
    )
    assert torch.equal(found, plain) == (rank == 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size > 1"),
        ({"pipeline_parallel_size": 2}, "later stages do not see which tokens are visual"),
        ({"enable_expert_parallel": False}, "no enable_expert_parallel"),
        ({"enable_eplb": True}, "enable_eplb"),
        ({"use_ubatching": True}, "dual-batch overlap"),
        ({"all2all_backend": "passthrough"}, "passthrough"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(engine, changes, message):
    with pytest.raises(ValueError, match=message):
        loaded(engine, ENTRY, **changes)
    arguments = sys.modules["vllm.engine.arg_utils"].EngineArgs
    with pytest.raises(ValueError, match=message):  # already where the server is asked
        arguments(config_of(engine, ENTRY, **changes)).create_engine_config()
    plain = config_of(engine, None, **changes)
    assert arguments(plain).create_engine_config() is plain


def test_a_profile_is_looked_for_before_weights_are_read(engine):
    entry = {**ENTRY, "profile": "nothing"}
    message = r"config\.macs\.profile: found 'nothing', expected a file that macs tune wrote"
    with pytest.raises(ValueError, match=message):
        loaded(engine, entry)
    with pytest.raises(ValueError, match=message):
        sys.modules["vllm.engine.arg_utils"].EngineArgs(config_of(engine, entry)).create_engine_config()


def test_a_misspelt_entry_is_warned_of(caplog):
    config = SimpleNamespace(additional_config={"mac": {}, "other": 1})
    assert entry_of(config) is None
    warn_of_misspelling(config)
    assert ["found 'mac', expected 'macs'" in one.message for one in caplog.records] == [True]


def test_more_that_is_refused(engine):
    config = config_of(engine, ENTRY)
    assert limits.of_config(config) == []
    config.speculative_config, config.lora_config = object(), object()
    config.compilation_config.mode, config.load_config.load_format = (
        CompilationMode.VLLM_COMPILE,
        "tensorizer",
    )
    found = " ".join(limits.of_config(config))
    for word in ("speculative decoding", "LoRA", "enforce-eager", "tensorizer"):
        assert word in found
    engine.cpu = False
    assert "one rank has all experts" in " ".join(
        limits.of_config(config_of(engine, ENTRY, tensor_parallel_size=1))
    )


def test_layers_that_cannot_be_honoured_are_refused():
    runner = MoERunner(CPURouter())
    assert limits.of_layer(runner) == []
    method = runner.routed_experts.quant_method
    method.moe_kernel.fused_experts = type("AiterExperts", (), {})()
    runner.moe_config.num_logical_experts = 7
    runner.router.scoring_func = "sqrtsoftplus"
    found = " ".join(limits.of_layer(runner))
    for word in ("AiterExperts", "--moe-backend triton", "7 experts on 2 ranks", "sqrtsoftplus"):
        assert word in found
    method.is_monolithic = True
    assert limits.of_layer(runner) == ["a kernel that routes by itself: try --moe-backend triton"]
    by_batch = SimpleNamespace(
        is_quantized=True, is_block_quantized=False, a2_scale=None, is_per_act_token=False
    )
    assert limits.scales_by_batch(by_batch) and not limits.scales_by_batch(None)


def test_models_without_a_gate_or_experts_are_refused(engine):
    from vllm_macs.plugin import attach

    config = config_of(engine, ENTRY)
    with pytest.raises(ValueError, match="found no MoE layer in Linear"):
        attach(nn.Linear(1, 1), config, MACSEntry.of(ENTRY))
    model = Model(CPURouter)
    model.layers[1].gate = None
    with pytest.raises(ValueError, match=r"layers\.1\.mlp of Model does not hold its gate"):
        attach(model, config, MACSEntry.of(ENTRY))


def test_a_layer_that_was_not_found_does_not_run_unplanned(engine):
    loaded(engine, ENTRY)
    lost = sys.modules["vllm.model_executor.layers.fused_moe.layer"].create_fused_moe_router()
    assert not lost.supports_monolithic_kernels
    with pytest.raises(RuntimeError, match="was not found when the model was loaded"):
        lost._compute_routing(torch.zeros(1, D), torch.zeros(1, E), torch.int32)


def test_another_version_is_named(engine, monkeypatch):
    monkeypatch.delattr(sys.modules["vllm.forward_context"], "get_forward_context")
    arguments = sys.modules["vllm.engine.arg_utils"].EngineArgs
    vllm_macs.register()
    with pytest.raises(
        ImportError, match=r"needs vllm>=0\.32,<0\.34; found 0\.33\.0, which lacks .*get_forward"
    ):
        arguments(config_of(engine, ENTRY)).create_engine_config()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_token_id": 3}, r"config\.macs\.image_token_id: found 3, expected none: vLLM says"),
        ({"record": "a"}, r"config\.macs\.record: found '.*', expected none in vLLM"),
        ({"virtual_ranks": 0}, r"config\.macs\.virtual_ranks: found 0"),
        ({"target_lode": 1.0}, "target_load"),
    ],
)
def test_entries_that_cannot_be_honoured_are_named(engine, entry, message):
    with pytest.raises(ValueError, match=message):
        entry_of(config_of(engine, entry))
    assert entry_of(config_of(engine)) is None


def test_experts_of_a_cpu_compute_the_kept_rows_of_their_own(engine):
    from vllm_macs import cpu

    cpu.install()
    experts = sys.modules["vllm.model_executor.layers.fused_moe.experts.cpu_moe"].CPUUnquantizedExperts()
    ids = torch.tensor([[0, 5], [-1, 4], [1, -1], [2, 3]])
    expert_map = torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3])  # this process has experts 4 to 7
    output, hidden = torch.full((4, D), 9.0), torch.randn(4, D)
    given = {"w1": torch.zeros(4, 1), "w2": None, "activation": None, "global_num_experts": E}
    weights = torch.rand(4, 2)
    experts.apply(output, hidden, topk_weights=weights, topk_ids=ids, expert_map=expert_map, **given)
    expected = torch.zeros(4, D)
    expected[0], expected[1] = hidden[0] * weights[0, 1] * 2, hidden[1] * weights[1, 1]
    torch.testing.assert_close(output, expected)
    assert list(cpu.rows) == [2]
    experts.apply(output, hidden, topk_weights=weights, topk_ids=ids * 0 - 1, expert_map=None, **given)
    assert (output == 0).all() and list(cpu.rows) == [2, 0]


def test_metrics_of_a_worker_are_shown_beside_the_engines_own():
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    from macs.records.prometheus import serve_metrics

    server = serve_metrics(Runtime(MACSConfig()), 0)
    try:
        names = {family.name for family in Relay(server.port).collect()}
    finally:
        server.close()
    assert "macs_steps" in names and all("macs" in name for name in names)
    assert list(Relay(1).collect()) == [] and Relay(1).describe() == []
