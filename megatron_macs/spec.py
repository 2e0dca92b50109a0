"""Layer specs with MACS in the place of the MoE layer."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from macs.adapters import MACSConfig, Runtime

from .compat import inference_optimized, slot_of, with_module
from .layer import MACSMoELayer
from .router import MACSTopKRouter


def with_macs(spec: Any, runtime: Runtime | MACSConfig, *, pg_collection: Any = None) -> Any:
    """A copy of a layer spec or block spec whose MoE layers are MACS layers.

    spec: what Megatron's ``get_gpt_layer_local_spec``, ``get_gpt_decoder_block_spec`` and the like
    return. runtime: a ``macs.Runtime``, or a ``MACSConfig`` to make one from (it is then found as
    ``model.decoder.layers[i].mlp.macs.runtime``). pg_collection: process groups for the layers, for
    Megatron 0.16, which hands its own to no subclass of ``MoELayer``; none is the global ones.

    Raises if the spec holds no MoE layer, or one that is already somebody's subclass.
    """
    if isinstance(runtime, MACSConfig):
        runtime = Runtime(runtime)
    spec = copy.deepcopy(spec)
    slots = {id(slot): slot for slot in _layer_submodules(spec)}  # layers may share one object
    swapped = 0
    for slot in slots.values():
        mlp = macs_mlp(slot.mlp, runtime, pg_collection)
        if mlp is not None:
            slot.mlp = mlp
            swapped += 1
    if not swapped:
        raise ValueError("with_macs: found no MoE layer in the spec; is num_experts set?")
    return spec


def _layer_submodules(spec: Any) -> list[Any]:
    """The submodules, with their ``mlp`` slot, of a layer spec or of every layer of a block spec."""
    if hasattr(spec, "layer_specs"):  # TransformerBlockSubmodules
        return [slot for layer in spec.layer_specs for slot in _layer_submodules(layer)]
    submodules = getattr(spec, "submodules", None)
    if hasattr(submodules, "layer_specs"):
        return _layer_submodules(submodules)
    if hasattr(submodules, "mlp"):
        return [submodules]
    # A hybrid stack has a spec for each kind of layer.
    kinds = vars(submodules).values() if submodules is not None else ()
    return [slot for kind in kinds if isinstance(kind, ModuleSpec) for slot in _layer_submodules(kind)]


def macs_mlp(mlp: Any, runtime: Runtime, pg_collection: Any) -> Any:
    """The MACS form of a layer's ``mlp`` slot; none if the slot holds no MoE layer."""
    module, submodules = slot_of(mlp)
    if not (isinstance(module, type) and issubclass(module, MoELayer)):
        return None
    if module is not MoELayer:
        raise ValueError(
            f"with_macs: found {module.__name__} in the spec, expected MoELayer; a subclass of it "
            "cannot be replaced without losing what it adds"
        )
    changes = {"runtime": runtime, "pg_collection": pg_collection}
    return with_module(mlp, MACSMoELayer, _macs_submodules(submodules), changes)


def _macs_submodules(submodules: Any) -> Any:
    forms: dict[type, type] = {TopKRouter: MACSTopKRouter}
    inference = inference_optimized()
    if inference is not None:
        forms[inference.InferenceTopKRouter] = inference.MACSInferenceTopKRouter
    router = getattr(submodules, "router", TopKRouter)
    if router not in forms:
        names = " or ".join(form.__name__ for form in forms)
        raise ValueError(f"with_macs: found router {router!r} in the spec, expected {names}")
    submodules = copy.copy(submodules)  # layers may share it
    submodules.router = forms[router]
    return submodules
