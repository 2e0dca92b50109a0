"""Which token is which in every call of Megatron's models, and which expert is in service."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from support.cases import busy, events_of
from support.megatron_ranks import (
    VOCABULARY,
    batch_of,
    build_layer,
    drawn,
    language_model,
    layer_config,
    on_megatron,
)

import macs
from macs import IMAGE, TEXT, Runtime
from macs.adapters import current_modality
from megatron_macs import attach_modality, install
from megatron_macs.hooks import MegatronHook

IMAGE_ID, PADDING = 28, 0
SETTINGS = {"min_tokens": 0, "capacity_factor": 0.8}


def ids_of(rows=2, length=16, padded=4):
    """Ids [B, S], a third of them pictures, and which are real: the last ``padded`` are not."""
    ids = (drawn(5, (rows, length)).abs() * 1e4).long() % (VOCABULARY - 8) + 1
    ids = torch.where(torch.arange(length) % 3 == 0, IMAGE_ID, ids)
    valid = (torch.arange(length) < length - padded).expand(rows, -1).clone()
    return ids.masked_fill(~valid, PADDING), valid


def check_tokens(events, ids, valid, layers=2):
    """Every layer planned, and knew of ids [B, S] which are pictures, and which are real."""
    assert len(events) == layers
    for tokens in (event.tokens for event in events):
        order = tokens.position.argsort()
        assert torch.equal(tokens.modality[order].bool(), (ids == IMAGE_ID).flatten())
        assert torch.equal(tokens.valid[order], valid.flatten())


def forward(model, ids, **more):
    rows, length = ids.shape
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    position = torch.arange(length).expand(rows, -1)
    return model(ids, position, **{"attention_mask": causal, **more})


@pytest.mark.parametrize("by", ["padding_mask", "4-D", "block", "ids"])
@on_megatron(1)
def test_padding_is_found_in_every_argument_that_marks_it(by):
    ids, valid = ids_of()
    runtime = Runtime(busy(**SETTINGS))
    model = language_model(runtime)
    attach_modality(model, image_token_id=IMAGE_ID, padding_token_id=PADDING if by == "ids" else None)
    events = events_of(runtime)
    if by == "padding_mask":
        forward(model, ids, padding_mask=~valid)
    elif by == "4-D":  # True where attention is masked
        causal = torch.ones(16, 16, dtype=torch.bool).triu(1)
        forward(model, ids, attention_mask=(causal | ~valid[:, None])[:, None])
    elif by == "block":
        with macs.modality(ids == IMAGE_ID, exempt=ids == 3):
            forward(model, ids, padding_mask=~valid)
    else:
        forward(model, ids)
    check_tokens(events, ids, valid)
    assert [int(report.tokens) for report in runtime.reports()] == [24, 24]


@on_megatron(1)
def test_a_padding_mask_that_nobody_reads_is_an_error():
    """Beside a block, without ``attach_modality``."""
    ids, valid = ids_of()
    model = language_model(Runtime(busy(**SETTINGS)))
    with macs.modality(ids == IMAGE_ID, valid=valid):
        forward(model, ids, padding_mask=~valid)
    message = r"padding_mask: the model was called with one(.|\n)*attach_modality\(model\)"
    with macs.modality(ids == IMAGE_ID), pytest.raises(ValueError, match=message):
        forward(model, ids, padding_mask=~valid)


@pytest.mark.parametrize(("chunks", "length"), [(2, 9), (3, 10), (4, 3)])
@on_megatron(1)
def test_chunks_may_be_cut_off_a_part_of_a_tensor(chunks, length):
    """Hidden states that are part of a larger tensor, as an engine may hand them on."""
    runtime = Runtime(busy(**SETTINGS))
    layer = build_layer(runtime, layer_config(mlp_chunks_for_prefill=chunks))
    hidden, mask = batch_of(0, 3, length)
    larger = torch.cat([drawn(9, (5, *hidden.shape[1:])), hidden, drawn(8, (7, *hidden.shape[1:]))])
    parts = larger[5 : 5 + length].chunk(min(chunks, length))
    events, expected = events_of(runtime), mask.t().flatten()

    def visual():
        found = torch.cat([event.tokens.visual for event in events])
        events.clear()
        return found

    with macs.modality(mask):
        for _ in range(2):  # layer after layer, pass after pass
            for part in parts:
                layer(part)
            assert torch.equal(visual(), expected)
    with macs.modality(mask):
        layer(parts[0])
        events.clear()
        layer(parts[0])  # a pass that was interrupted does not shift the next one
    first = visual()
    assert torch.equal(first, expected[: len(first)])
    with macs.modality(mask):  # a forward pass outside an engine is not cut
        layer(hidden)
        layer(hidden)
    assert torch.equal(visual(), torch.cat([expected, expected]))
    layer(parts[0])  # nor is a mask asked for
    assert not visual().any()


@pytest.mark.skipif(
    "tokens_per_sample" not in PackedSeqParams.__dataclass_fields__,
    reason="this Megatron folds no samples for its MoE layers",
)
@on_megatron(1)
def test_samples_in_a_row_are_sequences_of_their_own():
    """``PackedSeqParams.tokens_per_sample``, by which 0.19 folds a row of samples for its MoE layers."""
    ids, valid = ids_of(1, 24, 0)
    runtime = Runtime(busy(**SETTINGS))
    model = without_attention(language_model(runtime))
    attach_modality(model, image_token_id=IMAGE_ID)
    events = events_of(runtime)
    packed = packed_by(torch.tensor([0, 8, 16, 24], dtype=torch.int32), tokens_per_sample=8)
    forward(model, ids, attention_mask=None, packed_seq_params=packed)
    check_tokens(events, ids, valid)


def packed_by(ends, **more):
    longest = int(ends.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **more,
    )


class Passing(torch.nn.Module):
    def forward(self, hidden, *args, **kwargs):
        return hidden, None


def without_attention(model):
    """Attention over packed sequences needs a GPU."""
    for layer in model.decoder.layers:
        layer.self_attention = Passing()
    return model


class PacksInside(torch.nn.Module):
    """Takes padded ids, and calls its language model with what is real of them, one after the other."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model
        self.config = language_model.config

    def forward(self, input_ids, attention_mask):
        real = attention_mask.bool()
        lengths = real.sum(1)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        positions = torch.arange(int(ends[-1]))[None]
        decoder_input = self.language_model.embedding(input_ids[real][None], positions)
        return self.language_model(
            None, None, None, decoder_input=decoder_input, packed_seq_params=packed_by(ends)
        )


