"""Jobs for worker processes: the ways into MACS for DeepSpeed."""

from __future__ import annotations

import json
import logging
import types
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.sharded_moe import TopKGate
from torch import nn

import deepspeed_macs
import macs
from macs.adapters import ModalityHook
from support.cases import BUSY

from . import hf_models
from .deepspeed_jobs import (
    DROPLESS,
    IMAGE_TOKEN,
    Model,
    autoep_engine,
    batch_of,
    drawn,
    logits_of,
    on_deepspeed,
)

INFERENCE = {"dtype": "fp32"}
BLOCK = {**BUSY, "capacity_factor": 0.5, "min_tokens": 0, "image_token_id": IMAGE_TOKEN}
TRAINING = {"train_micro_batch_size_per_gpu": 1}
AUTOEP = {"expert_parallel": {"enabled": True, "autoep_size": 1}}


TOPOLOGY = deepspeed_macs.layers.topology_of


def kinds_of(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if isinstance(m, (TopKGate, AutoEPMoELayer))}


@on_deepspeed
def init_inference_ways(folder: str) -> dict[str, Any]:
    """Outputs of the same settings, given in every way ``init_inference`` takes them."""
    ids = batch_of(0, 3, 9)
    path = Path(folder) / "ds_config.json"
    path.write_text(json.dumps({**INFERENCE, "macs": BLOCK}))
    config = {**INFERENCE, "macs": BLOCK}
    engines = {
        "dictionary": deepspeed_macs.init_inference(Model(4, 2, 1), config),
        "keyword": deepspeed_macs.init_inference(Model(4, 2, 1), config=config),
        "file": deepspeed_macs.init_inference(Model(4, 2, 1), str(path)),
        "arguments": deepspeed_macs.init_inference(Model(4, 2, 1), dtype="fp32", macs=BLOCK),
    }
    uninstall = deepspeed_macs.install()
    engines["installed"] = deepspeed.init_inference(Model(4, 2, 1), config=config)
    uninstall()
    uninstall = deepspeed_macs.install(BLOCK)
    engines["installed with a block"] = deepspeed.init_inference(Model(4, 2, 1), config=INFERENCE)
    uninstall()
    block = Path(folder) / "macs.yaml"
    block.write_text("macs:\n" + "".join(f"  {name}: {value}\n" for name, value in BLOCK.items()))
    uninstall = deepspeed_macs.install(block)
    engines["installed with a file"] = deepspeed.init_inference(Model(4, 2, 1), config=INFERENCE)
    uninstall()
    bare = deepspeed.init_inference(Model(4, 2, 1, **DROPLESS), config=INFERENCE)
    return {
        "outputs": {name: engine.eval()(ids).tolist() for name, engine in engines.items()},
        "settings": {name: engine.macs.config.capacity_factor for name, engine in engines.items()},
        "uninstalled": kinds_of(bare) == {"TopKGate"},
        "untouched": config == {**INFERENCE, "macs": BLOCK},
        "stock": bare.eval()(ids).tolist(),
    }


@on_deepspeed
def initialize_ways(folder: str) -> dict[str, Any]:
    """Logits of the same settings, given in every way ``initialize`` takes them."""
    ids = hf_models.token_ids(0)
    config = {**TRAINING, **AUTOEP, "macs": BLOCK}
    inner = {**TRAINING, "expert_parallel": {**AUTOEP["expert_parallel"], "macs": BLOCK}}
    path = Path(folder) / "ds_config.json"
    path.write_text(json.dumps(config))
    arguments = types.SimpleNamespace(deepspeed_config=str(path), local_rank=0)

    def run(*positional: Any, **named: Any) -> Any:
        engine = deepspeed_macs.initialize(*positional, **named)[0]
        engine.eval()
        return logits_of(engine, ids).tolist()

    def model() -> nn.Module:
        return hf_models.build("qwen3_moe")

    outputs = {
        "dictionary": run(model=model(), config=config),
        "file": run(model=model(), config=str(path)),
        "old name": run(model=model(), config_params=config),
        "in expert_parallel": run(model=model(), config=inner),
        "arguments": run(arguments, model()),
    }
    uninstall = deepspeed_macs.install()
    engine = deepspeed.initialize(model=model(), config=config)[0]
    uninstall()
    engine.eval()
    outputs["installed"] = logits_of(engine, ids).tolist()
    return {
        "outputs": outputs,
        "untouched": arguments.deepspeed_config == str(path) and "macs" in inner["expert_parallel"],
    }


