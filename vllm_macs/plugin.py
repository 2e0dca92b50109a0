"""The seams of vLLM that MACS is attached to, in each of its processes.

- the config, in the process that is asked to serve: what cannot be honoured is refused there, in one line
- the factory of routers, while the model is built: kernels that route by themselves are kept away
- the loader, once the weights are there: layers are found, and planned from then on
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from macs.adapters import Patch, Runtime

from . import limits
from .compat import check_vllm
from .config import MACSEntry, entry_of, warn_of_misspelling

logger = logging.getLogger("vllm.macs")

runtimes: list[Runtime] = []
"""Of the models of this process."""


def install() -> None:
    """Attach MACS to vLLM's own functions; once a process."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vllm_macs needs vllm: pip install 'macs-moe[vllm]'")
    if _patch.current is None:
        _patch.add("installed")


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    from vllm.engine.arg_utils import EngineArgs

    stock_config = EngineArgs.create_engine_config

    def create_engine_config(self: Any, *given: Any, **named: Any) -> Any:
        config = stock_config(self, *given, **named)
        entry = entry_of(config)
        if entry is None:
            warn_of_misspelling(config)
        else:
            check_vllm()
            limits.refuse(limits.of_config(config))
            replace(entry, metrics_port=None, metrics_address=None).runtime()  # before weights are read
            if entry.metrics_port:
                from .metrics import relay

                relay(entry.metrics_port, entry.metrics_address)
        return config

    yield EngineArgs, "create_engine_config", create_engine_config
    try:
        from vllm.model_executor.layers.fused_moe import layer as factory
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader

        stock_load, stock_router = BaseModelLoader.load_model, factory.create_fused_moe_router
    except (ImportError, AttributeError):
        return  # another version: ``check_vllm`` says so if MACS is asked for

    def load_model(self: Any, vllm_config: Any, model_config: Any, *given: Any, **named: Any) -> nn.Module:
        model: nn.Module = stock_load(self, vllm_config, model_config, *given, **named)
        entry = entry_of(vllm_config)
        if entry is not None:
            attach(model, vllm_config, entry)
        return model

    def create_fused_moe_router(*given: Any, **named: Any) -> Any:
        from vllm.config import get_current_vllm_config

        from .router import reserve

        router = stock_router(*given, **named)
        if entry_of(get_current_vllm_config()) is not None:
            reserve(router)
        return router

    yield BaseModelLoader, "load_model", load_model
    yield factory, "create_fused_moe_router", create_fused_moe_router


_patch: Patch[str] = Patch(_replacements)


def attach(model: nn.Module, vllm_config: Any, entry: MACSEntry) -> Runtime:
    """Plan every MoE layer of a loaded model.

    Raises:
        ValueError: it has no MoE layer, or one that MACS cannot honour.
    """
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.platforms import current_platform

    from . import cpu
    from .layer import PlannedLayer
    from .step import StepModality

    check_vllm()
    limits.refuse(limits.of_config(vllm_config))
    runners = [one for one in model.modules() if isinstance(one, MoERunner)]
    if not runners:
        raise ValueError(f"MACS: found no MoE layer in {type(model).__name__}, expected a MoE model")
    for runner in runners:
        limits.refuse([f"{runner.layer_name}: {reason}" for reason in limits.of_layer(runner)])
        if runner.gate is None:
            raise ValueError(
                f"MACS: {runner.layer_name} of {type(model).__name__} does not hold its gate, whose weights "
                "a profile is matched by; expected a model that hands it over, as Qwen3-MoE and DeepSeek do"
            )
    if current_platform.is_cpu():
        cpu.install()
    first = get_tensor_model_parallel_rank() == 0
    if not first:  # all ranks count the same tokens
        entry = replace(entry, metrics_port=None, metrics_address=None)
    runtime = entry.runtime()
    runtimes.append(runtime)
    for runner in runners:
        layer = PlannedLayer(runner, runtime, adds_estimates=first).macs
        # Estimates and records, before vLLM measures what memory is left for its cache.
        layer.prepare(runner.gate.weight.device)
    StepModality(model, multimodal=bool(vllm_config.model_config.supports_multimodal_inputs))
    logger.info("MACS plans %d MoE layers: %s", len(runners), runtime.config)
    return runtime
