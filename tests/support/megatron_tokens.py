"""Jobs for worker processes: what Megatron's models are called with, and what their layers are told of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

import macs
from macs import Runtime
from megatron_macs import attach_modality, install
from support.cases import busy

from .megatron_jobs import batch_of, build_layer, drawn, layer_config, on_megatron
from .megatron_models import LONGEST, VOCABULARY, language_config, local_spec
from .plan_log import PlanLog

IMAGE, PADDING = 28, 0
SETTINGS = {"min_tokens": 0, "capacity_factor": 0.8}


def model_of(runtime: Runtime | None, **changes: Any) -> Any:
    return GPTModel(
        language_config(**changes),
        local_spec(runtime),
        VOCABULARY,
        LONGEST,
        position_embedding_type="rope",
        parallel_output=False,
    ).eval()


def ids_of(rows: int = 2, length: int = 16, padded: int = 4) -> tuple[Tensor, Tensor]:
    """Ids [B, S], a third of them pictures, and which are real: the last ``padded`` are not."""
    ids = (drawn(5, (rows, length)).abs() * 1e4).long() % (VOCABULARY - 8) + 1
    ids = torch.where(torch.arange(length) % 3 == 0, IMAGE, ids)
    valid = (torch.arange(length) < length - padded).expand(rows, -1).clone()
    return ids.masked_fill(~valid, PADDING), valid


class Told:
    """The tokens that every layer of a runtime was told of, in batch-major order."""

    def __init__(self, runtime: Runtime) -> None:
        self.tokens: list[macs.Tokens] = []
        for layer in runtime.layers:
            layer.on_plan(lambda event: self.tokens.append(event.tokens))

    def of(self, call: int = 0) -> tuple[Tensor, Tensor]:
        tokens = self.tokens[call]
        order = tokens.position.argsort()
        return tokens.modality[order], tokens.valid[order]


def forward(model: Any, ids: Tensor, **more: Any) -> Tensor:
    rows, length = ids.shape
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    position = torch.arange(length).expand(rows, -1)
    return model(ids, position, **{"attention_mask": causal, **more})


@on_megatron
def padding_of_calls() -> dict[str, Any]:
    """Every way in which a call of ``GPTModel`` tells its padding."""
    ids, valid = ids_of()
    found: dict[str, Any] = {}
    for name in ("padding_mask", "4-D", "block", "ids"):
        runtime = Runtime(busy(**SETTINGS))
        model = model_of(runtime)
        attach_modality(model, image_token_id=IMAGE, padding_token_id=PADDING if name == "ids" else None)
        told = Told(runtime)
        if name == "padding_mask":
            forward(model, ids, padding_mask=~valid)
        elif name == "4-D":  # True where attention is masked
            causal = torch.ones(16, 16, dtype=torch.bool).triu(1)
            forward(model, ids, attention_mask=(causal | ~valid[:, None])[:, None])
        elif name == "block":
            with macs.modality(ids == IMAGE, exempt=ids == 3):
                forward(model, ids, padding_mask=~valid)
        else:
            forward(model, ids)
        right = [told.of(call) for call in range(len(told.tokens))]
        pictures = (ids == IMAGE).to(torch.int8)
        found[name] = {
            "calls": len(right),
            "kinds": all(torch.equal(kinds.view(ids.shape), pictures) for kinds, _ in right),
            "valid": all(torch.equal(real.view(ids.shape), valid) for _, real in right),
            "counted": [float(report.tokens[0]) for report in runtime.reports()],
        }
    return found


@on_megatron
def padding_that_nobody_read() -> str:
    """A ``padding_mask`` beside a block, without ``attach_modality``."""
    ids, valid = ids_of()
    runtime = Runtime(busy(**SETTINGS))
    model = model_of(runtime)
    with macs.modality(ids == IMAGE, valid=valid):
        forward(model, ids, padding_mask=~valid)
    with macs.modality(ids == IMAGE):
        try:
            forward(model, ids, padding_mask=~valid)
        except ValueError as error:
            return str(error)
    return ""


@on_megatron
def chunks_of_a_slice(chunks: int, length: int) -> dict[str, bool]:
    """Chunks of hidden states that are part of a larger tensor, as an engine may hand them on."""
    config = layer_config("alltoall", 4, 2, mlp_chunks_for_prefill=chunks)
    runtime = Runtime(busy(**SETTINGS))
    layer = build_layer(runtime, config)
    hidden, mask = batch_of(0, 3, length)
    larger = torch.cat([drawn(9, (5, *hidden.shape[1:])), hidden, drawn(8, (7, *hidden.shape[1:]))])
    cut = larger[5 : 5 + length]
    told = Told(runtime)
    with macs.modality(mask):
        for _ in range(2):  # layer after layer, pass after pass
            for chunk in cut.chunk(min(chunks, length)):
                layer(chunk)
    kinds = [torch.stack([one.modality.view(-1, 3) for one in [tokens]])[0] for tokens in told.tokens]
    half = len(kinds) // 2
    expected = mask.t().to(torch.int8)
    same = [torch.equal(torch.cat(part), expected) for part in (kinds[:half], kinds[half:])]
    with macs.modality(mask):  # a pass that was interrupted does not shift the next one
        layer(cut.chunk(min(chunks, length))[0])
        told.tokens.clear()
        layer(cut.chunk(min(chunks, length))[0])
    first = told.tokens[0].modality.view(-1, 3)
    told.tokens.clear()
    with macs.modality(mask):  # a forward pass outside an engine is not cut
        layer(hidden)
        layer(hidden)
    layer(cut.chunk(min(chunks, length))[0])  # nor is a mask asked for
    uncut = [torch.equal(one.modality.view(-1, 3), expected) for one in told.tokens[:2]]
    return {
        "whole": all(same),
        "again": torch.equal(first, expected[: len(first)]),
        "uncut": all(uncut) and not told.tokens[2].visual.any(),
    }


@on_megatron
def samples_in_a_row() -> dict[str, Any]:
    """``PackedSeqParams.tokens_per_sample``, by which 0.19 folds a row of samples for its MoE layers."""
    ids, _ = ids_of(1, 24, 0)
    runtime = Runtime(busy(**SETTINGS))
    model = model_of(runtime)
    attach_modality(model, image_token_id=IMAGE)
    told = Told(runtime)
    ends = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=8,
        max_seqlen_kv=8,
        tokens_per_sample=8,
    )
    for layer in model.decoder.layers:
        layer.self_attention = Passing()  # attention over packed sequences needs a GPU
    forward(model, ids, attention_mask=None, packed_seq_params=packed)
    kinds, valid = told.of()
    return {"kinds": torch.equal(kinds[None], (ids == IMAGE).to(torch.int8)), "valid": bool(valid.all())}


class Passing(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden, None


class PacksInside(nn.Module):
    """Takes padded ids, and calls its language model with what is real of them, one after the other."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model
        self.config = language_model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask.bool()
        lengths = real.sum(1)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=16, max_seqlen_kv=16
        )
        positions = torch.arange(int(ends[-1]))[None]
        decoder_input = self.language_model.embedding(input_ids[real][None], positions)
        return self.language_model(None, None, None, decoder_input=decoder_input, packed_seq_params=packed)


