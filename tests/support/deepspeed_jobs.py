"""Jobs for worker processes: DeepSpeed's MoE layers, stock and with MACS, on one or more ranks."""

from __future__ import annotations

import functools
import logging
import os
import types
import warnings
from contextlib import contextmanager
from typing import Any

from support.cases import BUSY, SCALARS, busy

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

import deepspeed_macs
import macs
from deepspeed_macs.compat import support_transformers
from deepspeed_macs.models import expert_parallel_settings

from . import hf_models
from .plan_log import PlanLog

HIDDEN, FFN = 16, 24
IMAGE_TOKEN = 5

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def on_deepspeed(job):
    """Run a job with DeepSpeed on the worker's process group, and forget its groups afterwards."""

    @functools.wraps(job)
    def run(*arguments: Any, **named: Any) -> Any:
        os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as a launcher would
        deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
        try:
            with torch.inference_mode():
                return job(*arguments, **named)
        finally:
            del os.environ["LOCAL_RANK"]
            forget_groups()

    return run


def forget_groups() -> None:
    """DeepSpeed keeps its process groups in module globals; the next job has other ones."""
    for name, value in list(vars(groups).items()):
        if name.startswith("_") and "GROUP" in name:
            if isinstance(value, dict):
                value.clear()
            elif not callable(value):
                setattr(groups, name, None)
    groups.mpu = None
    groups.expert_tensor_parallel_world_size = 1
    deepspeed.comm.comm.cdb = None
    deepspeed.module_inject.layers.set_autotp_mode(training=False)
    deepspeed.inference.engine.InferenceEngine.inference_mp_group = None


def drawn(seed: int, shape: Any) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class Model(nn.Module):
    """One MoE layer on embedded ids; weights depend on the expert, not on the rank it lives on."""

    def __init__(self, experts: int, k: int, ep_size: int, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, HIDDEN)
        self.moe = MoE(HIDDEN, Expert(), num_experts=experts, k=k, ep_size=ep_size, **settings)
        local = experts // ep_size
        first = (dist.get_rank() % ep_size) * local
        with torch.no_grad():
            self.embed.weight.copy_(drawn(1, (32, HIDDEN)))
            self.moe.deepspeed_moe.gate.wg.weight.copy_(drawn(0, (experts, HIDDEN)) / 2)
            for expert, module in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts, first):
                fill_expert(module, expert)

    def forward(self, input_ids: torch.Tensor, used_token: torch.Tensor | None = None) -> torch.Tensor:
        return self.moe(self.embed(input_ids), used_token)[0]


def fill_expert(module: Expert, expert: int) -> Expert:
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(drawn(100 * expert + number, parameter.shape) / 4)
    return module


DROPLESS = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}


def batch_of(rank: int, rows: int, length: int) -> torch.Tensor:
    """Token ids [B, S] of a rank; ids of one kind are frequent, so that experts are unevenly hot."""
    generator = torch.Generator().manual_seed(7 + rank)
    ids = torch.randint(0, 32, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.5, IMAGE_TOKEN, ids)


def stock_engine(experts: int, k: int, **settings: Any) -> Any:
    """DeepSpeed's own, its expert-parallel groups joined as ``deepspeed.initialize`` would."""
    world = dist.get_world_size()
    model = Model(experts, k, world, **{**DROPLESS, **settings})
    model.moe.set_deepspeed_parallelism()
    return deepspeed.init_inference(model, config={"dtype": "fp32", "moe": {"ep_size": world}}).eval()


def macs_engine(experts: int, k: int, block: dict[str, Any], **settings: Any) -> Any:
    world = dist.get_world_size()
    config = {
        "dtype": "fp32",
        "moe": {"ep_size": world},
        "macs": {**BUSY, "image_token_id": IMAGE_TOKEN, "min_tokens": 0, **block},
    }
    return deepspeed_macs.init_inference(Model(experts, k, world, **settings), config).eval()


