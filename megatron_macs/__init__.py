"""MACS for Megatron-Core: token dispatchers, a router and a layer that plan before they dispatch.

runtime = macs.Runtime(macs.MACSConfig())
spec = megatron_macs.with_macs(get_gpt_layer_local_spec(...), runtime)
model = GPTModel(config, spec, ...)
megatron_macs.attach_modality(model, image_token_id=...)

Megatron is imported with the first name that is used, so that command lines are checked before it.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

try:
    _found = importlib.util.find_spec("megatron.core")
except ImportError:
    _found = None
if _found is None:
    raise ImportError(
        "megatron_macs needs megatron-core: pip install 'macs-moe[megatron]', or from a clone "
        "pip install -e '.[megatron]'"
    )

if TYPE_CHECKING:
    from .cpu import cpu_engine
    from .dispatcher import (
        MACSAllGatherTokenDispatcher,
        MACSAlltoAllTokenDispatcher,
        MACSFlexTokenDispatcher,
    )
    from .hooks import attach_modality
    from .installation import install
    from .layer import MACSMoELayer
    from .options import add_macs_args, runtime_from_args, tokens_from_args
    from .router import MACSTopKRouter
    from .spec import with_macs

__all__ = [
    "MACSAllGatherTokenDispatcher",
    "MACSAlltoAllTokenDispatcher",
    "MACSFlexTokenDispatcher",
    "MACSMoELayer",
    "MACSTopKRouter",
    "add_macs_args",
    "attach_modality",
    "cpu_engine",
    "install",
    "runtime_from_args",
    "tokens_from_args",
    "with_macs",
]

_HOMES = {
    "add_macs_args": "options",
    "runtime_from_args": "options",
    "tokens_from_args": "options",
    "cpu_engine": "cpu",
    "MACSAllGatherTokenDispatcher": "dispatcher",
    "MACSAlltoAllTokenDispatcher": "dispatcher",
    "MACSFlexTokenDispatcher": "dispatcher",
    "attach_modality": "hooks",
    "MACSMoELayer": "layer",
    "MACSTopKRouter": "router",
    "with_macs": "spec",
    "install": "installation",
}


def __getattr__(name: str) -> Any:
    """A name of ``__all__``; its module imports Megatron, after its version was checked."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] != "options":
        importlib.import_module(".compat", __name__).check_megatron()
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
