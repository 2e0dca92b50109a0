"""What MACS cannot honour in vLLM, each with the reason; ``docs/vllm.md`` has the table."""

from __future__ import annotations

from typing import Any

SKIP_DROPPED = {
    "TritonExperts",
    "TritonOrDeepGemmExperts",
    "DeepGemmExperts",
    "MarlinExperts",
    "CPUUnquantizedExperts",
    "X86CPUUnquantizedExperts",
    "ArmCPUUnquantizedExperts",
    "PowerCPUUnquantizedExperts",
}
"""Classes of experts that skip -1 in ``topk_ids`` under expert parallelism; those of CPUs by ``cpu.py``."""

LOADERS = {"tensorizer", "modelexpress", "mx"}
"""Load formats that bypass ``BaseModelLoader.load_model``, where layers are found."""

ROUTERS = "GroupedTopKRouter", "FusedTopKRouter", "FusedTopKBiasRouter", "CPURouter"
"""Routers whose choice is k logical experts by score."""


def of_config(config: Any) -> list[str]:
    """What a ``VllmConfig`` asks for and MACS cannot honour."""
    import vllm.envs as envs
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    parallel, cpu = config.parallel_config, current_platform.is_cpu()
    one_rank = parallel.tensor_parallel_size == 1
    found = {
        "data_parallel_size > 1: ranks have tokens of their own": parallel.data_parallel_size > 1,
        "pipeline_parallel_size > 1: later stages do not see which tokens are visual": (
            parallel.pipeline_parallel_size > 1
        ),
        "prefill_context_parallel_size > 1: ranks have tokens of their own": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "no enable_expert_parallel: every rank has a part of every expert": (
            not parallel.enable_expert_parallel and not (one_rank and cpu)
        ),
        "tensor_parallel_size 1: one rank has all experts": one_rank and not cpu,
        "enable_eplb: experts move between ranks": parallel.enable_eplb,
        "the passthrough all2all backend: it combines by itself": (
            getattr(parallel, "all2all_backend", None) == "passthrough"
        ),
        "dual-batch overlap: a step's tokens are divided": (
            getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False)
        ),
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "VLLM_BATCH_INVARIANT: what is dropped depends on the batch": envs.VLLM_BATCH_INVARIANT,
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY: routing is not the model's": (
            bool(getattr(envs, "VLLM_MOE_ROUTING_SIMULATION_STRATEGY", ""))
        ),
        "torch.compile on a CPU, which traces the router: expected --enforce-eager": (
            cpu and config.compilation_config.mode != CompilationMode.NONE
        ),
        f"load_format {config.load_config.load_format}: it loads models by itself": (
            str(config.load_config.load_format).lower() in LOADERS
        ),
    }
    return [reason for reason, given in found.items() if given]


def refuse(found: list[str]) -> None:
    """Raise a ``ValueError`` that names what was found."""
    if found:
        raise ValueError(
            f"MACS cannot be used with {'; '.join(found)}. Change that, or leave macs out of "
            "--additional-config; docs/vllm.md has the table"
        )


def of_layer(runner: Any) -> list[str]:
    """What a MoE layer does that MACS cannot honour."""
    experts, config, router = runner.routed_experts, runner.moe_config, runner.router
    kernel = experts.quant_method.moe_kernel
    found = []
    if getattr(experts.quant_method, "is_monolithic", False) or kernel is None:
        return ["a kernel that routes by itself: try --moe-backend triton"]
    name = type(kernel.fused_experts).__name__
    if name not in SKIP_DROPPED:
        found.append(f"experts {name}, not known to skip what is dropped: try --moe-backend triton")
    if name.startswith("Triton") and scales_by_batch(getattr(kernel.fused_experts, "quant_config", None)):
        found.append("one scale for all activations of a step, which rows of dropped tokens would change")
    known = type(router).__name__.removeprefix("Planned")
    if known not in ROUTERS:
        found.append(f"router {known}, expected one of {', '.join(ROUTERS)}")
    if any(getattr(one, "num_fused_shared_experts", 0) for one in (router, runner.expert_map_manager)):
        found.append("shared experts fused with the routed ones")
    if getattr(router, "custom_routing_function", None) is not None:
        found.append("a routing function of its own")
    if getattr(router, "scoring_func", "softmax") not in ("softmax", "sigmoid"):
        found.append(f"scores by {router.scoring_func}, expected softmax or sigmoid")
    if config.num_logical_experts % config.ep_size:
        found.append(f"{config.num_logical_experts} experts on {config.ep_size} ranks: expected a multiple")
    return found


def scales_by_batch(quantised: Any) -> bool:
    """Whether experts find one scale for all their activations in every step."""
    if quantised is None or not quantised.is_quantized:
        return False
    static = quantised.a2_scale is not None
    return not (static or quantised.is_block_quantized or quantised.is_per_act_token)
