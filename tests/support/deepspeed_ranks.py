"""DeepSpeed's MoE layers and AutoEP models on gloo ranks, stock or with MACS."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

import deepspeed_macs
from deepspeed_macs.compat import support_transformers
from deepspeed_macs.models import expert_parallel_settings

from . import hf_models
from .cases import BUSY
from .ranks import on_ranks

HIDDEN, FFN = 16, 24
IMAGE_TOKEN = 5
DROPLESS = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


@contextmanager
def deepspeed_on() -> Iterator[None]:
    """DeepSpeed on the process group, in inference mode; its groups are forgotten afterwards."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as a launcher would
    deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    try:
        with torch.inference_mode():
            yield
    finally:
        del os.environ["LOCAL_RANK"]
        forget_groups()


def on_deepspeed(world: int | Callable[..., int] | None = None, **options: Any) -> Callable[..., Any]:
    """``on_ranks`` with DeepSpeed; by default on as many ranks as the test's parameter ``world`` says."""

    def decorate(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)
        def within(**arguments: Any) -> None:
            with deepspeed_on():
                body(**arguments)

        return on_ranks(world or (lambda world, **_: world), **options)(within)

    return decorate


def forget_groups() -> None:
    """DeepSpeed keeps its process groups in module globals; the next job has other ones."""
    for name, value in list(vars(groups).items()):
        if name.startswith("_") and "GROUP" in name:
            if isinstance(value, dict):
                value.clear()
            elif not callable(value):
                setattr(groups, name, None)
    groups.mpu = None
    groups.expert_tensor_parallel_world_size = 1
    deepspeed.comm.comm.cdb = None
    deepspeed.module_inject.layers.set_autotp_mode(training=False)
    deepspeed.inference.engine.InferenceEngine.inference_mp_group = None


def drawn(seed: int, shape: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class Model(nn.Module):
    """One MoE layer on embedded ids; weights depend on the expert, not on the rank it lives on."""

    def __init__(self, experts: int, k: int, ep_size: int, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, HIDDEN)
        self.moe = MoE(HIDDEN, Expert(), num_experts=experts, k=k, ep_size=ep_size, **settings)
        local = experts // ep_size
        first = (dist.get_rank() % ep_size) * local
        with torch.no_grad():
            self.embed.weight.copy_(drawn(1, (32, HIDDEN)))
            self.moe.deepspeed_moe.gate.wg.weight.copy_(drawn(0, (experts, HIDDEN)) / 2)
            for expert, module in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts, first):
                fill_expert(module, expert)

    def forward(self, input_ids: Tensor, used_token: Tensor | None = None) -> Tensor:
        return self.moe(self.embed(input_ids), used_token)[0]


def fill_expert(module: Expert, expert: int) -> Expert:
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(drawn(100 * expert + number, parameter.shape) / 4)
    return module


def batch_of(rank: int, rows: int, length: int) -> Tensor:
    """Token ids [B, S] of a rank; ids of one kind are frequent, so that experts are unevenly hot."""
    generator = torch.Generator().manual_seed(7 + rank)
    ids = torch.randint(0, 32, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.5, IMAGE_TOKEN, ids)


def stock_engine(experts: int, k: int, **settings: Any) -> Any:
    """DeepSpeed's own, its expert-parallel groups joined as ``deepspeed.initialize`` would."""
    world = dist.get_world_size()
    model = Model(experts, k, world, **{**DROPLESS, **settings})
    model.moe.set_deepspeed_parallelism()
    return deepspeed.init_inference(model, config={"dtype": "fp32", "moe": {"ep_size": world}}).eval()


def macs_engine(experts: int, k: int, block: dict[str, Any], **settings: Any) -> Any:
    world = dist.get_world_size()
    config = {
        "dtype": "fp32",
        "moe": {"ep_size": world},
        "macs": {**BUSY, "image_token_id": IMAGE_TOKEN, "min_tokens": 0, **block},
    }
    return deepspeed_macs.init_inference(Model(experts, k, world, **settings), config).eval()


@contextmanager
def counted_traffic():
    """Rows of every all-to-all of floating point numbers, as this rank hands them to the collective."""
    rows: list[int] = []
    real = dist.all_to_all_single

    def counting(*arguments: Any, **named: Any) -> Any:
        source = named["input"] if "input" in named else arguments[1]
        if source.is_floating_point():
            rows.append(source.numel() // source.shape[-1])
        return real(*arguments, **named)

    with mock.patch.object(dist, "all_to_all_single", counting):
        yield rows


def autoep_layers(engine: Any) -> list[AutoEPMoELayer]:
    return [one for one in engine.modules() if isinstance(one, AutoEPMoELayer)]


def autoep_engine(
    name: str,
    macs_block: dict[str, Any] | None,
    tensor_parallel: int = 1,
    dtype: torch.dtype = torch.float32,
    **expert_parallel: Any,
) -> Any:
    """A Hugging Face model under AutoEP, stock where there is no block."""
    model = hf_models.build(name).to(dtype)
    settings = {"enabled": True, "autoep_size": dist.get_world_size(), **expert_parallel}
    if macs_block is None:  # stock AutoEP has to be told where a multimodal model keeps its experts
        settings = expert_parallel_settings(model.config, settings)
        support_transformers()  # newer ones break stock AutoEP
    config = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": settings}
    if tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": tensor_parallel, "preset_model": name}
    if macs_block is not None:
        named = {} if name in hf_models.MULTIMODAL else {"image_token_id": hf_models.IMAGE_TOKEN}
        config["macs"] = {**BUSY, "min_tokens": 0, **named, **macs_block}
    engine = deepspeed_macs.initialize(model=model, config=config)[0]
    engine.eval()  # which, unlike other modules', returns nothing
    return engine


def logits_of(engine: Any, ids: Tensor) -> Tensor:
    return engine(input_ids=ids, use_cache=False).logits


def tiny_engine(block: dict[str, Any]) -> Any:
    """The trained tiny model under AutoEP."""
    from tiny_vlm import model as tiny

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {"enabled": True, "autoep_size": dist.get_world_size()},
        "macs": block,
    }
    engine = deepspeed_macs.initialize(model=tiny.load_model(), config=config)[0]
    engine.eval()
    return engine


def padded_inputs(samples: list[Any], lengths: list[int]) -> dict[str, Tensor]:
    """As a processor would make them: prompts cut to their last tokens, padded on the left."""
    from tiny_vlm import model as tiny

    fill = tiny.build_config().text_config.pad_token_id
    longest = max(lengths)
    inputs = tiny.sample_inputs(samples)
    del inputs["position_ids"]
    rows = []
    for sample, length in zip(samples, lengths, strict=True):
        words = [token for token in sample.prompt if token != fill]
        rows.append(([fill] * longest + words)[-longest:] if sample.pixels is not None else words[-length:])
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[fill] * (longest - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    real &= ids != fill
    image = tiny.build_config().image_token_id
    kinds = (ids == image).long()
    return {**inputs, "input_ids": ids, "attention_mask": real, "mm_token_type_ids": kinds}
