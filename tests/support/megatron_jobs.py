"""Jobs for worker processes: a Megatron MoE layer, stock and with MACS, on one or more ranks."""

from __future__ import annotations

import functools
import logging
import urllib.request
import warnings
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference import utils as inference_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

import macs
from macs import Runtime
from megatron_macs import cpu_engine, with_macs
from support.cases import SCALARS, busy

from .plan_log import PlanLog

HIDDEN, FFN = 16, 24

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def on_megatron(job):
    """Run a job with Megatron's parallel state, every rank an expert-parallel rank, on the CPU."""

    @functools.wraps(job)
    def run(*arguments: Any, **named: Any) -> Any:
        with cpu_engine():
            parallel_state.initialize_model_parallel(
                expert_model_parallel_size=dist.get_world_size(), distributed_timeout_minutes=1
            )
            try:
                with torch.inference_mode():
                    return job(*arguments, **named)
            finally:
                parallel_state.destroy_model_parallel()
                leave_inference_mode()

    return run


def leave_inference_mode() -> None:
    """Newer engines leave theirs on in the process, which the next job shares."""
    mode = getattr(inference_utils, "InferenceMode", None)
    if mode is not None:
        mode.unset_active()


def layer_config(dispatcher: str, experts: int, top_k: int, **changes: Any) -> TransformerConfig:
    settings = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": FFN,
        "moe_ffn_hidden_size": FFN,
        "num_moe_experts": experts,
        "moe_router_topk": top_k,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_router_pre_softmax": top_k == 1,
        "moe_token_dispatcher_type": dispatcher,
        "expert_model_parallel_size": dist.get_world_size(),
        "normalization": "RMSNorm",
        "activation_func": functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "hidden_dropout": 0.0,
    }
    return TransformerConfig(**{**settings, **changes})


def build_layer(
    runtime: Runtime | None, config: TransformerConfig, groups: ProcessGroupCollection | None = None
) -> torch.nn.Module:
    """A MoE layer whose weights depend on the expert alone, not on the rank it lives on."""
    layer = bare_layer(runtime, config, groups)
    with torch.no_grad():
        for expert, module in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            module.linear_fc1.weight.copy_(drawn(100 + expert, module.linear_fc1.weight.shape) / 4)
            module.linear_fc2.weight.copy_(drawn(900 + expert, module.linear_fc2.weight.shape) / 4)
    return layer


def bare_layer(
    runtime: Runtime | None, config: TransformerConfig, groups: ProcessGroupCollection | None = None
) -> torch.nn.Module:
    """A MoE layer with the router's weights set, and its experts' not; no ``groups``: the global ones."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    mlp = (spec if runtime is None else with_macs(spec, runtime)).submodules.mlp
    groups = get_default_pg_collection() if groups is None else groups
    if isinstance(mlp, ModuleSpec):
        layer = build_module(mlp, config=config, pg_collection=groups)
    else:
        layer = mlp(config=config, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(drawn(0, layer.router.weight.shape) / 2)
    return layer.eval()


def drawn(seed: int, shape: Any) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(rank: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [S, B, D] and mask [B, S] of a rank; experts 0 and 1 are hot for visual tokens."""
    hidden = drawn(7 + rank, (rows, length, HIDDEN))
    mask = drawn(70 + rank, (rows, length)) > -0.5
    lean = drawn(0, (64, HIDDEN))[:2].mean(0)
    hidden = hidden + mask[..., None] * lean
    return hidden.transpose(0, 1).contiguous(), mask


