"""``init_inference`` and ``initialize`` as DeepSpeed's own, with a ``"macs"`` block in the config."""

from __future__ import annotations

import atexit
import copy
import functools
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from macs.adapters import (
    CallReader,
    ModalityHook,
    Patch,
    Runtime,
    attach_modality,
    read_mapping,
)

from .autoep import MACSAutoEPMoELayer, check_options
from .compat import record_router_logits, support_transformers
from .config import EXPERT_PARALLEL, MACSBlock, block_of, take_block
from .gate import MACSTopKGate
from .layers import AutoEPAdapter, GateAdapter, LayerDone
from .models import expert_parallel_settings, why_no_layers

Block = MACSBlock | Mapping[str, Any]
logger = logging.getLogger(__name__)

# The engine's own, which ``install`` may replace later.
_init_inference = deepspeed.init_inference
_initialize = deepspeed.initialize


def init_inference(model: nn.Module, config: Any = None, **kwargs: Any) -> Any:
    """``deepspeed.init_inference``, whose config (or keyword arguments) may hold a ``"macs"`` block.

    Returns DeepSpeed's engine, in ``eval()`` mode; ``engine.macs`` is the ``macs.Runtime`` of its
    layers. Without a block, or with ``"enabled": false``, this is DeepSpeed's function.
    """
    return _init_inference_with(_init_inference, None, model, config, **kwargs)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """``deepspeed.initialize``, whose config may hold a ``"macs"`` block, at the top or in
    ``expert_parallel``.

    The config is a dictionary, a file, or ``args.deepspeed_config``. Returns DeepSpeed's tuple;
    ``engine.macs`` is the ``macs.Runtime`` of its layers. Without a block, or with ``"enabled":
    false``, this is DeepSpeed's function. MACS acts in ``eval()`` mode only: call ``engine.eval()``.
    """
    return _initialize_with(_initialize, None, *args, **kwargs)


def install(macs: Block | str | Path | None = None) -> Callable[[], None]:
    """Put these functions in the place of DeepSpeed's, for scripts that must not change.

    ``macs``: a block, or the path of a JSON or YAML file with one, for the models with MoE layers of
    scripts whose config has none. Returns a function that uninstalls it, in any order among others, of
    which the last one acts. A script that did ``from deepspeed import initialize`` before this is not
    reached.
    """
    if isinstance(macs, (str, Path)):
        values = read_mapping(macs)
        block: MACSBlock | None = block_of(values.get("macs", values))
    else:
        block = None if macs is None else block_of(macs)
    return _installed.add((block,))


def _replacements() -> list[tuple[Any, str, Any]]:
    """DeepSpeed's functions, ours around them."""
    before = deepspeed.init_inference, deepspeed.initialize

    @functools.wraps(before[0])
    def init_inference(*args: Any, **kwargs: Any) -> Any:
        if _installed.current is None:  # kept by a caller after uninstalling
            return before[0](*args, **kwargs)
        return _init_inference_with(before[0], *_installed.current, *args, **kwargs)

    @functools.wraps(before[1])
    def initialize(*args: Any, **kwargs: Any) -> Any:
        if _installed.current is None:
            return before[1](*args, **kwargs)
        return _initialize_with(before[1], *_installed.current, *args, **kwargs)

    return [(deepspeed, "init_inference", init_inference), (deepspeed, "initialize", initialize)]


_installed: Patch[tuple[MACSBlock | None]] = Patch(_replacements)
"""The value: the block for configs without a ``macs`` entry."""


def add_macs(model: nn.Module, macs: Block, *, tensor_parallel_size: int = 1) -> Runtime:
    """Give every MoE layer that DeepSpeed built in ``model`` a planner; for engines of one's own making.

    ``tensor_parallel_size``: ranks that get the same tokens, where DeepSpeed's ``groups.mpu`` does not
    say so. Layers are changed in place; weights stay as they are. Raises a ``ValueError``, with every
    layer as it was, if there is no such layer, if one is no plain layer of DeepSpeed's, if a setting
    cannot be honoured, or if nothing would tell visual tokens from text.
    """
    block = block_of(macs)
    gates, autoep = _moe_layers(model)
    if not gates and not autoep:
        raise ValueError(
            f"config.macs: {type(model).__name__} has no MoE layer of DeepSpeed's. A model built from "
            "deepspeed.moe.layer.MoE has; the experts of a Hugging Face model become such by "
            'deepspeed_macs.initialize with "expert_parallel": {"enabled": true, "autoep_size": ...}'
        )
    for gate in gates:
        _check_type(gate.gate, TopKGate)
    for layer in autoep:
        _check_type(layer, AutoEPMoELayer)
        check_options(layer)
    if autoep:
        record_router_logits(model)
    _join_groups(model)
    # DeepSpeed's own MoE layer pads every expert to the fullest one: each expert needs a bound.
    runtime = block.runtime("padded" if gates else "macs")
    _put_in(model, block, runtime, gates, autoep, tensor_parallel_size)
    if block.record is not None or block.calibrate is not None:
        # The layers are kept until then: what they recorded is known with them.
        atexit.register(lambda model: block.finish(runtime), model)
    return runtime