@on_deepspeed
def left_alone(block: dict[str, Any] | None) -> dict[str, Any]:
    """What DeepSpeed makes of its models where MACS is off, or not spoken of."""
    more = {} if block is None else {"macs": block}
    seen: list[dict[str, Any]] = []
    real = deepspeed_macs.inference._init_inference
    deepspeed_macs.inference._init_inference = lambda model, config: (
        seen.append(config) or real(model, config=config)
    )
    try:
        engine = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, **more})
    finally:
        deepspeed_macs.inference._init_inference = real
    config = {**TRAINING, **AUTOEP, **more}
    trainer = deepspeed_macs.initialize(model=hf_models.build("qwen3_moe"), config=config)
    hooks = [*engine.module._forward_pre_hooks.values(), *trainer[0].module._forward_pre_hooks.values()]
    return {
        "kinds": sorted(kinds_of(engine) | kinds_of(trainer[0])),
        "macs": [hasattr(engine, "macs"), hasattr(trainer[0], "macs")],
        "config": seen,
        "hooks": sum(isinstance(getattr(hook, "__self__", None), ModalityHook) for hook in hooks),
    }


@on_deepspeed
def refused(kind: str) -> None:
    """Something that must be refused, with the reason."""
    if kind == "no MoE layer":
        deepspeed_macs.init_inference(nn.Linear(2, 2), {**INFERENCE, "macs": BLOCK})
    if kind == "no MoE layer in a Hugging Face model":
        config = {**TRAINING, "macs": BLOCK}  # without expert_parallel
        deepspeed_macs.initialize(model=hf_models.build("qwen3_moe"), config=config)
    if kind == "no visual tokens":
        block = {"capacity_factor": 0.5}
        deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": block})
    if kind == "misspelt":
        deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": {"capacity_facter": 1}})
    if kind in ("fused", "fused rows", "expanded drop, folded", "somebody's own layer"):
        engine = autoep_engine("qwen3_moe", None)
        layer = next(m for m in engine.modules() if isinstance(m, AutoEPMoELayer))
        if kind == "fused":
            layer.combine_impl = "fused_weighted_sum"  # a GPU's; AutoEP refuses it here only when it runs
        if kind == "fused rows":
            layer.row_weighting_impl = "fused"
        if kind == "expanded drop, folded":
            layer.folding_group_handles = types.SimpleNamespace(spec=types.SimpleNamespace(tp_size=2))
            layer.ep_size = 2
            deepspeed_macs.layers.topology_of = lambda *_: macs.Topology(8, 2)
        if kind == "somebody's own layer":
            layer.__class__ = type("Own", (AutoEPMoELayer,), {})
        try:
            policy = "expanded-drop" if kind == "expanded drop, folded" else "macs"
            deepspeed_macs.add_macs(engine.module, {"modality": "manual", "policy": policy})
        finally:
            deepspeed_macs.layers.topology_of = TOPOLOGY
            hooks = engine.module._forward_pre_hooks.values()
            assert not any(isinstance(getattr(h, "__self__", None), ModalityHook) for h in hooks)
    if kind == "MACS twice":
        engine = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": BLOCK})
        deepspeed_macs.add_macs(engine.module, BLOCK)
    if kind == "a gate of one's own":
        model = Model(4, 2, 1)
        model.moe.deepspeed_moe.gate.__class__ = type("OwnGate", (TopKGate,), {})
        deepspeed_macs.init_inference(model, {**INFERENCE, "macs": BLOCK})
    if kind == "blind, then macs":
        block = {"policy": "token-drop", "min_tokens": 0}
        engine = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": block})
        engine(batch_of(0, 3, 9))
        engine.macs.use("macs")
    if kind == "a block too many":
        deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": BLOCK}, macs=BLOCK)
    if kind == "tensor parallelism of the inference engine":
        block = {**BLOCK, "policy": "expanded-drop"}
        parallel = {"tensor_parallel": {"tp_size": 2}, "moe": {"ep_size": 2}}
        config = {**INFERENCE, **parallel, "injection_policy": {nn.Embedding: ("up",)}, "macs": block}
        deepspeed_macs.init_inference(Model(4, 2, 2), config)
    if kind == "expanded drop over DeepEP":
        engine = autoep_engine("qwen3_moe", {})
        for layer in engine.modules():
            if isinstance(layer, AutoEPMoELayer):
                layer.comm_backend, layer.ep_size = "deepep", 2
        engine.macs.use("expanded-drop")
    if kind == "transformers too new":
        from transformers.utils import output_capturing

        class Registry(dict):
            """What a newer transformers has there."""

        real = output_capturing._CAN_RECORD_REGISTRY
        output_capturing._CAN_RECORD_REGISTRY = Registry()
        try:
            deepspeed_macs.initialize(
                model=hf_models.build("qwen3_moe"), config={**TRAINING, **AUTOEP, "macs": BLOCK}
            )
        finally:
            output_capturing._CAN_RECORD_REGISTRY = real
    if kind == "blocks AutoEP cannot be told of":
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        settings = {**hf_models.SIZES, "num_local_experts": 8, "intermediate_size": 12, "head_dim": 8}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt_oss"](**settings))
        deepspeed_macs.initialize(model=model, config={**TRAINING, **AUTOEP, "macs": BLOCK})
    if kind == "another model's profile":
        counts = torch.ones(1, 4, dtype=torch.int64)
        profile = macs.Profile(visual=counts, text=2 * counts, fingerprints=("0" * 16,), top_k=2)
        engine = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": BLOCK})
        engine.macs.use("macs", engine.macs.config, profile)
        engine.eval()(batch_of(0, 3, 9))
    if kind == "mask of another shape":
        block = {**BLOCK, "modality": "manual"}
        engine = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": block}).eval()
        with macs.modality(torch.ones(3, 8, dtype=torch.bool)):
            engine(batch_of(0, 3, 9))