@contextmanager
def counted_traffic():
    """Rows of every all-to-all of floating point numbers, as this rank hands them to the collective."""
    rows: list[int] = []
    real = dist.all_to_all_single

    def counting(*arguments: Any, **named: Any) -> Any:
        source = named["input"] if "input" in named else arguments[1]
        if source.is_floating_point():
            rows.append(source.numel() // source.shape[-1])
        return real(*arguments, **named)

    dist.all_to_all_single = counting
    try:
        yield rows
    finally:
        dist.all_to_all_single = real


@on_deepspeed
def gate_unbounded_is_stock(experts: int, k: int) -> dict[str, bool]:
    """Stock output against MACS with room for everything, and against vanilla and MACS off."""
    ids = batch_of(dist.get_rank(), 3, 9)
    stock = stock_engine(experts, k)(ids)
    same = {}
    for name, block in (
        ("macs", {"capacity_factor": 1e6}),
        ("pooled", {"capacity_factor": 1e6, "level": "rank"}),
        ("token-drop", {"capacity_factor": 1e6, "policy": "token-drop"}),
        ("vanilla", {"policy": "vanilla"}),
        ("few tokens", {"capacity_factor": 0.1, "min_tokens": 1000}),
    ):
        # The gate's own settings are DeepSpeed's defaults: dropping, random selection, noise.
        same[name] = torch.equal(macs_engine(experts, k, block)(ids), stock)
    engine = macs_engine(experts, k, {"capacity_factor": 0.1}, **DROPLESS)
    same["bounded differs"] = not torch.equal(engine(ids), stock)
    with engine.macs.calibration():
        same["calibrating"] = torch.equal(engine(ids), stock)
    engine.macs.enabled = False
    same["off"] = torch.equal(engine(ids), stock)
    engine.macs.enabled = True
    engine.train()
    same["training"] = torch.equal(engine(ids), stock)
    return same


@on_deepspeed
def gate_planned_output(policy: str, settings: dict, experts: int, k: int) -> dict[str, Any]:
    """A layer's output, plan and traffic, and what the plan says the output must be."""
    ids = batch_of(dist.get_rank(), 3, 9)
    engine = macs_engine(experts, k, {"policy": policy, **settings})
    log = PlanLog(engine.macs)
    computed = []
    layer = engine.module.moe.deepspeed_moe
    layer.experts.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel() // HIDDEN))
    with counted_traffic() as sent:
        output = engine(ids)
    plan = log.plans[0]
    flat = engine.module.embed(ids).flatten(0, 1)
    expected = torch.zeros_like(flat)
    for expert in range(experts):
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1)
        expected += fill_expert(Expert(), expert)(flat) * weight[:, None]
    loads = torch.bincount(plan.experts[plan.experts >= 0], minlength=experts)
    statistics = {name: float(getattr(plan.statistics, name)) for name in SCALARS}
    return {
        "error": float((output.flatten(0, 1) - expected).abs().max()),
        "experts": plan.experts.tolist(),
        "weights": plan.weights.tolist(),
        "fullest": int(loads.max()),
        "sent": sent,
        "computed": computed,
        "statistics": statistics,
    }


@on_deepspeed
def gate_uneven_tokens(lengths: list[int], block: dict, settings: dict, k: int) -> list[Any]:
    """One sequence a rank, of different lengths, perhaps none; two forward passes."""
    length = lengths[dist.get_rank()]
    engine = macs_engine(4, k, block, **settings)
    outputs = [engine(batch_of(dist.get_rank(), 1, n)) for n in (length, max(0, length - 1))]
    return [tuple(outputs[0].shape), all(bool(torch.isfinite(output).all()) for output in outputs)]


@on_deepspeed
def gate_is_deterministic(block: dict) -> bool:
    """Two runs of a k = 2 gate with DeepSpeed's default noise, with different random states."""
    engine = macs_engine(4, 2, block)
    ids = batch_of(dist.get_rank(), 3, 9)
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(engine(ids))
    return torch.equal(*outputs)


@contextmanager
def flat_gathers():
    """gloo, unlike NCCL, wants both sides of an all-gather in one shape; DeepSpeed's are not."""
    real = deepspeed.comm.all_gather_into_tensor
    deepspeed.comm.all_gather_into_tensor = lambda output, source, group=None: real(
        output, source.flatten(), group=group
    )
    try:
        yield
    finally:
        deepspeed.comm.all_gather_into_tensor = real


