"""What engine adapters build on; they import nothing else of ``macs``."""

from .config import MACSConfig, check_name
from .files import read_mapping
from .policies import Policy, policy_of
from .records.load import LayerReport, summarized
from .runtime.adapter import LayerAdapter, Owner, TokenShard
from .runtime.calls import CallReader, real_keys
from .runtime.hooks import (
    ModalityHook,
    attach_modality,
    check_tells,
    completed,
    innermost,
    named_tokens,
    token_modality_of,
)
from .runtime.launch import CommandParser, ProcessError, first_process, leave, run_script
from .runtime.layer import LayerRuntime, layers_of
from .runtime.modality import ModalityBuffers, Unreadable, current_modality, modality
from .runtime.options import Options, add_flags, options_of
from .runtime.patch import Patch, missing_symbols
from .runtime.runtime import Runtime
from .steps.combine import Plan, loads_of, routing_from_map
from .steps.scoring import candidate_scores
from .tokens import AUDIO, IMAGE, TEXT, VIDEO, Modality
from .topology import Topology

__all__ = [
    "AUDIO",
    "IMAGE",
    "TEXT",
    "VIDEO",
    "CallReader",
    "CommandParser",
    "LayerAdapter",
    "LayerReport",
    "LayerRuntime",
    "MACSConfig",
    "Modality",
    "ModalityBuffers",
    "ModalityHook",
    "Options",
    "Owner",
    "Patch",
    "Plan",
    "Policy",
    "ProcessError",
    "Runtime",
    "TokenShard",
    "Topology",
    "Unreadable",
    "add_flags",
    "attach_modality",
    "candidate_scores",
    "check_name",
    "check_tells",
    "completed",
    "current_modality",
    "first_process",
    "innermost",
    "layers_of",
    "leave",
    "loads_of",
    "missing_symbols",
    "modality",
    "named_tokens",
    "options_of",
    "policy_of",
    "read_mapping",
    "real_keys",
    "routing_from_map",
    "run_script",
    "summarized",
    "token_modality_of",
]
