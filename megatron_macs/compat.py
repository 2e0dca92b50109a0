"""What differs between versions of Megatron-Core, and which of them the adapter can build on."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

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


MODELS = (
    ("megatron.core.models.gpt", "GPTModel"),
    ("megatron.core.models.hybrid.hybrid_model", "HybridModel"),  # of 0.19; MambaModel is a kind of it
    ("megatron.core.models.mamba", "MambaModel"),
    ("megatron.core.models.multimodal.llava_model", "LLaVAModel"),
    ("megatron.core.models.mimo", "MimoModel"),
)
"""Models that are called with ``input_ids``; those inside another one are not, and know nothing."""


def models() -> list[type]:
    """Those of ``MODELS`` that this Megatron has and what is installed lets it import."""
    found = []
    for module, name in MODELS:
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return found


def field_of(config: Any, name: str) -> Any:
    """A field of a config that not every version has; none where there is none."""
    return getattr(config, name, None)


def graph_field(config: Any) -> str:
    """What says which parts are captured: cuda_graph_scope in 0.16, cuda_graph_modules later."""
    return "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope"


def graph_scopes(config: Any) -> list[str]:
    """The parts that are captured; none named: all."""
    scopes = field_of(config, graph_field(config))
    if scopes is None:
        return []
    return [str(one) for one in (scopes if isinstance(scopes, (list, tuple, set)) else [scopes])]


def slot_of(mlp: Any) -> tuple[Any, Any]:
    """What a layer's ``mlp`` slot builds, and the submodules: a ``ModuleSpec`` up to Megatron 0.16, a
    ``functools.partial`` from 0.17 on; (none, none) where it is neither."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(mlp, ModuleSpec):
        return mlp.module, mlp.submodules
    if isinstance(mlp, functools.partial):
        return mlp.func, mlp.keywords.get("submodules")
    return None, None


def with_module(mlp: Any, module: type, submodules: Any, changes: Mapping[str, Any]) -> Any:
    """The slot ``mlp`` that builds another module, of other submodules, with these arguments beside its own;
    ``pg_collection`` only where the engine hands none over."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(mlp, ModuleSpec):
        params = {**(mlp.params or {}), **{name: one for name, one in changes.items() if one is not None}}
        return ModuleSpec(module=module, params=params, submodules=submodules, metainfo=mlp.metainfo)
    changes = {name: one for name, one in changes.items() if name != "pg_collection"}
    return functools.partial(module, *mlp.args, **{**mlp.keywords, **changes, "submodules": submodules})


def unnamed() -> list[tuple[ModuleType, str, Any]]:
    """(module, name, value) that this Megatron asks for without transformer-engine and does not define: 0.16
    asks whether ``te_general_gemm`` is none, but names it only where transformer-engine is."""
    moe_utils = importlib.import_module(f"{MOE}.moe_utils")
    return [] if hasattr(moe_utils, "te_general_gemm") else [(moe_utils, "te_general_gemm", None)]