@on_megatron
def packed_inside(outer: bool, inner: bool) -> dict[str, Any]:
    """A model that packs by itself, with hooks on it and on the model it calls, or on one of them."""
    ids, valid = ids_of(2, 16, 5)
    runtime = Runtime(busy(**SETTINGS))
    language_model = model_of(runtime)
    for layer in language_model.decoder.layers:
        layer.self_attention = Passing()
    model = PacksInside(language_model).eval()
    if outer:
        attach_modality(model, image_token_id=IMAGE)
    if inner:
        attach_modality(language_model, image_token_id=IMAGE)
    told = Told(runtime)
    try:
        model(ids, valid.long())
    except ValueError as error:
        return {"error": str(error)}
    kinds, real = told.of()
    return {"kinds": torch.equal(kinds, (ids == IMAGE)[valid].to(torch.int8)), "valid": bool(real.all())}


@on_megatron
def disabled_experts(policy: str, groups: bool) -> list[int]:
    """Assignments that a plan gives to experts which the correction bias takes out of service."""
    changes: dict[str, Any] = {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }
    if groups:
        changes |= {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
    runtime = Runtime(busy(min_tokens=0, capacity_factor=0.6, reroute="group"), policy=policy)
    layer = build_layer(runtime, layer_config("alltoall", 8, 2, **changes))
    layer.router.expert_bias.zero_()
    layer.router.expert_bias[6:] = float("-inf") if not groups else -1e4
    log = PlanLog(runtime)
    hidden, mask = batch_of(dist.get_rank(), 6, 16)
    with macs.modality(mask):
        layer(hidden)
    plan = log.plans[0]
    return [int((plan.experts >= 6).sum()), int(plan.rerouted.sum()), int((plan.experts >= 0).sum())]


@on_megatron
def installed_in_any_order() -> list[bool]:
    """Whether installations leave the engine's classes as they were."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    def constructors() -> list[Any]:
        return [TransformerLayer.__init__, GPTModel.__init__]

    stock, clean = constructors(), []
    for order in ((0, 1), (1, 0)):
        undo = [install(Runtime()), install(Runtime())]
        assert constructors() != stock
        for one in order:
            undo[one]()
            undo[one]()
        clean.append(constructors() == stock)
    last = Runtime()
    undo = [install(Runtime()), install(last)]
    model = model_of(None)
    clean.append(len(last.layers) == 2 and model is not None)
    for one in undo:
        one()
    return clean


@on_megatron
def copied_layers() -> dict[str, bool]:
    """A deep copy of a layer plans by its own router, and is stock's where nothing overflows."""
    runtime = Runtime(busy(**SETTINGS))
    layer = build_layer(runtime, layer_config("alltoall", 4, 2))
    hidden, mask = batch_of(0, 3, 9)
    with macs.modality(mask):
        before = layer(hidden)[0]
        try:
            copied = copy.deepcopy(layer)
        except TypeError as error:  # process groups of Megatron's own modules
            return {"stock": "ProcessGroup" in str(error) or "pickle" in str(error)}
        same = torch.equal(copied(hidden)[0], before)
    return {"stock": same and copied.macs is not layer.macs and copied.router.macs is copied.macs}
