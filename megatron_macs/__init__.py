"""MACS for Megatron-Core: token dispatchers, a router and a layer that plan before they dispatch.

runtime = macs.Runtime(macs.MACSConfig())
spec = megatron_macs.with_macs(get_gpt_layer_local_spec(...), runtime)
model = GPTModel(config, spec, ...)
megatron_macs.attach_modality(model, image_token_id=...)
"""

from .compat import check_megatron

try:
    import megatron.core  # noqa: F401
except ImportError as error:
    raise ImportError("megatron_macs needs megatron-core: pip install 'macs-moe[megatron]'") from error
else:
    check_megatron()

from .arguments import add_macs_args, runtime_from_args, tokens_from_args
from .cpu import cpu_engine
from .dispatcher import (
    MACSAllGatherTokenDispatcher,
    MACSAlltoAllTokenDispatcher,
    MACSFlexTokenDispatcher,
)
from .hooks import attach_modality
from .layer import MACSMoELayer
from .router import MACSTopKRouter
from .spec import with_macs
from .swap import install

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
