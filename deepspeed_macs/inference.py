"""The ways in: ``init_inference`` and ``initialize`` as DeepSpeed's own, but heeding a ``"macs"`` block."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
from deepspeed.module_inject.auto_ep_comm import DEEPEP_BACKEND
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.utils import groups
from torch import nn

from macs import MACSConfig, Runtime, Topology, attach_modality
from macs.config import read_mapping

from .autoep import MACSAutoEPMoELayer, check_options, folded_size
from .compat import check_transformers
from .config import EXPERT_PARALLEL, MACSBlock, take_block
from .gate import MACSTopKGate, tensor_parallel_size
from .models import expert_parallel_settings

Block = MACSBlock | Mapping[str, Any]

# The engine's own, whatever ``install`` puts in their place later.
_init_inference = deepspeed.init_inference
_initialize = deepspeed.initialize


def init_inference(model: nn.Module, config: Any = None, **kwargs: Any) -> Any:
    """``deepspeed.init_inference``, whose config (or keyword arguments) may hold a ``"macs"`` block.

    Returns DeepSpeed's engine; ``engine.macs`` is the ``macs.Runtime`` of its layers. Without a block,
    or with ``"enabled": false``, this is DeepSpeed's function.
    """
    return _init_inference_with(None, model, config, **kwargs)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """``deepspeed.initialize``, whose config may hold a ``"macs"`` block, at the top or in
    ``expert_parallel``.

    The config is a dictionary, a file, or ``args.deepspeed_config``. Returns DeepSpeed's tuple;
    ``engine.macs`` is the ``macs.Runtime`` of its layers. Without a block, or with ``"enabled":
    false``, this is DeepSpeed's function. MACS acts in ``eval()`` mode only.
    """
    return _initialize_with(None, *args, **kwargs)


def install(macs: Block | str | Path | None = None) -> Callable[[], None]:
    """Put these functions in the place of DeepSpeed's, for scripts that must not change.

    ``macs``: a block, or the path of a JSON or YAML file with one, for scripts whose config has none.
    Returns a function that puts DeepSpeed's own back.
    """
    default = None if macs is None else _read_block(macs)
    deepspeed.init_inference = lambda *args, **kwargs: _init_inference_with(default, *args, **kwargs)
    deepspeed.initialize = lambda *args, **kwargs: _initialize_with(default, *args, **kwargs)

    def uninstall() -> None:
        deepspeed.init_inference, deepspeed.initialize = _init_inference, _initialize

    return uninstall


def add_macs(model: nn.Module, macs: Block) -> Runtime:
    """Give every MoE layer that DeepSpeed built in ``model`` a planner; for engines of one's own making.

    Raises a ``ValueError`` if there is no such layer, if a setting cannot be honoured, or if nothing
    would tell visual tokens from text. The layers are changed in place; weights stay as they are.
    """
    block = MACSBlock.of(macs)
    gates = [module for module in model.modules() if isinstance(module, MOELayer)]
    autoep = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)]
    if not gates and not autoep:
        raise ValueError(
            f"config.macs: {type(model).__name__} has no MoE layer of DeepSpeed's. A model built from "
            "deepspeed.moe.layer.MoE has; the experts of a Hugging Face model become such by "
            'deepspeed_macs.initialize with "expert_parallel": {"enabled": true, "autoep_size": ...}'
        )
    for layer in autoep:
        check_options(layer)
    runtime = Runtime(
        block.settings,
        policy=block.policy,
        profile=block.load_profile(),
        virtual_ranks=block.virtual_ranks,
    )
    if block.modality == "auto":
        _find_modality(model, block)
    _join_groups(model)
    for layer in gates:
        _adopt_gate(layer, runtime, block)
    for layer in autoep:
        _adopt_autoep(layer, runtime)
    return runtime


def _init_inference_with(
    default: MACSBlock | None, model: nn.Module, config: Any = None, **kwargs: Any
) -> Any:
    given = _as_dict(config)
    overlap = [name for name in kwargs if name in given and kwargs[name] != given[name]]
    if overlap:
        return _init_inference(model, config, **kwargs)  # which says what conflicts
    rest, block = take_block({**given, **kwargs})
    block = default if block is None else block
    if block is None or not block.enabled:
        return _init_inference(model, config=rest)
    engine = _init_inference(model, config=rest)
    engine.macs = add_macs(engine.module, block)
    return engine


def _initialize_with(default: MACSBlock | None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    call = inspect.signature(_initialize).bind(*args, **kwargs).arguments
    name, given = _config_of(call)
    if given is None:
        return _initialize(*args, **kwargs)  # which says that there is none
    rest, block = take_block(_as_dict(given))
    block = default if block is None else block
    if name == "args":
        # Copied, because the engine refuses a second config beside the one it finds there.
        call["args"] = copy.copy(call["args"])
        call["args"].deepspeed_config = None
        name = "config"
    if block is not None and block.enabled:
        settings = rest.get(EXPERT_PARALLEL)
        if isinstance(settings, Mapping) and settings.get("enabled"):
            check_transformers()
            config = getattr(call.get("model"), "config", None)
            rest[EXPERT_PARALLEL] = expert_parallel_settings(config, settings)
    call[name] = rest
    returned = _initialize(**call)
    if block is not None and block.enabled:
        returned[0].macs = add_macs(returned[0].module, block)
    return returned


def _config_of(call: Mapping[str, Any]) -> tuple[str, Any]:
    """Which argument of ``deepspeed.initialize`` brings the config, and the config."""
    for name in ("config", "config_params"):
        if call.get(name) is not None:
            return name, call[name]
    return "args", getattr(call.get("args"), "deepspeed_config", None)


def _as_dict(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    return dict(config) if isinstance(config, Mapping) else load_ds_config(config)


def _read_block(macs: Block | str | Path) -> MACSBlock:
    """A block from itself or from a file, which may hold it bare or as ``"macs"``."""
    if not isinstance(macs, (str, Path)):
        return MACSBlock.of(macs)
    values = read_mapping(macs)
    return MACSBlock.of(values.get("macs", values))


def _find_modality(model: nn.Module, block: MACSBlock) -> None:
    try:
        attach_modality(
            model,
            image_token_id=block.image_token_id,
            video_token_id=block.video_token_id,
            audio_token_id=block.audio_token_id,
            padding_token_id=block.padding_token_id,
        )
    except ValueError as error:
        if block.policy != "macs":
            return  # the baselines do not ask which token is which
        raise ValueError(
            f"config.macs: no way to find the visual tokens ({error}). Give image_token_id, or set "
            '"modality": "manual" and call the model within macs.modality(mask)'
        ) from error


def _join_groups(model: nn.Module) -> None:
    """Expert-parallel groups for the layers that have none yet, as under ``init_inference``."""
    if not dist.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, MoE) and module.ep_size > 1 and module.deepspeed_moe.ep_group is None:
            module.set_deepspeed_parallelism()


def _topology(num_experts: int, ranks: int, group: Any) -> Topology:
    own = dist.get_rank(group=group) if ranks > 1 else 0
    return Topology(num_experts, ranks, sources=(own,))


def _adopt_gate(layer: MOELayer, runtime: Runtime, block: MACSBlock) -> None:
    gate, ranks = layer.gate, layer.ep_size

    def check(policy: str, config: MACSConfig) -> None:
        pooled = policy == "rank-balanced" or (policy == "macs" and config.level == "rank")
        if pooled or config.max_load_factor is not None:
            runtime.say_once(
                "MACS: deepspeed.moe.layer.MoE computes as many rows for every expert as the fullest one "
                "has: capacity pooled over a rank (level = rank, rank-balanced, max_load_factor) does not "
                "shorten its steps; use level = expert"
            )
        if groups._get_expert_model_parallel_world_size() == 1:
            _check_same_tokens(policy, config, tensor_parallel_size())

    topology = _topology(ranks * layer.num_local_experts, ranks, layer.ep_group)
    group = layer.ep_group if ranks > 1 else None
    own = runtime.add_layer(lambda: gate.wg.weight, topology, gate.k, group, check)
    MACSTopKGate.adopt(gate, own, sequence_major=block.sequence_major, sampling=block.second_expert_sampling)


def _check_same_tokens(policy: str, config: MACSConfig, ranks: int) -> None:
    """Tensor-parallel ``ranks`` with the same tokens must plan alike, wherever their experts are."""
    if ranks == 1:
        return
    why = f"the expert-parallel group holds {ranks} tensor-parallel ranks with the same tokens"
    if config.scope == "group":
        raise ValueError(
            f"config.scope = 'group' cannot be used with MACS here: {why}, and their quotas could differ; "
            "use 'local'"
        )
    if policy == "expanded-drop":
        raise ValueError(
            f"policy expanded-drop cannot be used here: {why}, and different experts of their own"
        )


def _adopt_autoep(layer: AutoEPMoELayer, runtime: Runtime) -> None:
    def check(policy: str, config: MACSConfig) -> None:
        _check_same_tokens(policy, config, folded_size(layer))
        if policy == "expanded-drop" and layer.comm_backend == DEEPEP_BACKEND and layer.ep_size > 1:
            raise ValueError(
                "policy expanded-drop cannot be used with expert_parallel.comm_backend = 'deepep': its "
                f"buffers hold {layer.top_k} assignments a token; use comm_backend = 'comm'"
            )

    topology = _topology(layer.num_experts, layer.ep_size, layer.ep_group)
    group = layer.ep_group if layer.ep_size > 1 else None
    own = runtime.add_layer(lambda: layer.router.gate.weight, topology, layer.top_k, group, check)
    MACSAutoEPMoELayer.adopt(layer, own)
