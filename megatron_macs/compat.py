"""Differences between versions of Megatron-Core, and which versions are supported."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from macs.adapters import missing_symbols

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
"""Symbols that the adapter builds on, some of them private to the engine: checked at import."""

INFERENCE_SYMBOLS = {
    f"{MOE}.router": ("InferenceTopKRouter._compiled_topk_routing",),
    f"{MOE}.token_dispatcher_inference": (
        "NCCLAllGatherDispatcher.dispatch_preprocess",
        "NVLSAllGatherVDispatcher.dispatch_preprocess",
        "mask_routing_padding",
    ),
}
"""Symbols of the inference-optimised layer."""


def check_megatron() -> None:
    """Raise an ``ImportError`` that names the missing symbols and the supported versions."""
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
    """The module for the inference-optimised layer, if this Megatron has a supported one."""
    if missing_symbols(INFERENCE_SYMBOLS):
        return None
    return importlib.import_module("megatron_macs.inference_optimized")


MODELS = (
    ("megatron.core.models.gpt", "GPTModel"),
    ("megatron.core.models.hybrid.hybrid_model", "HybridModel"),  # of 0.19; MambaModel is a kind of it
    ("megatron.core.models.mamba", "MambaModel"),
    ("megatron.core.models.multimodal.llava_model", "LLaVAModel"),
    ("megatron.core.models.mimo", "MimoModel"),
)
"""Models that are called with ``input_ids``; a model inside another one is not."""


def models() -> list[type]:
    """Those of ``MODELS`` that can be imported here."""
    classes = []
    for module, name in MODELS:
        try:
            classes.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return classes


def slot_of(mlp: Any) -> tuple[Any, Any]:
    """Module and submodules of a layer's ``mlp`` slot: a ``ModuleSpec`` up to Megatron 0.16, a
    ``functools.partial`` from 0.17 on; (none, none) if it is neither."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(mlp, ModuleSpec):
        return mlp.module, mlp.submodules
    if isinstance(mlp, functools.partial):
        return mlp.func, mlp.keywords.get("submodules")
    return None, None


def with_module(mlp: Any, module: type, submodules: Any, changes: Mapping[str, Any]) -> Any:
    """The slot ``mlp`` with another module and submodules and further arguments; ``pg_collection`` only where
    the engine passes none."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(mlp, ModuleSpec):
        params = {
            **(mlp.params or {}),
            **{name: value for name, value in changes.items() if value is not None},
        }
        return ModuleSpec(module=module, params=params, submodules=submodules, metainfo=mlp.metainfo)
    changes = {name: value for name, value in changes.items() if name != "pg_collection"}
    return functools.partial(module, *mlp.args, **{**mlp.keywords, **changes, "submodules": submodules})


def unnamed() -> list[tuple[ModuleType, str, Any]]:
    """(module, name, value) of names that this Megatron uses without transformer-engine and does not define:
    0.16 tests whether ``te_general_gemm`` is none, but defines it only with transformer-engine."""
    moe_utils = importlib.import_module(f"{MOE}.moe_utils")
    return [] if hasattr(moe_utils, "te_general_gemm") else [(moe_utils, "te_general_gemm", None)]
