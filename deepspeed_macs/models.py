"""What AutoEP must be told of multimodal Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.module_inject.auto_ep_presets.registry import (
    PRESET_MODELS,
    get_preset,
    preset_name_for_hf_model_type,
)

TEXT_PRESETS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe_text": {"preset_model": "qwen3_moe"},
    "glm4v_moe_text": {"preset_model": "deepseek_v3"},
    "glm4_moe": {"preset_model": "deepseek_v3"},
    "qwen3_5_moe_text": {"preset_model": "qwen3_moe"},
    "qwen3_omni_moe_text": {"preset_model": "qwen3_moe"},
    "minimax_m3_vl_text": {
        "preset_model": "deepseek_v3",
        "expert_activation": "swiglu_oai",
        "route_norm": True,
    },
}
"""Text models whose multimodal form AutoEP does not know or refuses, and settings that describe their
MoE block to it: a preset with a block of the same parts, and where it differs."""

ANY_LAYERS = r"(?:.*\.)?layers\.\d+\.mlp"
"""MoE blocks wherever the text model sits; modules without experts are passed over by AutoEP."""


def expert_parallel_settings(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``expert_parallel`` block, completed for a model that wraps a text MoE.

    AutoEP reads ``model.config``; a multimodal model has its experts in the text config within. What
    the user set stays; a model AutoEP can read by itself is left to it.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(text, "model_type", "")
    if text is None or (text is config and kind not in TEXT_PRESETS):
        return dict(settings)
    known = TEXT_PRESETS.get(kind, {"preset_model": preset_name_for_hf_model_type(kind)})
    name = settings.get("preset_model", known["preset_model"])
    if name is None:
        return dict(settings)
    if name == "deepseek_v2" and getattr(text, "topk_method", None) == "group_limited_greedy":
        raise ValueError(
            f"expert_parallel: AutoEP cannot be told the group scores of a {kind} inside a "
            f"{getattr(config, 'model_type', 'multimodal')} model (topk_method = 'group_limited_greedy')"
        )
    normalized = None if name == "deepseek_v2" else getattr(text, "norm_topk_prob", None)
    found = {
        **known,
        "moe_layer_pattern": ANY_LAYERS,
        "top_k": getattr(text, get_preset(name).top_k_attr, None),
        "route_norm": known.get("route_norm", normalized),
        "score_func": getattr(text, "scoring_func", None),
        "num_expert_groups": getattr(text, "n_group", None),
        "num_limited_groups": getattr(text, "topk_group", None),
        "routed_scaling_factor": getattr(text, "routed_scaling_factor", None),
    }
    return {**{name: value for name, value in found.items() if value is not None}, **settings}


CUSTOM_KEYS = (
    "moe_layer_pattern, router_pattern, expert_pattern, expert_w1, expert_w2, expert_w3, num_experts_attr, "
    "top_k_attr, score_func, route_norm"
)


def why_no_layers(model: Any) -> str:
    """What to say where AutoEP is enabled and has replaced no block of a model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(text, "model_type", None)
    if hasattr(model, "thinker"):
        return (
            f"config.expert_parallel: found {type(model).__name__}, a model of several models, expected the "
            "one that answers: deepspeed_macs.initialize(model=model.thinker, ...)"
        )
    return (
        f"config.expert_parallel: AutoEP is enabled and knows no MoE block of {type(model).__name__} "
        f"(model_type {kind!r}). If its block is made as one of {', '.join(sorted(PRESET_MODELS))}, name "
        "that one as preset_model; if it has a router with a weight [E, D] and experts of the usual form "
        f"under other names, give {CUSTOM_KEYS}. AutoEP cannot describe blocks with biased experts "
        "(gpt-oss), a router that scales its input (Llama 4), or a router for each modality (Ernie-4.5-VL)"
    )