@on_deepspeed
def gate_under_tensor_parallelism(k: int, settings: dict) -> dict[str, Any]:
    """Every rank a tensor-parallel rank with the same tokens, and experts spread over all of them."""
    world = dist.get_world_size()
    ids = batch_of(0, 3, 9)
    # Rerouting that does not ask where experts live, so that one process can say what must come out.
    block = {"capacity_factor": 0.7, "reroute": "group", **settings}
    block = {**BUSY, "image_token_id": IMAGE_TOKEN, "min_tokens": 0, **block}
    alone = Model(4, k, 1)
    deepspeed_macs.add_macs(alone, block)
    expected = alone.eval()(ids)
    group = dist.new_group(list(range(world)))
    groups.mpu = types.SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: world,
        get_tensor_model_parallel_rank=dist.get_rank,
        get_tensor_model_parallel_group=lambda: group,
        get_model_parallel_world_size=lambda: world,
        get_model_parallel_rank=dist.get_rank,
        get_model_parallel_group=lambda: group,
        get_data_parallel_world_size=lambda: 1,
        get_data_parallel_rank=lambda: 0,
        get_data_parallel_group=lambda: None,
    )
    shared = Model(4, k, world)
    groups._create_expert_and_data_parallel(world)
    shared.moe.deepspeed_moe._set_ep_group(groups._get_expert_parallel_group(f"ep_size_{world}"))
    runtime = deepspeed_macs.add_macs(shared, block)
    computed = []
    shared.moe.deepspeed_moe.experts.register_forward_pre_hook(
        lambda _, args: computed.append(args[0].shape[2])
    )
    with flat_gathers():
        output = shared.eval()(ids)
    return {
        "error": float((output - expected).abs().max()),
        "rows": computed,
        "fullest": int(runtime.reports()[0].rows_of_experts("after").max()),
        "dropped": float(runtime.reports()[0].dropped.sum()),
    }


def autoep_engine(
    name: str,
    macs_block: dict[str, Any] | None,
    tensor_parallel: int = 1,
    dtype: torch.dtype = torch.float32,
    **expert_parallel: Any,
) -> Any:
    """A Hugging Face model under AutoEP, stock where there is no block."""
    model = hf_models.build(name).to(dtype)
    settings = {"enabled": True, "autoep_size": dist.get_world_size(), **expert_parallel}
    if macs_block is None:  # stock AutoEP has to be told where a multimodal model keeps its experts
        settings = expert_parallel_settings(model.config, settings)
        support_transformers()  # newer ones break stock AutoEP
    config = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": settings}
    if tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": tensor_parallel, "preset_model": name}
    if macs_block is not None:
        named = {} if name in hf_models.MULTIMODAL else {"image_token_id": hf_models.IMAGE_TOKEN}
        config["macs"] = {**BUSY, "min_tokens": 0, **named, **macs_block}
    engine = deepspeed_macs.initialize(model=model, config=config)[0]
    engine.eval()  # which, unlike other modules', returns nothing
    return engine