@pytest.mark.parametrize(
    ("outer", "inner", "error"),
    [
        (True, True, None),
        (True, False, "use attach_modality on the model that is called with packed_seq_params too"),
        (False, True, "use attach_modality on the model that packs, too"),
    ],
)
@on_megatron(1)
def test_a_model_may_pack_inside_what_came_padded(outer, inner, error):
    """With hooks on it and on the model it calls; on one of them alone, it is refused."""
    ids, valid = ids_of(2, 16, 5)
    runtime = Runtime(busy(**SETTINGS))
    inside = without_attention(language_model(runtime))
    model = PacksInside(inside).eval()
    for one in [model] * outer + [inside] * inner:
        attach_modality(one, image_token_id=IMAGE_ID)
    events = events_of(runtime)
    with nullcontext() if error is None else pytest.raises(ValueError, match=error):
        model(ids, valid.long())
    check_tokens(events, ids[valid], valid[valid], layers=2 if error is None else 0)


@pytest.mark.parametrize("policy", ["macs", "rank-balanced", "expanded-drop"])
@pytest.mark.parametrize("groups", [False, True])
@on_megatron(2)
def test_experts_that_a_bias_takes_out_get_no_token(policy, groups):
    changes = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    if groups:
        changes |= {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
    runtime = Runtime(busy(min_tokens=0, capacity_factor=0.6, reroute="group"), policy=policy)
    layer = build_layer(runtime, layer_config(experts=8, **changes))
    layer.router.expert_bias.zero_()
    layer.router.expert_bias[6:] = float("-inf") if not groups else -1e4
    events, (hidden, mask) = events_of(runtime), batch_of(dist.get_rank(), 6, 16)
    with macs.modality(mask):
        layer(hidden)
    plan = events[0].plan
    assert (plan.experts < 6).all() and (plan.experts >= 0).any()
    assert plan.rerouted.any() or policy == "expanded-drop" or groups


@on_megatron(1)
def test_the_last_installation_acts():
    stock, last = (TransformerLayer.__init__, GPTModel.__init__), Runtime()
    undo = [install(Runtime()), install(last)]
    model = language_model(None)
    assert len(last.layers) == 2 and model.decoder.layers
    for one in undo:
        one()
    assert (TransformerLayer.__init__, GPTModel.__init__) == stock


@on_megatron(1)
def test_layers_may_be_copied():
    """A deep copy has a runtime layer of its own, and answers as the layer does."""
    runtime = Runtime(busy(**SETTINGS))
    layer = build_layer(runtime, layer_config())
    hidden, mask = batch_of(0, 3, 9)
    with macs.modality(mask):
        before = layer(hidden)[0]
        # Megatron's modules hold process groups, which a copy has to share.
        with mock.patch.object(dist.ProcessGroup, "__deepcopy__", lambda self, memo: self, create=True):
            copied = copy.deepcopy(layer)
        assert torch.equal(copied(hidden)[0], before)
    assert copied.macs is not layer.macs and copied.router.macs is copied.macs


def test_the_dynamic_engines_own_mask_is_used():
    """``DynamicInferenceContext.current_image_token_mask()`` of Megatron's main branch: -1 is text."""

    class Model(torch.nn.Module):
        config = SimpleNamespace(cuda_graph_impl="none")

        def forward(self, input_ids, inference_context=None):
            return current_modality()

    model = Model()
    hook = MegatronHook(model, {9: IMAGE}, None)
    context = SimpleNamespace(
        active_token_count=4,
        is_static_batching=lambda: False,
        current_image_token_mask=lambda: torch.tensor([[-1, 0, 1, -1, -1]]),
    )
    ids = torch.tensor([[9, 1, 1, 2, 0]])
    found = model(ids, inference_context=context)
    assert found.ids.tolist() == [[TEXT, IMAGE, IMAGE, TEXT, TEXT]]
    assert found.valid.tolist() == [[True] * 4 + [False]]
    context.current_image_token_mask = lambda: None  # a step without pictures
    assert model(ids, inference_context=context).ids.tolist() == [[IMAGE, TEXT, TEXT, TEXT, TEXT]]
    context.current_image_token_mask = lambda: torch.tensor([[0, -1]])
    with pytest.raises(ValueError, match=r"current_image_token_mask: found shape \(1, 2\)"):
        model(ids, inference_context=context)
    hook.remove()
