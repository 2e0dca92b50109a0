"""The ways in: drop-ins and installation; what stays as it was and what is refused."""

import json
import re
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

import deepspeed
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.sharded_moe import TopKGate
from support import hf_models
from support.cases import BUSY
from support.deepspeed_ranks import (
    DROPLESS,
    IMAGE_TOKEN,
    Model,
    autoep_engine,
    autoep_layers,
    batch_of,
    drawn,
    logits_of,
    on_deepspeed,
)
from torch import nn

import deepspeed_macs
import macs
from macs.adapters import ModalityHook

INFERENCE = {"dtype": "fp32"}
BLOCK = {**BUSY, "capacity_factor": 0.5, "min_tokens": 0, "image_token_id": IMAGE_TOKEN}
TRAINING = {"train_micro_batch_size_per_gpu": 1}
AUTOEP = {"expert_parallel": {"enabled": True, "autoep_size": 1}}


def hooks_on(model):
    """MACS' hooks on a model."""
    return [
        hook
        for hook in model._forward_pre_hooks.values()
        if isinstance(getattr(hook, "__self__", None), ModalityHook)
    ]


@on_deepspeed(1)
def test_every_way_into_init_inference_is_the_same(tmp_path):
    config = {**INFERENCE, "macs": BLOCK}
    path, block = tmp_path / "ds_config.json", tmp_path / "macs.yaml"
    path.write_text(json.dumps(config))
    block.write_text("macs:\n" + "".join(f"  {name}: {value}\n" for name, value in BLOCK.items()))
    engines = [
        deepspeed_macs.init_inference(Model(4, 2, 1), config),
        deepspeed_macs.init_inference(Model(4, 2, 1), config=config),
        deepspeed_macs.init_inference(Model(4, 2, 1), str(path)),
        deepspeed_macs.init_inference(Model(4, 2, 1), dtype="fp32", macs=BLOCK),
    ]
    for given, own in ((None, config), (BLOCK, INFERENCE), (block, INFERENCE)):
        uninstall = deepspeed_macs.install(given)
        engines.append(deepspeed.init_inference(Model(4, 2, 1), config=own))
        uninstall()
    bare = deepspeed.init_inference(Model(4, 2, 1, **DROPLESS), config=INFERENCE)
    assert type(bare.module.moe.deepspeed_moe.gate) is TopKGate
    assert config == {**INFERENCE, "macs": BLOCK}  # untouched
    ids = batch_of(0, 3, 9)
    outputs = [engine.eval()(ids) for engine in engines]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not torch.equal(outputs[0], bare.eval()(ids))
    assert [engine.macs.config.capacity_factor for engine in engines] == [0.5] * 7


@on_deepspeed(1)
def test_every_way_into_initialize_is_the_same(tmp_path):
    config = {**TRAINING, **AUTOEP, "macs": BLOCK}
    inner = {**TRAINING, "expert_parallel": {**AUTOEP["expert_parallel"], "macs": BLOCK}}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    arguments = types.SimpleNamespace(deepspeed_config=str(path), local_rank=0)

    def model():
        return hf_models.build("qwen3_moe")

    engines = [
        deepspeed_macs.initialize(model=model(), config=config),
        deepspeed_macs.initialize(model=model(), config=str(path)),
        deepspeed_macs.initialize(model=model(), config_params=config),
        deepspeed_macs.initialize(model=model(), config=inner),
        deepspeed_macs.initialize(arguments, model()),
    ]
    uninstall = deepspeed_macs.install()
    engines.append(deepspeed.initialize(model=model(), config=config))
    uninstall()
    assert arguments.deepspeed_config == str(path) and "macs" in inner["expert_parallel"]  # untouched
    logits = []
    for engine, *_ in engines:
        engine.eval()
        logits.append(logits_of(engine, hf_models.token_ids(0)))
    assert all(torch.equal(one, logits[0]) for one in logits)


@pytest.mark.parametrize("block", [None, {"enabled": False, "capacity_factor": 0.5}])
@on_deepspeed(1)
def test_without_macs_deepspeed_is_as_it_was(block):
    more = {} if block is None else {"macs": block}
    real = deepspeed_macs.inference._init_inference
    with mock.patch.object(deepspeed_macs.inference, "_init_inference", wraps=real) as seen:
        engine = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, **more})
    given = seen.call_args
    assert (*given.args[1:], *given.kwargs.values()) == (INFERENCE,)
    assert type(engine.module.moe.deepspeed_moe.gate) is TopKGate
    config = {**TRAINING, **AUTOEP, **more}
    trainer = deepspeed_macs.initialize(model=hf_models.build("qwen3_moe"), config=config)[0]
    assert {type(layer) for layer in autoep_layers(trainer)} == {AutoEPMoELayer}
    for one in (engine, trainer):
        assert not hasattr(one, "macs") and not hooks_on(one.module)