def _put_in(
    model: nn.Module,
    block: MACSBlock,
    runtime: Runtime,
    gates: list[Any],
    autoep: list[Any],
    tensor_parallel_size: int,
) -> None:
    """Add the layers to the runtime, and change them, all or none."""
    blind = _why_blind(model) if block.modality == "auto" and not block.names_modality else None
    same_tokens = max(tensor_parallel_size, bwc_tensor_model_parallel_world_size(groups.mpu))
    own = [runtime.add_layer(GateAdapter(layer, same_tokens, blind)) for layer in gates]
    own += [runtime.add_layer(AutoEPAdapter(layer, same_tokens, blind)) for layer in autoep]
    if block.modality == "auto" and blind is None:
        attach_modality(model, **block.token_ids)
    else:  # padding is read from the calls all the same
        text_only = blind is not None or block.modality == "text"
        ModalityHook(model, CallReader(padding_id=block.padding_token_id, text_only=text_only))
    for layer, mine in zip([*gates, *autoep], own, strict=True):
        if isinstance(layer, MOELayer):
            layer.register_forward_hook(LayerDone(mine))
            options = {"sequence_major": block.sequence_major, "sampling": block.second_expert_sampling}
            MACSTopKGate.adopt(layer.gate, mine, **options)
        else:
            layer.__class__, layer.macs = MACSAutoEPMoELayer, mine


def _init_inference_with(
    stock: Callable[..., Any],
    default: MACSBlock | None,
    model: nn.Module,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    given = config
    if isinstance(config, str):
        with open(config) as file:
            given = json.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    if not (given is None or isinstance(given, dict)):
        return stock(model, config, **kwargs)  # which says what it expects
    rest, block = take_block(given or {})
    more, named = take_block(kwargs)
    if block is not None and named is not None:
        raise ValueError("config.macs: found both in the config and as an argument, expected one of them")
    block = named if block is None else block
    if block is None and default is None:
        return stock(model, config, **kwargs)
    engine = stock(model, config=rest, **more)
    runtime = _add_if_wanted(engine.module, block, default, engine._config.tensor_parallel.tp_size)
    if runtime is not None:
        engine.eval()
        engine.macs = runtime
    return engine


def _initialize_with(
    stock: Callable[..., Any], default: MACSBlock | None, *args: Any, **kwargs: Any
) -> tuple[Any, ...]:
    call = inspect.signature(_initialize).bind(*args, **kwargs).arguments
    name, given = _config_of(call)
    if given is None:
        return stock(*args, **kwargs)  # which says that there is none
    rest, block = take_block(given if isinstance(given, Mapping) else load_ds_config(given))
    if block is None and default is None:
        return stock(*args, **kwargs)
    if name == "args":
        # Copied, because the engine refuses a second config beside the one it finds there.
        call["args"] = copy.copy(call["args"])
        call["args"].deepspeed_config = None
        name = "config"
    settings = rest.get(EXPERT_PARALLEL)
    chosen = default if block is None else block
    assert chosen is not None
    if chosen.enabled and isinstance(settings, Mapping) and settings.get("enabled"):
        support_transformers()
        config = getattr(call.get("model"), "config", None)
        rest[EXPERT_PARALLEL] = expert_parallel_settings(config, settings)
    call[name] = rest
    returned = stock(**call)
    engine = returned[0]
    wanted = block is not None and block.enabled and isinstance(settings, Mapping) and settings.get("enabled")
    if wanted and not any(_moe_layers(engine.module)):
        raise ValueError(why_no_layers(engine.module))
    runtime = _add_if_wanted(engine.module, block, default, engine.autotp_size())
    if runtime is not None:
        engine.macs = runtime
        engine.load_checkpoint = _refreshing(engine.load_checkpoint, runtime)
    return returned


def _refreshing(load: Callable[..., Any], runtime: Runtime) -> Callable[..., Any]:
    """A function that loads weights, after which those of the routers are read anew."""

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        runtime.refresh()
        return loaded

    return load_checkpoint


def _add_if_wanted(
    model: nn.Module, block: MACSBlock | None, default: MACSBlock | None, tensor_parallel_size: int
) -> Runtime | None:
    """``add_macs`` by the config's own block or, where a model has MoE layers, by the default one."""
    if block is None and not any(_moe_layers(model)):
        logger.warning("MACS: %s has no MoE layer and is left as it is", type(model).__name__)
        return None
    chosen = default if block is None else block
    if chosen is None or not chosen.enabled:
        return None
    return add_macs(model, chosen, tensor_parallel_size=max(1, tensor_parallel_size))


def _moe_layers(model: nn.Module) -> tuple[list[MOELayer], list[AutoEPMoELayer]]:
    modules = list(model.modules())
    return (
        [module for module in modules if isinstance(module, MOELayer)],
        [module for module in modules if isinstance(module, AutoEPMoELayer)],
    )


def _check_type(module: nn.Module, expected: type) -> None:
    if type(module) is not expected:
        raise ValueError(
            f"config.macs: found {type(module).__name__} in the model, expected {expected.__name__}; a "
            "subclass cannot be replaced without losing what it adds, and MACS is added once"
        )


def _config_of(call: Mapping[str, Any]) -> tuple[str, Any]:
    """Which argument of ``deepspeed.initialize`` brings the config, and the config."""
    for name in ("config", "config_params"):
        if call.get(name) is not None:
            return name, call[name]
    return "args", getattr(call.get("args"), "deepspeed_config", None)


def _why_blind(model: nn.Module) -> str | None:
    """Why visual tokens cannot be told from text in this model's calls; none if they can."""
    try:
        attach_modality(model).remove()
    except ValueError as error:
        return str(error)
    return None


def _join_groups(model: nn.Module) -> None:
    """Expert-parallel groups for the layers that have none yet, as under ``init_inference``."""
    if not dist.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, MoE) and module.ep_size > 1 and module.deepspeed_moe.ep_group is None:
            module.set_deepspeed_parallelism()
