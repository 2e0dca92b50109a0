"""Which versions of vLLM are supported, checked by their symbols."""

from __future__ import annotations

from macs.adapters import missing_symbols

KNOWN = ">=0.32,<0.34"
SYMBOLS = {
    "vllm.model_executor.layers.fused_moe.layer": ("create_fused_moe_router",),
    "vllm.model_executor.layers.fused_moe.router.base_router": ("BaseRouter._compute_routing",),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner": ("MoERunner._forward_impl",),
    "vllm.model_executor.model_loader.base_loader": ("BaseModelLoader.load_model",),
    "vllm.forward_context": ("get_forward_context", "is_forward_context_available"),
    "vllm.engine.arg_utils": ("EngineArgs.create_engine_config",),
}
"""Symbols that the plugin builds on, most of them private to vLLM."""


def check_vllm() -> None:
    """Raise an ``ImportError`` that names the missing symbols and the versions that have them."""
    import vllm

    missing = missing_symbols(SYMBOLS)
    if missing:
        raise ImportError(
            f"vllm_macs needs vllm{KNOWN}; found {getattr(vllm, '__version__', 'an unknown version')}, which "
            f"lacks {', '.join(missing)}"
        )
