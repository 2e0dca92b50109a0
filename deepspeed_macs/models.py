"""What AutoEP must be told of multimodal Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.module_inject.auto_ep_presets.registry import (
    get_preset,
    preset_name_for_hf_model_type,
)

TEXT_PRESETS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe_text": {"preset_model": "qwen3_moe"},
    "qwen3_5_moe_text": {"preset_model": "qwen3_moe"},
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
    if text is None or text is config:
        return dict(settings)
    kind = getattr(text, "model_type", "")
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