@on_deepspeed
def installed_twice() -> dict[str, bool]:
    """Installations within installations, and a model without experts under a script's block."""
    stock = deepspeed.init_inference
    outer = deepspeed_macs.install(BLOCK)
    first = deepspeed.init_inference
    inner = deepspeed_macs.install({**BLOCK, "capacity_factor": 2.0})
    engine = deepspeed.init_inference(Model(4, 2, 1), config=INFERENCE)
    dense = deepspeed.init_inference(nn.Linear(2, 2), config=INFERENCE)
    inner()
    again = deepspeed.init_inference(Model(4, 2, 1), config=INFERENCE)
    outer_is_back = deepspeed.init_inference is first and again.macs.config.capacity_factor == 0.5
    second = deepspeed_macs.install(BLOCK)
    outer()  # in another order than they came
    still = deepspeed.init_inference is not stock
    second()
    second()
    return {
        "inner acts": engine.macs.config.capacity_factor == 2.0,
        "dense model is left": not hasattr(dense, "macs"),
        "outer is back": outer_is_back,
        "second acts": still,
        "stock is back": deepspeed.init_inference is stock,
        "in eval mode": not engine.module.training,
    }


@on_deepspeed
def same_errors() -> list[tuple[str, str]]:
    """What DeepSpeed and the drop-in say of the same mistakes, in pairs."""
    said = []
    for config in ("/nowhere.json", 7):
        for function in (deepspeed.init_inference, deepspeed_macs.init_inference):
            try:
                function(Model(4, 2, 1), config)
            except Exception as error:
                said.append((type(error).__name__, str(error)))
    return said


