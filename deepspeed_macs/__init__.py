"""MACS for DeepSpeed: a gate for its MoE layer and a layer for Hugging Face models, by a config block.

engine = deepspeed_macs.init_inference(model, {..., "macs": {"capacity_factor": 1.0, ...}})
engine, *_ = deepspeed_macs.initialize(model=model, config={..., "expert_parallel": {...}, "macs": {...}})

or, for a script that must not change: python -m deepspeed_macs.launch script.py ...
"""

from .compat import check_deepspeed

try:
    import deepspeed  # noqa: F401
except ImportError as error:
    raise ImportError(
        "deepspeed_macs needs deepspeed: pip install 'macs-moe[deepspeed]', or from a clone "
        "pip install -e '.[deepspeed]'"
    ) from error
else:
    check_deepspeed()

from macs.adapters import attach_modality

from .autoep import MACSAutoEPMoELayer
from .config import MACSBlock
from .gate import MACSTopKGate
from .inference import add_macs, init_inference, initialize, install

__all__ = [
    "MACSAutoEPMoELayer",
    "MACSBlock",
    "MACSTopKGate",
    "add_macs",
    "attach_modality",
    "init_inference",
    "initialize",
    "install",
]
