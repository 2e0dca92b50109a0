"""Which versions of DeepSpeed and transformers the adapter can build on, told by what they have."""

from __future__ import annotations

import importlib
import inspect

from macs.symbols import missing_symbols

NEEDED_DEEPSPEED = "0.19.8"
KNOWN_TRANSFORMERS = "5.17.0"
AUTOEP_LAYER = "deepspeed.module_inject.auto_ep_layer"
SYMBOLS = {
    "deepspeed.moe.sharded_moe": ("top1gating", "top2gating", "topkgating", "TopKGate", "MOELayer"),
    "deepspeed.moe.ep_tp_dispatch": (
        "RoutedAssignmentPayload",
        "assert_tp_payload_consistent",
        "assignment_ordinals_by_expert",
        "partition_assignments",
        "restore_combined",
    ),
    AUTOEP_LAYER: (
        "_AllToAllV",
        "_split_plan_from_expert_counts",
        "apply_scores_before_experts_if_enabled",
        "combine_from_routed",
        "compute_split_plan_from_expert_indices",
        "permute_by_local_expert",
        "unpermute_by_local_expert",
        "AutoEPMoELayer._deepep_route",
        "AutoEPMoELayer._finalize_output",
        "AutoEPMoELayer._forward",
        "AutoEPMoELayer._start_async_split_plan",
        "AutoEPMoELayer._wait_async_split_plan",
    ),
}
"""What the adapter builds on, part of it the engine's own business: better missed here than mid-way."""


def check_deepspeed() -> None:
    """Raise an ``ImportError`` that names what the installed DeepSpeed lacks, and the version needed."""
    import deepspeed

    missing = missing_symbols(SYMBOLS)
    if not missing:
        gate = importlib.import_module("deepspeed.moe.sharded_moe").TopKGate
        if "sparse_routes" not in inspect.signature(gate.forward).parameters:
            missing = ["the sparse_routes argument of deepspeed.moe.sharded_moe.TopKGate.forward"]
    if missing:
        raise ImportError(
            f"deepspeed_macs needs deepspeed>={NEEDED_DEEPSPEED},<0.20; found "
            f"{getattr(deepspeed, '__version__', 'an unknown version')}, which lacks {', '.join(missing)}"
        )


def check_transformers() -> None:
    """Raise an ``ImportError`` if the installed transformers is too new for AutoEP.

    AutoEP looks models' recorded outputs up by class name, in a plain dictionary of transformers.
    """
    try:
        import transformers
        from transformers.utils import output_capturing
    except ImportError:
        return  # AutoEP says itself what it needs
    registry = getattr(output_capturing, "_CAN_RECORD_REGISTRY", None)
    if type(registry) is not dict:
        import deepspeed

        raise ImportError(
            f"transformers {transformers.__version__} is too new for the AutoEP of DeepSpeed "
            f"{deepspeed.__version__}: its registry of recorded outputs is no plain dictionary any more. "
            f"{KNOWN_TRANSFORMERS} is known to work: pip install 'transformers=={KNOWN_TRANSFORMERS}'"
        )