@on_deepspeed
def zero_three() -> dict[str, Any]:
    """Calibration and planning where ZeRO keeps a part of every parameter on each rank."""
    world = dist.get_world_size()
    config = {
        **TRAINING,
        "expert_parallel": {"enabled": True, "autoep_size": world},
        "zero_optimization": {"stage": 3},
        "macs": BLOCK,
    }
    engine = deepspeed_macs.initialize(model=hf_models.build("qwen3_moe"), config=config)[0]
    engine.eval()
    ids = hf_models.token_ids(dist.get_rank())
    with engine.macs.calibration():
        logits_of(engine, ids)
    profile = engine.macs.measured_profile(dist.group.WORLD)
    engine.macs.use("macs", engine.macs.config, profile)
    logits = logits_of(engine, ids)
    plain = autoep_engine("qwen3_moe", BLOCK)
    with plain.macs.calibration():
        logits_of(plain, ids)
    same = plain.macs.measured_profile(dist.group.WORLD)
    plain.macs.use("macs", plain.macs.config, same)
    # A checkpoint that is loaded after the engine was made: served with its routers' rows.
    config["macs"] = {**BLOCK, "reroute": "group"}
    later = deepspeed_macs.initialize(model=hf_models.build("qwen3_moe"), config=config)[0]
    for layer in later.macs.layers:
        gate = layer.adapter.owner().router.gate.weight
        with deepspeed.zero.GatheredParameters([gate], modifier_rank=0):
            gate.copy_(drawn(layer.index, gate.shape))
    later.eval()
    rows = [layer.adapter.router_weight() for layer in later.macs.layers]
    assert all(torch.equal(one, drawn(index, one.shape)) for index, one in enumerate(rows))
    return {
        "profile": profile.fingerprints == same.fingerprints and torch.equal(profile.visual, same.visual),
        "logits": torch.equal(logits, logits_of(plain, ids)),
        "dropped": float(engine.macs.reports()[0].dropped.sum()),
    }


@on_deepspeed
def half_precision(dtype: str) -> bool:
    """AutoEP in half precision: MACS with room for all against stock."""
    ids = hf_models.token_ids(dist.get_rank())
    logits = []
    for block in (None, {"capacity_factor": 1e6}):
        engine = autoep_engine("qwen3_vl_moe", block, dtype=getattr(torch, dtype), use_grouped_mm=False)
        logits.append(logits_of(engine, ids))
    return torch.equal(*logits) and logits[0].dtype == getattr(torch, dtype)


@on_deepspeed
def pooled_capacity_is_told() -> tuple[list[str], bool]:
    """What the log says of capacities that this layer cannot profit from, and how often; whether a block
    that names no policy gets the one that it can profit from."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("macs.runtime")
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        block = {**BLOCK, "level": "rank"}
        engine = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": block})
        engine.macs.use("rank-balanced")
        engine.eval()(batch_of(0, 3, 9))
    finally:
        logging.disable(logging.WARNING)
        logger.removeHandler(handler)
    block = {"image_token_id": IMAGE_TOKEN}
    bare = deepspeed_macs.init_inference(Model(4, 2, 1), {**INFERENCE, "macs": block})
    return said, bare.macs.policy == "padded"


@on_deepspeed
def handed_to_deepep() -> dict[str, Any]:
    """What DeepEP's route is handed: the plan, -1 and no weight for what is dropped."""
    engine = autoep_engine("qwen3_moe", {"capacity_factor": 0.3, "reroute": "none"})
    layers = [module for module in engine.modules() if isinstance(module, AutoEPMoELayer)]
    handed: list[Any] = []
    for layer in layers:
        layer.comm_backend, layer.ep_size = "deepep", 2
        layer._deepep_route = lambda x, routed: handed.append((x, routed)) or torch.zeros_like(x)
    logits_of(engine, hf_models.token_ids(0))
    x, routed = handed[0]
    dropped = routed.selected_experts < 0
    return {
        "layers": len(handed),
        "shapes": [tuple(x.shape), tuple(routed.selected_experts.shape), tuple(routed.top_scores.shape)],
        "dropped": int(dropped.sum()),
        "weightless": bool((routed.top_scores[dropped] == 0).all()),
        "counts": int(routed.num_tokens_per_expert.sum()),
    }