@on_megatron
def unbounded_is_stock(dispatcher: str, experts: int, top_k: int, changes: dict) -> dict[str, bool]:
    """Stock output against MACS with room for everything, and against vanilla and MACS off."""
    config = layer_config(dispatcher, experts, top_k, **changes)
    hidden, mask = batch_of(dist.get_rank(), 3, 9)
    stock, _ = build_layer(None, config)(hidden)
    same = {}
    for name, policy, settings in (
        ("macs", "macs", {"capacity_factor": 1e6, "min_tokens": 0}),
        ("macs pooled", "macs", {"capacity_factor": 1e6, "min_tokens": 0, "level": "rank"}),
        ("token-drop", "token-drop", {"capacity_factor": 1e6, "min_tokens": 0}),
        ("rank-balanced", "rank-balanced", {"capacity_factor": 1e6, "min_tokens": 0}),
        ("vanilla", "vanilla", {}),
        ("few tokens", "macs", {"capacity_factor": 0.1, "min_tokens": 1000}),
        ("off", "macs", {"capacity_factor": 0.1, "min_tokens": 0}),
    ):
        runtime = Runtime(busy(**settings), policy=policy)
        layer = build_layer(runtime, config)
        runtime.enabled = name != "off"
        with macs.modality(mask):
            output, _ = layer(hidden)
        same[name] = torch.equal(output, stock)
    runtime = Runtime(busy(capacity_factor=0.1, min_tokens=0))
    layer = build_layer(runtime, config)
    with macs.modality(mask):
        same["calibrating"] = False
        with runtime.calibration():
            same["calibrating"] = torch.equal(layer(hidden)[0], stock)
        same["bounded differs"] = not torch.equal(layer(hidden)[0], stock)
        layer.router(hidden)  # a forward pass that ended early leaves nothing behind
        layer.train()
        same["training"] = torch.equal(layer(hidden)[0], stock)
    return same


@on_megatron
def planned_output(
    dispatcher: str,
    policy: str,
    settings: dict,
    rows: int,
    length: int,
    experts: int,
    top_k: int,
    virtual_ranks: int,
) -> dict[str, Any]:
    """A layer's output, plan and traffic, and what the plan says the output must be."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = layer_config(dispatcher, experts, top_k)
    runtime = Runtime(busy(**{"min_tokens": 0, **settings}), policy=policy, virtual_ranks=virtual_ranks)
    layer = build_layer(runtime, config)
    log = PlanLog(runtime)
    parts = [
        batch_of(source, rows, length) for source in (range(virtual_ranks) if virtual_ranks > 1 else [rank])
    ]
    hidden = torch.cat([part[0] for part in parts], 1)
    mask = torch.cat([part[1] for part in parts], 0)
    sent: list[int] = []
    real = dist.all_to_all_single

    def counting(output: Any, source: Any, *arguments: Any, **named: Any) -> Any:
        sent.append(source.shape[0])
        return real(output, source, *arguments, **named)

    dist.all_to_all_single = counting
    try:
        with macs.modality(mask):
            output, _ = layer(hidden)
    finally:
        dist.all_to_all_single = real
    plan = log.plans[0]
    flat = hidden.flatten(0, 1)
    expected = torch.zeros_like(flat)
    for expert in range(experts):
        chosen = (plan.experts == expert).any(1)
        weight = torch.where(plan.experts == expert, plan.weights, 0).sum(1)
        gate, up = functional.linear(flat, drawn(100 + expert, (2 * FFN, HIDDEN)) / 4).chunk(2, -1)
        value = functional.linear(functional.silu(gate) * up, drawn(900 + expert, (HIDDEN, FFN)) / 4)
        expected += torch.where(chosen[:, None], value * weight[:, None], 0)
    shape = (length, hidden.shape[1], -1)
    statistics = {name: float(getattr(plan.statistics, name)) for name in SCALARS}
    return {
        "error": float((output.flatten(0, 1) - expected).abs().max()) if flat.numel() else 0.0,
        "experts": plan.experts.view(shape).transpose(0, 1).tolist(),
        "weights": plan.weights.view(shape).transpose(0, 1).tolist(),
        "output": output.transpose(0, 1).tolist(),
        "rows_sent": sent[:1],
        "rows_planned": int((plan.experts >= 0).sum()),
        "statistics": statistics,
        "world": world,
    }


@on_megatron
def traced(folder: str, logits: bool) -> list[Any]:
    """Stock Megatron's router tracer over two layers and some steps; what the routers chose."""
    from megatron.core.transformer.moe.router_trace import RouterTracer

    rank = dist.get_rank()
    layers = [build_layer(None, layer_config("alltoall", 4, 2)) for _ in range(2)]
    with torch.no_grad():
        layers[1].router.weight.copy_(drawn(5, layers[1].router.weight.shape) / 2)
    model = torch.nn.ModuleDict({"decoder": torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})})
    for layer in layers:
        model["decoder"]["layers"].append(torch.nn.ModuleDict({"mlp": layer}))
    tracer = RouterTracer(folder, 100, rank, capture_logits=logits)
    tracer.register_hooks(model)
    chosen = []
    for step in range(4):
        hidden, _ = batch_of(rank + 2 * step, 1, 4 if step == 3 else 80)
        for number, layer in enumerate(layers):
            _, chosen_map = layer.router(hidden)
            chosen.append((number, step, chosen_map.nonzero()[:, 1].view(-1, 2).tolist()))
    tracer.flush()
    return chosen


