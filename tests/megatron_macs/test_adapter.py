"""The parts of the Megatron adapter that need no second process."""

import functools
import types

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from support.cases import busy
from torch import nn

from macs import Runtime
from megatron_macs import MACSMoELayer, MACSTopKRouter, cpu_engine, with_macs

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU shim refuses to run where CUDA is")


def moe_of(spec):
    mlp = spec.submodules.mlp
    if isinstance(mlp, ModuleSpec):
        return mlp.module, mlp.submodules
    return mlp.func, mlp.keywords["submodules"]


def test_the_spec_is_copied_not_changed():
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
    before = moe_of(spec)[1].router
    swapped = with_macs(spec, Runtime())
    assert moe_of(spec)[0] is MoELayer and moe_of(spec)[1].router is before
    assert moe_of(swapped)[0] is MACSMoELayer and moe_of(swapped)[1].router is MACSTopKRouter


def test_a_config_will_do():
    mlp = with_macs(get_gpt_layer_local_spec(num_experts=4), busy(capacity_factor=1.5)).submodules.mlp
    runtime = (mlp.params if isinstance(mlp, ModuleSpec) else mlp.keywords)["runtime"]
    assert runtime.config.capacity_factor == 1.5


def test_specs_without_experts_or_with_strangers_are_refused():
    with pytest.raises(ValueError, match="found no MoE layer in the spec"):
        with_macs(get_gpt_layer_local_spec(), Runtime())
    once = with_macs(get_gpt_layer_local_spec(num_experts=4), Runtime())
    with pytest.raises(ValueError, match="found MACSMoELayer in the spec, expected MoELayer"):
        with_macs(once, Runtime())
    strange = get_gpt_layer_local_spec(num_experts=4)
    moe_of(strange)[1].router = nn.Linear
    with pytest.raises(ValueError, match="found router"):
        with_macs(strange, Runtime())


def test_block_specs_are_swapped_layer_by_layer():
    dense, moe = get_gpt_layer_local_spec(), get_gpt_layer_local_spec(num_experts=4)
    block = types.SimpleNamespace(layer_specs=[dense, moe, moe])
    swapped = with_macs(block, Runtime())
    kinds = [moe_of(layer)[0] for layer in swapped.layer_specs[1:]]
    assert kinds == [MACSMoELayer] * 2
    mlp = swapped.layer_specs[0].submodules.mlp
    assert (mlp.func if isinstance(mlp, functools.partial) else mlp.module) is not MACSMoELayer


def symbols():
    """Every attribute of what the shim touches, by identity."""
    from megatron.core.inference import communication_utils
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_layer, moe_utils, router, token_dispatcher
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    owners = (
        torch,
        torch.cuda,
        torch.distributed,
        torch.Tensor,
        nn.Module,
        communication_utils,
        CudaRNGStatesTracker,
        moe_utils,
        moe_layer,
        router,
        token_dispatcher,
        token_dispatcher.MoEAlltoAllTokenDispatcher,
        SharedExpertMLP,
        moe_layer.MoELayer,
        router.TopKRouter,
    )
    return {(str(owner), name): id(value) for owner in owners for name, value in vars(owner).items()}


@on_cpu
def test_the_shim_restores_every_symbol():
    with cpu_engine():  # imports on first use may add symbols
        pass
    before = symbols()
    with cpu_engine():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert symbols() != before
    assert symbols() == before
    with pytest.raises(ZeroDivisionError), cpu_engine():
        _ = 1 / 0
    assert symbols() == before


@on_cpu
def test_the_shim_leaves_no_stream_behind():
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    kept = MoEAlltoAllTokenDispatcher.cuda_dtoh_stream
    with cpu_engine():
        MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = torch.cuda.Stream()
    assert MoEAlltoAllTokenDispatcher.cuda_dtoh_stream is kept


def test_the_shim_refuses_to_hide_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is available"), cpu_engine():
        pass


def test_importing_the_adapter_changes_nothing_in_megatron(program):
    code = (
        "import warnings; warnings.filterwarnings('ignore')\n"
        "from megatron.core.transformer.moe import moe_layer, moe_utils, router, token_dispatcher\n"
        "import torch\n"
        "owners = [torch, torch.cuda, torch.distributed, moe_layer, moe_utils, router, token_dispatcher,\n"
        "          moe_layer.MoELayer, router.TopKRouter, token_dispatcher.MoEAlltoAllTokenDispatcher]\n"
        "look = lambda: [{k: id(v) for k, v in vars(o).items()} for o in owners]\n"
        "before = look()\n"
        "import megatron_macs\n"
        "after = look()\n"
        "changed = [(str(o), k) for o, b, a in zip(owners, before, after) for k in b if a.get(k) != b[k]]\n"
        "assert not changed, changed\n"
    )
    program("-c", code)