def logits_of(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    return engine(input_ids=ids, use_cache=False).logits


@on_deepspeed
def autoep_unbounded_is_stock(name: str, expert_parallel: dict[str, Any]) -> dict[str, Any]:
    """Stock AutoEP against one process of Hugging Face, and MACS with room for all against stock."""
    ids = hf_models.token_ids(dist.get_rank())
    hugging_face = hf_models.build(name)(input_ids=ids, use_cache=False).logits
    stock = logits_of(autoep_engine(name, None, **expert_parallel), ids)
    same = {}
    for title, block in (
        ("macs", {"capacity_factor": 1e6}),
        ("pooled", {"capacity_factor": 1e6, "level": "rank"}),
        ("token-drop", {"capacity_factor": 1e6, "policy": "token-drop"}),
        ("vanilla", {"policy": "vanilla"}),
        ("few tokens", {"capacity_factor": 0.1, "min_tokens": 1000}),
    ):
        same[title] = torch.equal(logits_of(autoep_engine(name, block, **expert_parallel), ids), stock)
    engine = autoep_engine(name, {"capacity_factor": 0.3, "reroute": "none"}, **expert_parallel)
    same["bounded differs"] = not torch.equal(logits_of(engine, ids), stock)
    with engine.macs.calibration():
        same["calibrating"] = torch.equal(logits_of(engine, ids), stock)
    engine.macs.enabled = False
    same["off"] = torch.equal(logits_of(engine, ids), stock)
    engine.macs.enabled = True
    for module in engine.modules():  # the layers alone, so that nothing else of the model changes
        if isinstance(module, AutoEPMoELayer):
            module.train()
    same["training"] = torch.equal(logits_of(engine, ids), stock)
    return {"off by": float((stock - hugging_face).abs().max()), "same": same}


@on_deepspeed
def autoep_planned_output(
    name: str, policy: str, settings: dict[str, Any], expert_parallel: dict[str, Any]
) -> dict[str, Any]:
    """The first MoE layer's output, plan and traffic, and what the plan says the output must be."""
    world = dist.get_world_size()
    ids = hf_models.token_ids(dist.get_rank())
    block = {"policy": policy, **settings}
    engine = autoep_engine(name, block, **expert_parallel)
    layer = next(module for module in engine.modules() if isinstance(module, AutoEPMoELayer))
    log = PlanLog(engine.macs)
    computed, seen = [], []
    layer.experts.register_forward_pre_hook(lambda _, args: computed.append(int(args[1].sum())))
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with counted_traffic() as sent:
        logits = logits_of(engine, ids)
    plan, (hidden, output) = log.plans[0], seen[0]
    flat, output = hidden.flatten(0, 1), (output[0] if isinstance(output, tuple) else output)
    weights = []
    for weight in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
        parts = [torch.empty_like(weight) for _ in range(world)]
        dist.all_gather(parts, weight.data)
        weights.append(torch.cat(parts))
    expected = torch.zeros_like(flat)
    for expert, (gate, down, up) in enumerate(zip(*weights, strict=True)):
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1, keepdim=True)
        chosen = (plan.experts == expert).any(1, keepdim=True)
        x = flat * weight if layer.score_apply == "pre" else flat
        value = (nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
        expected += torch.where(chosen, value if layer.score_apply == "pre" else value * weight, 0)
    if layer.shared_experts is not None:
        shared = layer.shared_experts(flat)
        if layer.shared_experts_gate is not None:
            shared = torch.sigmoid(layer.shared_experts_gate(flat)) * shared
        expected += shared
    statistics = {n: float(getattr(plan.statistics, n)) for n in SCALARS}
    return {
        "error": float((output.flatten(0, 1) - expected).abs().max()),
        "finite": bool(torch.isfinite(logits).all()),
        "experts": plan.experts.tolist(),
        "weights": plan.weights.tolist(),
        "kept_rows": int((plan.experts >= 0).sum()),
        "to_rank": [
            int((plan.experts // layer.num_local_experts == rank)[plan.experts >= 0].sum())
            for rank in range(world)
        ],
        "sent": sent[:2],
        "computed": computed[0],
        "padding": 8 * layer.num_local_experts,
        "statistics": statistics,
    }


@on_deepspeed
def autoep_rerouted_within_groups(name: str) -> dict[str, Any]:
    """Under group-limited routing overflow goes to groups that the token uses already."""
    engine = autoep_engine(name, {"capacity_factor": 0.4, "reroute": "group"})
    layer = next(module for module in engine.modules() if isinstance(module, AutoEPMoELayer))
    router, log, seen = layer.router, PlanLog(engine.macs), []
    router.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    logits_of(engine, hf_models.token_ids(dist.get_rank(), rows=6))
    plan, size = log.plans[0], router.num_experts // router.num_expert_groups
    within = ((plan.experts // size)[..., None] == (seen[0] // size)[:, None, :]).any(-1)
    return {"rerouted": int(plan.rerouted.sum()), "within": bool(within[plan.rerouted].all())}


@on_deepspeed
def autoep_uneven_tokens(lengths: list[int], block: dict[str, Any]) -> list[Any]:
    """One sequence a rank, of different lengths."""
    engine = autoep_engine("qwen3_moe", block)
    logits = logits_of(engine, hf_models.token_ids(dist.get_rank(), 1, lengths[dist.get_rank()]))
    return [tuple(logits.shape), bool(torch.isfinite(logits).all())]


@on_deepspeed
def autoep_virtual_plan(virtual_ranks: int) -> Any:
    """The first layer's plan of the same tokens on one process or on several."""
    world = dist.get_world_size()
    sources = range(virtual_ranks) if virtual_ranks > 1 else [dist.get_rank()]
    ids = torch.cat([hf_models.token_ids(rank) for rank in sources])
    block = {"capacity_factor": 0.6, "virtual_ranks": virtual_ranks}
    engine = autoep_engine("qwen3_moe", block)
    log = PlanLog(engine.macs)
    logits_of(engine, ids)
    assert world == 1 or virtual_ranks == 1
    return [log.plans[0].experts.tolist(), float(log.plans[0].statistics.rerouted)]


@on_deepspeed
def not_folded(score_apply: str, tp_size: int) -> list[Any]:
    """Logits of the same tokens, where no ranks are tensor-parallel, over as many ranks."""
    engine = autoep_engine("mixtral", {"capacity_factor": 0.4, "reroute": "none"}, score_apply=score_apply)
    return logits_of(engine, hf_models.token_ids(dist.get_rank() // tp_size)).tolist()


@on_deepspeed
def folded(score_apply: str, tp_size: int) -> dict[str, Any]:
    """AutoEP folded with tensor parallelism, stock and with MACS, and the rows that travel."""
    options = {"tensor_parallel": tp_size, "score_apply": score_apply, "validate_folding_routing": True}
    ids = hf_models.token_ids(dist.get_rank() // tp_size)  # the same on tensor-parallel ranks
    with counted_traffic() as stock_rows:
        stock = logits_of(autoep_engine("mixtral", None, **options), ids)
    same = {}
    for title, block in (
        ("macs", {"capacity_factor": 1e6}),
        ("vanilla", {"policy": "vanilla"}),
        ("few tokens", {"capacity_factor": 0.1, "min_tokens": 1000}),
    ):
        same[title] = torch.equal(logits_of(autoep_engine("mixtral", block, **options), ids), stock)
    engine = autoep_engine("mixtral", {"capacity_factor": 0.4, "reroute": "none"}, **options)
    log = PlanLog(engine.macs)
    with counted_traffic() as rows:
        bounded = logits_of(engine, ids)
    try:  # whose additions depend on the rank, not on the tokens alone
        engine.macs.use("expanded-drop", busy(capacity_factor=0.5, min_tokens=0))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {
        "same": same,
        "logits": bounded.tolist(),
        "sent": rows[0],
        "stock sent": stock_rows[0],
        "kept": int((log.plans[0].experts >= 0).sum()),
        "refusal": refusal,
    }


@on_deepspeed
def padding_found(name: str, block: dict[str, Any], given: str, way: str = "call") -> dict[str, Any]:
    """A text-only or multimodal model under AutoEP, called with padding told in some way."""
    ids = hf_models.token_ids(0)
    mask = torch.ones_like(ids)
    mask[:, :8] = 0
    ids = ids.masked_fill(mask == 0, 0)
    engine = autoep_engine(name, {"policy": "token-drop", "capacity_factor": 1.0, **block})
    seen: list[Any] = []
    layer = engine.macs.layers[0]
    layer.on_plan(lambda event: seen.append(event.tokens))
    arguments = {"input_ids": ids}
    if given == "mask":
        arguments["attention_mask"] = mask
    elif given == "ones":
        arguments["attention_mask"] = torch.ones_like(mask)
    elif given == "embeddings":
        embeds = engine.module.get_input_embeddings()(ids)
        arguments = {"inputs_embeds": embeds, "attention_mask": mask}
    if way == "block":
        with macs.modality(ids == hf_models.IMAGE_TOKEN):
            engine(use_cache=False, **arguments)
    else:
        engine(use_cache=False, **arguments)
    tokens = seen[0]
    return {
        "padding": int((~tokens.valid).sum()),
        "tokens": int(engine.macs.reports()[0].tokens[0]),
        "right": bool(tokens.valid.view(ids.shape).equal(mask.bool())),
        "visual": int(tokens.visual.sum()),
    }


@on_deepspeed
def disabled_experts(policy: str) -> list[int]:
    """Assignments of each layer to the experts that a correction bias takes out: of the router, of the
    plan."""
    engine = autoep_engine(
        "glm4_moe", {"policy": policy, "capacity_factor": 1.0, "level": "rank", "reroute": "group"}
    )
    found = []
    for module in engine.modules():
        if isinstance(module, AutoEPMoELayer):
            module.router.e_score_correction_bias.data[5:] = -1e4
            found.append(module)
    log = PlanLog(engine.macs)
    logits_of(engine, hf_models.token_ids(0))
    out = [int((plan.experts >= 5).sum()) for plan in log.plans]
    return [len(found), sum(out), int(engine.macs.reports()[0].rerouted.sum())]


@on_deepspeed
def router_logits(name: str) -> dict[str, Any]:
    """``output_router_logits`` under AutoEP with MACS, beside Hugging Face's own."""
    ids = hf_models.token_ids(0)
    own = hf_models.build(name)(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    engine = autoep_engine(name, {"capacity_factor": 1e6})
    found = engine(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    return {
        "layers": [len(own), len(found)],
        "off by": max(float((a - b).abs().max()) for a, b in zip(own, found, strict=True)),
    }


@on_deepspeed
def gates_off_and_on(off: str, drop_tokens: bool, k: int) -> list[float]:
    """MoE layers whose MACS is on there and off here make the same collectives: no rank hangs."""
    engine = macs_engine(4, k, {"capacity_factor": 0.7}, drop_tokens=drop_tokens, eval_capacity_factor=0.5)
    engine.macs.layers[0].consistency._store = None  # the comparison, which would raise, is not tried here
    ids = batch_of(dist.get_rank(), 3, 9)
    with counted_traffic() as rows:
        for step in range(3):
            if dist.get_rank() == 1:
                engine.macs.enabled = not (off == "off" and step == 1)
                engine.train(off == "training" and step == 1)
            output = engine(ids)
    return [float(torch.isfinite(output).all()), float(len(rows))]
