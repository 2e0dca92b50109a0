"""Which versions of DeepSpeed and transformers are supported, checked by their symbols."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import nn

from macs.adapters import missing_symbols

NEEDED_DEEPSPEED = "0.19.8"
KNOWN_TRANSFORMERS = ">=5.17,<5.25"
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
"""Symbols that the adapter builds on, some of them private to the engine: checked at import."""


def check_deepspeed() -> None:
    """Raise an ``ImportError`` that names the missing symbols and the version needed."""
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


def support_transformers() -> None:
    """Let AutoEP read and write transformers' registry of recorded outputs as it does in any version.

    AutoEP keys it by class name, which is what it is keyed by. Since 5.23 it is a dictionary that derives the
    name from a model: here it takes either. An ``ImportError`` names a version whose registry is another.
    """
    try:
        import transformers
        from transformers.utils import output_capturing
    except ImportError:
        return  # AutoEP says itself what it needs
    registry = getattr(output_capturing, "_CAN_RECORD_REGISTRY", None)
    if type(registry) is dict or getattr(type(registry), "by_name", False):
        return
    methods = {"get": ["self", "model"], "__setitem__": ["self", "model", "can_record_outputs"]}
    if not isinstance(registry, dict) or any(
        list(inspect.signature(getattr(type(registry), name)).parameters) != taken
        for name, taken in methods.items()
    ):
        raise ImportError(
            f"transformers {transformers.__version__} has a registry of recorded outputs that AutoEP "
            f"cannot use; {KNOWN_TRANSFORMERS} are known to work: "
            f"pip install 'transformers{KNOWN_TRANSFORMERS}'"
        )
    registry.__class__ = _by_name(type(registry))


def _by_name(kind: type) -> type:
    """That dictionary, keyed by a model or by the name of its class."""

    class Registry(kind):  # type: ignore[misc]
        by_name = True

        def __setitem__(self, key: Any, value: Any) -> None:
            dict.__setitem__(self, key, value) if isinstance(key, str) else super().__setitem__(key, value)

        def get(self, key: Any, *default: Any) -> Any:
            return dict.get(self, key, *default) if isinstance(key, str) else super().get(key)

    return Registry


def record_router_logits(model: nn.Module) -> None:
    """Let ``output_router_logits`` find AutoEP's routers in a multimodal model.

    AutoEP does so for the models that it knows by name, and their multimodal forms are not among them:
    transformers would look for routers of a class that is there no more, and find none.
    """
    try:
        from deepspeed.module_inject import auto_ep
        from deepspeed.module_inject.auto_ep_presets import base
        from transformers.utils.output_capturing import OutputRecorder
    except ImportError:
        return  # an older transformers, whose models return their logits themselves

    def lost(module: nn.Module) -> bool:
        recorded = getattr(module, "_can_record_outputs", None)
        recorder = recorded.get("router_logits") if isinstance(recorded, dict) else None
        if recorder is None:
            return False
        wanted = recorder.target_class if isinstance(recorder, OutputRecorder) else recorder
        replaced = any(type(one).__name__ == "AutoEPMoELayer" for one in module.modules())
        # What AutoEP itself has directed to its gates needs nothing.
        there = isinstance(wanted, type) and any(isinstance(one, wanted) for one in module.modules())
        return replaced and not there

    if any(lost(module) for module in model.modules()):
        base._retarget_transformers_output_recorders_for_modules(
            model=model,
            display_name=type(model).__name__,
            recorder_key=f"macs:{type(model).__qualname__}",
            retargeted_keys=set(),
            remove_output_capture_hooks=auto_ep._remove_transformers_output_capture_hooks,
            module_matches=lost,
            make_output_recorder=lambda recorder: recorder(nn.Linear, index=0, layer_name="router.gate"),
        )
