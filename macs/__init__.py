"""MACS: modality-aware capacity scaling for multimodal mixture-of-experts inference.

The algorithm, with no engine in it. ``megatron_macs`` and ``deepspeed_macs`` put it into engines; what they
build on is in ``macs.adapters``.

Letters in shapes, in every module:

    T  valid and padding tokens of one layer on one process     D  hidden size
    B  sequences    S  their tokens; sources where stated       E  experts    k  experts a token
    R  expert-parallel ranks    G = E / R  experts a rank       P  pools (experts or ranks)
"""

from .config import PRESETS, MACSConfig
from .huggingface import attach_plain
from .planner import Planner, router_similarity
from .policies import POLICIES, Policy
from .records.load import METRICS, LayerReport
from .records.profile import Profile
from .records.prometheus import serve_metrics
from .records.recording import Recording
from .records.tuning import Tuning
from .runtime.hooks import attach_modality
from .runtime.modality import modality
from .runtime.runtime import Runtime
from .runtime.state import PlanEvent
from .steps.combine import Plan
from .steps.weighting import WEIGHTINGS
from .tokens import AUDIO, IMAGE, TEXT, VIDEO, Modality, Tokens
from .topology import Topology
from .version import __version__

__all__ = [
    "AUDIO",
    "IMAGE",
    "METRICS",
    "POLICIES",
    "PRESETS",
    "TEXT",
    "VIDEO",
    "WEIGHTINGS",
    "LayerReport",
    "MACSConfig",
    "Modality",
    "Plan",
    "PlanEvent",
    "Planner",
    "Policy",
    "Profile",
    "Recording",
    "Runtime",
    "Tokens",
    "Topology",
    "Tuning",
    "__version__",
    "attach_modality",
    "attach_plain",
    "modality",
    "router_similarity",
    "serve_metrics",
]