@on_megatron
def scraped(steps: int) -> dict[str, Any]:
    """What the endpoint says after so many steps, and what was counted independently of it."""
    rank = dist.get_rank()
    runtime = Runtime(busy(capacity_factor=0.7, min_tokens=20, reroute="group"))
    layer = build_layer(runtime, layer_config("alltoall", 4, 2))
    server = macs.serve_metrics(runtime, 0)
    expected: dict[str, int] = {}

    def count(event: macs.PlanEvent) -> None:
        plan, chosen, tokens = event.plan, event.experts, event.tokens
        assert plan is not None
        for kind in ("text", "visual"):
            own = tokens.visual if kind == "visual" else ~tokens.visual
            for action, which in (
                ("dropped", plan.experts[own] < 0),
                ("rerouted", plan.rerouted[own]),
                ("kept", plan.experts[own] == chosen[own]),
            ):
                name = f"{kind} {action}"
                expected[name] = expected.get(name, 0) + int(which.sum())

    runtime.layers[0].on_plan(count)
    answers = []
    try:
        for step in range(steps):
            hidden, mask = batch_of(rank + 2 * step, 1, 8 if step % 4 == 3 else 32)
            with macs.modality(mask):
                layer(hidden)
            if step % 100 == 50:  # while it runs
                answers.append(urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read())
        answers.append(urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read())
    finally:
        server.close()
    return {"expected": expected, "answer": answers[-1].decode(), "scrapes": len(answers)}