def inference(model=None, **block):
    model = Model(4, 2, 1) if model is None else model
    return deepspeed_macs.init_inference(model, {**INFERENCE, "macs": {**BLOCK, **block}}).eval()


def under_autoep(model, **more):
    return deepspeed_macs.initialize(model=model, config={**TRAINING, **AUTOEP, "macs": BLOCK, **more})


def added(changed, policy="macs"):
    """``add_macs`` on a stock AutoEP model of which one layer is changed; no hook is left on it."""
    engine = autoep_engine("qwen3_moe", None)
    changed(autoep_layers(engine)[0])
    try:
        deepspeed_macs.add_macs(engine.module, {"modality": "manual", "policy": policy})
    finally:
        assert not hooks_on(engine.module)


def own_gate():
    model = Model(4, 2, 1)
    model.moe.deepspeed_moe.gate.__class__ = type("OwnGate", (TopKGate,), {})
    inference(model)


def blind_then_macs():
    block = {"policy": "token-drop", "min_tokens": 0}
    engine = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": block})
    engine(batch_of(0, 3, 9))
    engine.macs.use("macs")


def expanded_over_deepep():
    engine = autoep_engine("qwen3_moe", {})
    for layer in autoep_layers(engine):
        layer.comm_backend, layer.ep_size = "deepep", 2
    engine.macs.use("expanded-drop")


