"""A pytest plugin that runs Megatron-LM's own unit tests on a CPU, as they are or with MACS in them.

    cd MEGATRON_LM
    python -m torch.distributed.run --nproc-per-node 4 -m pytest -p macs_tools.megatron_on_cpu \\
        tests/unit_tests/transformer/moe/test_token_dispatcher.py [--macs]

``cpu_engine`` stands in for CUDA, gloo for NCCL. With ``--macs`` every ``MoELayer`` and ``TopKRouter``
that a test builds is a MACS one, which plans in ``train()`` mode too, with capacity for everything:
what passes without must pass with it. A test of what MACS refuses, or of a layout that needs more
processes, is skipped with that reason.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, utils
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from packaging.version import Version
from torch import Tensor
from torch.overrides import TorchFunctionMode

from macs import MACSConfig, Runtime
from macs.steps.scoring import full_scores
from macs.planner import Planner
from megatron_macs import MACSMoELayer, MACSTopKRouter, cpu_engine
from megatron_macs.spec import macs_mlp

UNBOUNDED = MACSConfig(capacity_factor=1e6, min_tokens=0)
TIMEOUT = timedelta(seconds=60)
counts: Counter[str] = Counter()
groups: dict[tuple[int, ...] | None, Any] = {}


class _CudaMeansCpu(TorchFunctionMode):
    """``device="cuda"`` is the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **named)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda":
        return torch.device("cpu")
    return value


def _over_gloo(make: Callable[..., Any]) -> Callable[..., Any]:
    """A maker of process groups, over gloo, whose members wait for a lost one no longer than a minute."""

    @functools.wraps(make)
    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return make(*args, **{**kwargs, "backend": "gloo", "timeout": TIMEOUT})

    return run


def _kept(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """``new_group`` that gives the same ranks the same group again: every test makes dozens, and each has
    threads and sockets of its own in gloo."""

    @functools.wraps(new_group)
    def run(ranks: list[int] | None = None, **kwargs: Any) -> Any:
        members = None if ranks is None else tuple(ranks)
        if members not in groups:
            groups[members] = new_group(ranks, **kwargs)
        return groups[members]

    return run


def _only_all(destroy: Callable[..., None]) -> Callable[..., None]:
    """``destroy_process_group`` that leaves a single group to the tests that come, and takes down all."""

    @functools.wraps(destroy)
    def run(group: Any = None) -> None:
        if group is None:
            groups.clear()
            destroy()

    return run


def _gathering_stacked(collective: Callable[..., Any]) -> Callable[..., Any]:
    """``all_gather_into_tensor`` into [N, R, ...] for parts [R, ...], which gloo takes as [N R, ...] only."""

    @functools.wraps(collective)
    def run(output: Tensor, part: Tensor, *args: Any, **kwargs: Any) -> Any:
        return collective(output.view(-1, *part.shape[1:]), part, *args, **kwargs)

    return run


def _or_skip(function: Callable[..., Any], reason: str, *errors: type[Exception]) -> Callable[..., Any]:
    """The function, whose error about ``reason`` skips the test."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except errors as error:
            if reason in str(error):
                pytest.skip(str(error))
            raise

    return run


def _seen_by_tests() -> bool:
    """``torch.cuda.is_available``: yes for a test, which would skip itself; no for everyone else."""
    return str(sys._getframe(1).f_globals.get("__name__")).startswith("tests.")


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """``cpu_engine``, and what the tests themselves ask of CUDA and NCCL besides.

    The CPU's random generator plays the GPU's, so that Megatron's tracker of random states works.
    """
    fork = megatron_random.CudaRNGStatesTracker.fork
    replacements: list[tuple[Any, str, Any]] = [
        (megatron_random.CudaRNGStatesTracker, "fork", fork),
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        (utils, "get_te_version", lambda: Version("0")),  # Megatron 0.16 compares with none at all
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "is_available", _seen_by_tests),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "get_device_capability", lambda device=None: (0, 0)),
        (dist, "init_process_group", _over_gloo(dist.init_process_group)),
        (dist, "new_group", _kept(_over_gloo(dist.new_group))),
        (dist, "all_gather_into_tensor", _gathering_stacked(dist.all_gather_into_tensor)),
        (dist, "destroy_process_group", _only_all(dist.destroy_process_group)),
        (
            parallel_state,
            "initialize_model_parallel",
            _or_skip(parallel_state.initialize_model_parallel, "is not divisible by", RuntimeError),
        ),
    ]
    download: Any = ModuleType("download_unit_tests_dataset")
    download.download_and_extract_asset = lambda assets_dir: None
    modules = {f"tests.test_utils.python_scripts.{download.__name__}": download}
    with cpu_engine(), ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        stack.enter_context(torch._dynamo.config.patch(disable=True))
        stack.enter_context(_CudaMeansCpu())
        yield


class PlanningRouter(MACSTopKRouter):
    """A MACS router that offers its scores in ``train()`` mode too."""

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        routed = super().routing(logits, *args, **kwargs)
        if self.macs is not None:
            self.macs.offer_scores(full_scores(logits.flatten(0, -2), self.score_function))
        return routed


class PlanningLayer(MACSMoELayer):
    """A MACS layer with the arguments of ``MoELayer``."""

    def __init__(self, config: Any, submodules: Any = None, *args: Any, **kwargs: Any) -> None:
        counts["layers"] += 1
        spec = macs_mlp(ModuleSpec(module=MoELayer, submodules=submodules), Runtime(UNBOUNDED), None)
        build = _or_skip(super().__init__, "cannot be used with MACS", ValueError)
        build(config, spec.submodules, *args, **spec.params, **kwargs)


def _instead(planning: type) -> Callable[..., Any]:
    """``__new__`` of a stock class: an object of ``planning`` where a stock or a MACS one is asked for."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(planning if issubclass(planning, cls) else cls)

    return new


def _counting(plan: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plan)
    def run(self: Any, hidden: Tensor, experts: Tensor, *args: Any, **kwargs: Any) -> Any:
        planned = plan(self, hidden, experts, *args, **kwargs)
        counts["plans"] += 1
        counts["assignments"] += int((experts >= 0).sum())
        counts["changed"] += int((planned.experts != experts).sum())
        return planned

    return run


@contextmanager
def macs_for_stock() -> Iterator[None]:
    """MACS layers and routers wherever stock ones are built, and a count of their plans."""
    with (
        mock.patch.object(MoELayer, "__new__", _instead(PlanningLayer)),
        mock.patch.object(TopKRouter, "__new__", _instead(PlanningRouter)),
        mock.patch.object(Planner, "plan", _counting(Planner.plan)),
    ):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--macs", action="store_true", help="put MACS in the place of the stock MoE layer")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    stack = ExitStack()
    stack.enter_context(cuda_on_cpu())
    if early_config.known_args_namespace.macs:
        stack.enter_context(macs_for_stock())
    early_config.add_cleanup(stack.close)


def pytest_runtest_logfinish() -> None:
    """Megatron's test containers tear down in ``__del__``: not in the middle of the next test."""
    gc.collect()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if counts:
        terminalreporter.write_line("MACS: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