@on_megatron
def rerouted_within_groups(changes: dict) -> dict[str, Any]:
    """Where group-limited routing lets overflow go: the groups that the token uses already."""
    config = layer_config("alltoall", 8, 2, **changes)
    runtime = Runtime(busy(min_tokens=0, capacity_factor=1.0, reroute="group"))
    layer = build_layer(runtime, config)
    hidden, mask = batch_of(dist.get_rank(), 6, 16)
    seen: list[Any] = []
    runtime.layers[0].on_plan(lambda event: seen.append((event.experts, event.plan)))
    with macs.modality(mask):
        layer(hidden)
    chosen, plan = seen[0]
    group = plan.experts // (8 // changes["moe_router_num_groups"])
    own = (chosen // (8 // changes["moe_router_num_groups"]))[:, None, :]
    within = (group[..., None] == own).any(-1)
    return {"rerouted": int(plan.rerouted.sum()), "within": bool(within[plan.rerouted].all())}


@on_megatron
def uneven_tokens(settings: dict, lengths: list[int]) -> list[Any]:
    """One sequence a rank, of different lengths, perhaps none at all."""
    config = layer_config("alltoall", 4, 2)
    runtime = Runtime(busy(**{"min_tokens": 0, **settings}))
    layer = build_layer(runtime, config)
    length = lengths[dist.get_rank()]
    hidden, mask = batch_of(dist.get_rank(), 1, length)
    with macs.modality(mask):
        output, _ = layer(hidden)
    report = runtime.reports()[0]
    return [tuple(output.shape), bool(torch.isfinite(output).all()), float(report.dropped.sum())]


@on_megatron
def odd_batch(kind: str, settings: dict) -> dict[str, float]:
    """A batch that is odd in some way; whether the output is finite, and the statistics."""
    experts, top_k = (4, 4) if kind == "k is E" else (4, 2)
    layer_settings = layer_config("alltoall", experts, top_k)
    runtime = Runtime(busy(**{"min_tokens": 0, **settings}))
    layer = build_layer(runtime, layer_settings)
    hidden, mask = batch_of(dist.get_rank(), 2, 8)
    if kind == "one token":
        hidden, mask = hidden[:1, :1].contiguous(), mask[:1, :1]
    if kind == "no visual tokens":
        mask = torch.zeros_like(mask)
    if kind == "all visual":
        mask = torch.ones_like(mask)
    if kind == "not finite":
        hidden[0, 0, 3] = float("nan")
        hidden[1, 1, 2] = float("inf")
        mask[:] = True
    with macs.modality(mask):
        output, _ = layer(hidden)
    report = runtime.reports()[0]
    finite = torch.isfinite(output).flatten(0, 1).all(1)
    return {
        "finite": int(finite.sum()),
        "tokens": hidden.shape[0] * hidden.shape[1],
        "nonfinite": float(report.nonfinite.sum()),
        "visual": float(report.visual.sum()),
        "R_v": float(report.visual_ratio[0]),
    }


@on_megatron
def bad_mask(kind: str, ranks: list[int]) -> None:
    """Run a layer with a mask that does not fit, on some ranks; must raise there."""
    runtime = Runtime(busy(min_tokens=0))
    layer = build_layer(runtime, layer_config("alltoall", 4, 2))
    hidden, mask = batch_of(dist.get_rank(), 2, 8)
    if dist.get_rank() in ranks:
        mask = {
            "length": lambda: mask[:, :-1],
            "batch": lambda: mask[:1],
            "dtype": lambda: mask.float(),
            "device": lambda: mask.to("meta"),
            "shape": lambda: mask.flatten(),
        }[kind]()
    with macs.modality(mask):
        layer(hidden)


@on_megatron
def refused(changes: dict, settings: dict) -> None:
    """Build a layer with settings that MACS must refuse."""
    build_layer(
        Runtime(busy(**settings)),
        layer_config(**{"dispatcher": "alltoall", "experts": 4, "top_k": 2, **changes}),
    )


@on_megatron
def calibrate_and_use(folder: str) -> dict[str, Any]:
    """Measure a profile over all ranks, use it, and use one that belongs to another model."""
    config = layer_config("alltoall", 4, 2)
    runtime = Runtime(busy(min_tokens=0))
    layer = build_layer(runtime, config)
    hidden, mask = batch_of(dist.get_rank(), 2, 8)
    with macs.modality(mask), runtime.calibration():
        layer(hidden)
    profile = runtime.measured_profile(dist.group.WORLD)
    path = f"{folder}/{dist.get_rank()}.safetensors"
    profile.save(path)
    runtime.use("macs", runtime.config, macs.Profile.load(path))
    with macs.modality(mask):
        layer(hidden)
    with torch.no_grad():
        layer.router.weight.add_(0.5)
    runtime.use("macs", runtime.config, profile)
    try:
        with macs.modality(mask):
            layer(hidden)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {
        "visual": profile.visual.tolist(),
        "text": profile.text.tolist(),
        "expected": int(mask.sum()) * 2,
        "refusal": refusal,
    }


@on_megatron
def parameters_are_stock() -> bool:
    """Names, shapes and order of the state dict are the stock layer's."""
    config = layer_config("alltoall", 4, 2)
    runtime = Runtime()
    layers = build_layer(None, config), build_layer(runtime, config)
    first, second = (
        [
            (name, tuple(p.shape))
            for name, p in layer.state_dict().items()
            if p is not None and hasattr(p, "shape")
        ]
        for layer in layers
    )
    return first == second


def groups_of_ones_own() -> ProcessGroupCollection:
    """Every rank an expert-parallel rank, in groups that no global state knows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([one]) for one in range(world)][rank]
    everyone = dist.new_group(list(range(world)))
    names = {
        "ep": everyone,
        "tp_ep": everyone,
        "tp": alone,
        "cp": alone,
        "tp_cp": alone,
        "expt_tp": alone,
        "expt_dp": alone,
        "dp": everyone,
        "dp_cp": everyone,
        "tp_dp_cp": everyone,
        "tp_ep_pp": everyone,
    }
    return ProcessGroupCollection(**names)


def without_global_state(dispatcher: str, settings: dict) -> dict[str, Any]:
    """A layer in groups that are passed in, while Megatron's parallel state is not set up at all."""
    assert not parallel_state.is_initialized()
    with cpu_engine(), torch.inference_mode():
        groups = groups_of_ones_own()
        parallel_state._set_global_memory_buffer()  # scratch of the all-gather
        config = layer_config(dispatcher, 8, 2)
        hidden, mask = batch_of(dist.get_rank(), 3, 12)
        runtime = Runtime(busy(**{"min_tokens": 0, **settings}))
        layer = build_layer(runtime, config, groups)
        log = PlanLog(runtime)
        with macs.modality(mask):
            output, _ = layer(hidden)
        parallel_state.destroy_global_memory_buffer()
    plan = log.plans[0]
    return {"output": output.tolist(), "plan": plan.experts.tolist(), "dropped": int(plan.statistics.dropped)}


@on_megatron
def with_global_state(dispatcher: str, settings: dict) -> dict[str, Any]:
    """The same layer in Megatron's own groups."""
    config = layer_config(dispatcher, 8, 2)
    hidden, mask = batch_of(dist.get_rank(), 3, 12)
    runtime = Runtime(busy(**{"min_tokens": 0, **settings}))
    layer = build_layer(runtime, config)
    log = PlanLog(runtime)
    with macs.modality(mask):
        output, _ = layer(hidden)
    plan = log.plans[0]
    return {"output": output.tolist(), "plan": plan.experts.tolist(), "dropped": int(plan.statistics.dropped)}


@on_megatron
def planned_where_graphs_are_on(first: str) -> dict[str, Any]:
    """A layer of a model whose decoding is captured, on a prompt: the first step, or after a small one."""
    changes = {"cuda_graph_impl": "local", "moe_pad_experts_for_cuda_graph_inference": True}
    config = layer_config("alltoall", 8, 2, **changes)
    runtime = Runtime(busy(min_tokens=8, capacity_factor=0.5))
    layer = build_layer(runtime, config)
    dispatcher = layer.token_dispatcher
    small, small_mask = batch_of(dist.get_rank(), 1, 4)
    hidden, mask = batch_of(dist.get_rank(), 3, 12)
    points, rows = [], []
    if first == "small":
        with macs.modality(small_mask):
            layer(small)
        points.append(dispatcher.cuda_dtoh_point)
    with macs.modality(mask):
        output, _ = layer(hidden)
    points.append(dispatcher.cuda_dtoh_point)
    rows.append(int(dispatcher.num_out_tokens))
    plain = build_layer(runtime, layer_config("alltoall", 8, 2))
    with macs.modality(mask):
        expected, _ = plain(hidden)
    report = runtime.reports()[0]
    return {
        "points": points,
        "same": torch.equal(output, expected),
        "rows": rows[0] == int(report.kept[-1] + report.rerouted[-1]),
        "on host": not isinstance(dispatcher.num_out_tokens, torch.Tensor)
        or dispatcher.num_out_tokens.device.type == "cpu",
    }


@on_megatron
def reports_of_uneven_steps(extra: int, whole: bool) -> list[int]:
    """Reports summed over ranks of which the first ran ``extra`` more; ``whole``: each by itself."""
    runtime = Runtime(busy(min_tokens=0), policy="vanilla")
    layer = build_layer(runtime, layer_config("alltoall", 4, 2))
    hidden, mask = batch_of(dist.get_rank(), 2, 8)
    for step in range(1 + extra):
        runtime.recording = step == 0 or dist.get_rank() == 0
        with macs.modality(mask):
            layer(hidden)
    return [len(report.records) for report in runtime.reports(None if whole else dist.group.WORLD)]


@on_megatron
def layer_that_guesses_ahead() -> dict[str, Any]:
    """A layer of multi-token prediction beside one of the decoder."""
    runtime = Runtime(busy(min_tokens=0, capacity_factor=0.3))
    config = layer_config("alltoall", 4, 2)
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    mlp = with_macs(spec, runtime).submodules.mlp
    layer = mlp(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=True).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(drawn(1, parameter.shape) / 4)
    hidden, mask = batch_of(dist.get_rank(), 2, 8)
    with macs.modality(mask):
        layer(hidden)
    return {"layers": len(runtime.layers), "dispatcher": type(layer.token_dispatcher).__name__}