def undescribable_blocks():
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = {**hf_models.SIZES, "num_local_experts": 8, "intermediate_size": 12, "head_dim": 8}
    under_autoep(AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt_oss"](**settings)))


def foreign_profile():
    counts = torch.ones(1, 4, dtype=torch.int64)
    profile = macs.Profile(visual=counts, text=2 * counts, fingerprints=("0" * 16,), top_k=2)
    engine = inference()
    engine.macs.use("macs", engine.macs.config, profile)
    engine(batch_of(0, 3, 9))


def wrong_mask():
    with macs.modality(torch.ones(3, 8, dtype=torch.bool)):
        inference(modality="manual", image_token_id=None)(batch_of(0, 3, 9))


REFUSED = {
    "no MoE layer": (
        lambda: inference(nn.Linear(2, 2)),
        "config.macs: Linear has no MoE layer of DeepSpeed's",
    ),
    "no MoE layer in a Hugging Face model": (
        lambda: deepspeed_macs.initialize(
            model=hf_models.build("qwen3_moe"), config={**TRAINING, "macs": BLOCK}
        ),
        '"expert_parallel": {"enabled": true, "autoep_size": ...}',
    ),
    "no visual tokens": (lambda: inference(image_token_id=None), "the visual tokens cannot be found"),
    "misspelt": (
        lambda: inference(capacity_facter=1),
        "unknown macs field 'capacity_facter'; did you mean 'capacity_factor'?",
    ),
    "fused": (  # a GPU's; AutoEP refuses it here only when it runs
        lambda: added(lambda layer: setattr(layer, "combine_impl", "fused_weighted_sum")),
        "expert_parallel.combine_impl = 'fused_weighted_sum' cannot be used with MACS",
    ),
    "fused rows": (
        lambda: added(lambda layer: setattr(layer, "row_weighting_impl", "fused")),
        "expert_parallel.row_weighting_impl = 'fused' cannot be used with MACS",
    ),
    "somebody's own layer": (
        lambda: added(lambda layer: setattr(layer, "__class__", type("Own", (AutoEPMoELayer,), {}))),
        "config.macs: found Own in the model, expected AutoEPMoELayer",
    ),
    "MACS twice": (
        lambda: deepspeed_macs.add_macs(inference().module, BLOCK),
        "config.macs: found MACSTopKGate in the model, expected TopKGate",
    ),
    "a gate of one's own": (own_gate, "config.macs: found OwnGate in the model, expected TopKGate"),
    "blind, then macs": (blind_then_macs, "policy macs: the visual tokens cannot be found"),
    "a block too many": (
        lambda: deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": BLOCK}, macs=BLOCK),
        "config.macs: found both in the config and as an argument",
    ),
    "expanded drop over DeepEP": (expanded_over_deepep, "policy expanded-drop: the buffers of"),
    "blocks AutoEP cannot describe": (undescribable_blocks, "name that one as preset_model"),
    "another model's profile": (foreign_profile, "it was measured on another model"),
    "mask of another shape": (
        wrong_mask,
        "modality mask: found shape (3, 8), 24 tokens; the layer has 27",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@on_deepspeed(1)
def test_what_cannot_work_is_refused_with_the_reason(kind):
    run, message = REFUSED[kind]
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


@on_deepspeed(1)
def test_a_transformers_that_is_too_new_is_refused():
    from transformers.utils import output_capturing

    class Registry(dict):
        """What a newer transformers has there."""

    message = "are known to work: pip install 'transformers>=5.17,<5.25'"
    with (
        mock.patch.object(output_capturing, "_CAN_RECORD_REGISTRY", Registry()),
        pytest.raises(ImportError, match=message),
    ):
        under_autoep(hf_models.build("qwen3_moe"))


@on_deepspeed(2)
def test_tensor_parallel_ranks_of_an_inference_engine_must_plan_alike():
    parallel = {"tensor_parallel": {"tp_size": 2}, "moe": {"ep_size": 2}}
    block = {**BLOCK, "policy": "expanded-drop"}
    config = {**INFERENCE, **parallel, "injection_policy": {nn.Embedding: ("up",)}, "macs": block}
    with pytest.raises(ValueError, match="policy expanded-drop: the expert-parallel group holds"):
        deepspeed_macs.init_inference(Model(4, 2, 2), config)


@on_deepspeed(1)
def test_installations_nest():
    """They leave a model without experts as it is."""

    def served(model):
        return deepspeed.init_inference(model, config=INFERENCE)

    stock = deepspeed.init_inference
    outer = deepspeed_macs.install(BLOCK)
    inner = deepspeed_macs.install({**BLOCK, "capacity_factor": 2.0})
    engine = served(Model(4, 2, 1))
    assert engine.macs.config.capacity_factor == 2.0 and not engine.module.training
    assert not hasattr(served(nn.Linear(2, 2)), "macs")
    inner()
    assert served(Model(4, 2, 1)).macs.config.capacity_factor == 0.5
    outer()
    assert deepspeed.init_inference is stock


@pytest.mark.parametrize("config", ["/nowhere.json", 7])
@on_deepspeed(1)
def test_deepspeeds_own_errors_are_unchanged(config):
    said = []
    for function in (deepspeed.init_inference, deepspeed_macs.init_inference):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            function(Model(4, 2, 1), config)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


@on_deepspeed(2)
def test_calibration_and_planning_under_zero_three():
    """ZeRO keeps a part of every parameter on each rank."""
    ids = hf_models.token_ids(dist.get_rank())
    parallel = {"expert_parallel": {"enabled": True, "autoep_size": 2}, "zero_optimization": {"stage": 3}}
    engine = under_autoep(hf_models.build("qwen3_moe"), **parallel)[0]
    engine.eval()
    profiles, logits = [], []
    for one in (engine, autoep_engine("qwen3_moe", BLOCK)):
        with one.macs.calibration():
            logits_of(one, ids)
        profiles.append(one.macs.measured_profile(dist.group.WORLD))
        one.macs.use("macs", one.macs.config, profiles[-1])
        logits.append(logits_of(one, ids))
    assert profiles[0].fingerprints == profiles[1].fingerprints
    assert torch.equal(profiles[0].visual, profiles[1].visual) and torch.equal(*logits)
    assert engine.macs.reports()[0].dropped.sum() > 0
    # A checkpoint that is loaded after the engine was made: served with its routers' rows.
    block = {**BLOCK, "reroute": "group"}
    later = under_autoep(hf_models.build("qwen3_moe"), **parallel, macs=block)[0]
    for layer in later.macs.layers:
        gate = layer.adapter.owner().router.gate.weight
        with deepspeed.zero.GatheredParameters([gate], modifier_rank=0):
            gate.copy_(drawn(layer.index, gate.shape))
    later.eval()
    for index, layer in enumerate(later.macs.layers):
        rows = layer.adapter.router_weight()
        assert torch.equal(rows, drawn(index, rows.shape))
