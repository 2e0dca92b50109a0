"""MACS: modality-aware capacity scaling for multimodal mixture-of-experts inference.

The algorithm, with no engine in it. ``megatron_macs`` and ``deepspeed_macs`` put it into engines.

Letters in shapes, here and in every module:

    T  valid and padding tokens of one layer on one process     D  hidden size
    B  sequences    S  their tokens; sources where said so      E  experts    k  experts a token
    R  expert-parallel ranks    G = E / R  experts a rank       P  pools (experts or ranks)
"""

from .config import PRESETS, MACSConfig
from .plan import Plan, PlanStatistics
from .planner import STEPS, Planner, router_similarity, watching_steps
from .policies import POLICIES, Policy, build_policy, policy_of
from .records.metrics import METRICS, LayerRecorder, LayerReport, Metric, summarized
from .records.profile import Calibration, Profile, router_fingerprint
from .records.traffic import Recording, RoutingRecorder
from .records.tuning import Tuning
from .serving.adapter import Limits, Seam, Share, place_among
from .serving.context import current_modality, modality
from .serving.exporter import MetricsServer, serve_metrics
from .serving.hooks import TOKEN_IDS, ModalityHook, attach_modality, token_ids_in
from .serving.launch import CommandParser, run_script
from .serving.layer import LayerRuntime
from .serving.logs import log_as
from .serving.plain import attach_plain
from .serving.runtime import Runtime
from .steps.capacity import loads_of
from .steps.combine import choice_in
from .steps.kernels.dispatch import has_triton, kernels
from .steps.scoring import full_scores, in_service, within_groups, without_outcasts
from .steps.weighting import WEIGHTINGS, Rule
from .tokens import AUDIO, IMAGE, TEXT, VIDEO, Modality, Tokens
from .topology import Topology
from .version import __version__

__all__ = [
    "AUDIO",
    "IMAGE",
    "METRICS",
    "POLICIES",
    "PRESETS",
    "STEPS",
    "TEXT",
    "TOKEN_IDS",
    "VIDEO",
    "WEIGHTINGS",
    "Calibration",
    "CommandParser",
    "LayerRecorder",
    "LayerReport",
    "LayerRuntime",
    "Limits",
    "MACSConfig",
    "Metric",
    "MetricsServer",
    "Modality",
    "ModalityHook",
    "Plan",
    "PlanStatistics",
    "Planner",
    "Policy",
    "Profile",
    "Recording",
    "RoutingRecorder",
    "Rule",
    "Runtime",
    "Seam",
    "Share",
    "Tokens",
    "Topology",
    "Tuning",
    "__version__",
    "attach_modality",
    "attach_plain",
    "build_policy",
    "choice_in",
    "current_modality",
    "full_scores",
    "has_triton",
    "in_service",
    "kernels",
    "loads_of",
    "log_as",
    "modality",
    "place_among",
    "policy_of",
    "router_fingerprint",
    "router_similarity",
    "run_script",
    "serve_metrics",
    "summarized",
    "token_ids_in",
    "watching_steps",
    "within_groups",
    "without_outcasts",
]
