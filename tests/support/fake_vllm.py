"""A stub of vLLM: its runner, routers and a model of one MoE layer, under the names the plugin imports."""

import enum
import sys
import types
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

import vllm_macs

D, E, K, T, R = 16, 8, 2, 48, 2


class CUDAGraphMode(enum.Enum):
    NONE, FULL = 0, 1


class CompilationMode(enum.Enum):
    NONE, VLLM_COMPILE = 0, 1


class Engine:
    """Modules of the names that the plugin imports, and the state of a step."""

    def __init__(self):
        self.context, self.cpu, self.rank, self.config = None, True, 0, None
        self.multimodal, self.digests = True, None
        self.envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False, VLLM_MOE_ROUTING_SIMULATION_STRATEGY="")

    @contextmanager
    def step(self, padding=None, mode=CUDAGraphMode.NONE, metadata=True):
        self.context = SimpleNamespace(
            cudagraph_runtime_mode=mode, attn_metadata={} if metadata else None, is_padding=padding
        )
        try:
            yield
        finally:
            self.context = None


class BaseRouter:
    top_k, scoring_func = K, "softmax"

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = router_logits.softmax(-1).topk(K)
        return weights / weights.sum(-1, keepdim=True), ids.to(indices_type)


class CPURouter(BaseRouter):
    pass


class MoERunner(nn.Module):
    """A layer whose experts multiply by their number."""

    def __init__(self, router, name="layers.0.mlp"):
        super().__init__()
        self.gate, self.router, self.layer_name = nn.Linear(D, E, bias=False), router, name
        kernel = SimpleNamespace(fused_experts=type("CPUUnquantizedExperts", (), {})())
        method = SimpleNamespace(moe_kernel=kernel, is_monolithic=False)
        self.routed_experts = SimpleNamespace(quant_method=method)
        self.moe_config = SimpleNamespace(ep_size=R, tp_size=1, num_logical_experts=E)
        self.expert_map_manager = SimpleNamespace(placement_strategy="linear")

    def _forward_impl(self, hidden):
        weights, ids = self.router._compute_routing(hidden, self.gate(hidden), torch.int32)
        self.seen = ids
        parts = torch.where(ids < 0, 0.0, weights * (1 + ids))
        return hidden * parts.sum(-1, keepdim=True)

    def forward(self, hidden):
        return self._forward_impl(hidden)


class Model(nn.Module):
    def __init__(self, factory):
        super().__init__()
        self.layers = nn.ModuleList(MoERunner(factory(), f"layers.{one}.mlp") for one in range(2))

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        return torch.nn.functional.one_hot(input_ids % D, D).float()

    def forward(self, input_ids, inputs_embeds=None):
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)
        return inputs_embeds


def stub(monkeypatch):
    state = Engine()

    def module(name, **contents):
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, own = name.rpartition(".")
        if parent:
            if parent not in sys.modules:
                module(parent, __path__=[])
            setattr(sys.modules[parent], own, made)
        return made

    class BaseModelLoader:
        def load_model(self, vllm_config, model_config):
            factory = sys.modules["vllm.model_executor.layers.fused_moe.layer"]
            return Model(lambda: factory.create_fused_moe_router())

    class EngineArgs:
        def __init__(self, config):
            self.config = config

        def create_engine_config(self):
            return self.config

    root = module("vllm", __path__=[], __version__="0.33.0", envs=state.envs)
    root.__spec__ = SimpleNamespace(name="vllm")
    module("vllm.envs", **vars(state.envs))
    module(
        "vllm.config",
        CUDAGraphMode=CUDAGraphMode,
        CompilationMode=CompilationMode,
        get_current_vllm_config=lambda: state.config,
    )
    module("vllm.platforms", current_platform=SimpleNamespace(is_cpu=lambda: state.cpu))
    module(
        "vllm.forward_context",
        get_forward_context=lambda: state.context,
        is_forward_context_available=lambda: state.context is not None,
    )
    group = SimpleNamespace(world_size=1, cpu_group=None)
    module(
        "vllm.distributed",
        get_tensor_model_parallel_rank=lambda: state.rank,
        get_tp_group=lambda: group,
    )
    module("vllm.engine.arg_utils", EngineArgs=EngineArgs)
    module("vllm.model_executor.layers.fused_moe.layer", create_fused_moe_router=CPURouter)
    module("vllm.model_executor.layers.fused_moe.router.base_router", BaseRouter=BaseRouter)
    module("vllm.model_executor.layers.fused_moe.runner.moe_runner", MoERunner=MoERunner)
    module("vllm.model_executor.model_loader.base_loader", BaseModelLoader=BaseModelLoader)

    class CPUUnquantizedExperts:
        def apply(self, output, hidden_states, topk_weights, topk_ids, **rest):
            output.copy_(hidden_states * topk_weights * (1 + topk_ids))

    module(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe", CPUUnquantizedExperts=CPUUnquantizedExperts
    )
    for name in ("vllm_macs.plugin", "vllm_macs.cpu"):  # what is patched belongs to this stub
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    return state


def config_of(engine, entry=None, **parallel):
    given = {"data_parallel_size": 1, "pipeline_parallel_size": 1, "tensor_parallel_size": 2}
    given |= {"enable_expert_parallel": True, "enable_eplb": False}
    engine.config = SimpleNamespace(
        additional_config={} if entry is None else {"macs": entry},
        parallel_config=SimpleNamespace(**{**given, **parallel}),
        compilation_config=SimpleNamespace(mode=CompilationMode.NONE),
        load_config=SimpleNamespace(load_format="auto"),
        model_config=SimpleNamespace(supports_multimodal_inputs=engine.multimodal),
        speculative_config=None,
        lora_config=None,
    )
    return engine.config


def loaded(engine, entry=None, **parallel):
    """A model that the patched loader has loaded."""
    torch.manual_seed(0)
    vllm_macs.register()
    config = config_of(engine, entry, **parallel)
    loader = sys.modules["vllm.model_executor.model_loader.base_loader"].BaseModelLoader()
    return loader.load_model(config, config.model_config)


IDS = torch.arange(T) * 7 % 31
VISUAL = torch.arange(T) % 3 > 0


def run(engine, model, **step):
    with engine.step(**step), torch.no_grad():
        hidden = model.embed_input_ids(IDS, None, is_multimodal=VISUAL)
        return model(IDS, inputs_embeds=hidden)
