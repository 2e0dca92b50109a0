"""Which versions of Megatron-Core the adapter can build on, told by what they have."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

from macs.serving.symbols import missing_symbols

KNOWN = "0.16.1 and 0.19.2"
INFERENCE_OPTIMIZED_SINCE = "0.19"
MOE = "megatron.core.transformer.moe"
SYMBOLS = {
    "megatron.core.transformer.spec_utils": ("ModuleSpec",),
    "megatron.core.transformer.transformer_layer": ("TransformerLayer",),
    "megatron.core.utils": ("get_pg_rank", "get_pg_size"),
    f"{MOE}.moe_layer": ("MoELayer",),
    f"{MOE}.moe_utils": ("get_default_pg_collection",),
    f"{MOE}.router": ("TopKRouter.gating", "TopKRouter.routing"),
    f"{MOE}.token_dispatcher": (
        "MoETokenDispatcher",
        "MoEAllGatherTokenDispatcher.dispatch_preprocess",
        "MoEAlltoAllTokenDispatcher.dispatch_preprocess",
        "MoEAlltoAllTokenDispatcher.preprocess",
        "MoEAlltoAllTokenDispatcher._maybe_update_cuda_sync_point",
        "MoEFlexTokenDispatcher.dispatch_preprocess",
        "MoEFlexTokenDispatcher._initialize_metadata",
    ),
}
"""What the adapter builds on, part of it the engine's own business: better missed here than mid-way."""

INFERENCE_SYMBOLS = {
    f"{MOE}.router": ("InferenceTopKRouter._compiled_topk_routing",),
    f"{MOE}.token_dispatcher_inference": (
        "NCCLAllGatherDispatcher.dispatch_preprocess",
        "NVLSAllGatherVDispatcher.dispatch_preprocess",
        "mask_routing_padding",
    ),
}
"""What its inference-optimised layer is made of, where there is one."""


def check_megatron() -> None:
    """Raise an ``ImportError`` that names what the installed Megatron-Core lacks, and what is known."""
    import megatron.core

    missing = missing_symbols(SYMBOLS)
    if not missing:
        dispatch = importlib.import_module(f"{MOE}.token_dispatcher").MoEAlltoAllTokenDispatcher
        taken = list(inspect.signature(dispatch.dispatch_preprocess).parameters)
        if taken != ["self", "hidden_states", "routing_map", "probs"]:
            missing = [f"{MOE}.token_dispatcher dispatch_preprocess(self, hidden_states, routing_map, probs)"]
    if missing:
        raise ImportError(
            f"megatron_macs knows megatron-core {KNOWN}; found "
            f"{getattr(megatron.core, '__version__', 'an unknown version')}, which lacks {', '.join(missing)}"
        )


def inference_optimized() -> ModuleType | None:
    """Our parts of the inference-optimised layer, where this Megatron has one we know."""
    if missing_symbols(INFERENCE_SYMBOLS):
        return None
    return importlib.import_module("megatron_macs.inference_optimized")
