"""What enters a MoE layer with MACS on Megatron-Core: odd batches, masks, steps."""

import re
import time

import pytest
import torch
import torch.distributed as dist
from support.cases import busy
from support.megatron_ranks import batch_of, build_layer, layer_config, newer_megatron, on_megatron, planned

import macs
from macs import Runtime


@pytest.mark.parametrize("lengths", [[9, 0], [0, 9], [1, 30]])
@on_megatron(2)
def test_ranks_may_have_uneven_tokens_or_none(lengths):
    batch = batch_of(dist.get_rank(), 1, lengths[dist.get_rank()])
    output, _ = planned(Runtime(busy(min_tokens=0, capacity_factor=0.5)), layer_config(), batch)
    assert output.shape == batch[0].shape and output.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"level": "rank", "reroute": "group"}, {"spare_text": True}])
@pytest.mark.parametrize("kind", ["one token", "no visual tokens", "all visual", "k is E", "not finite"])
@on_megatron(1)
def test_odd_batches(kind, settings):
    hidden, mask = batch_of(0, 2, 8)
    if kind == "one token":
        hidden, mask = hidden[:1, :1].contiguous(), mask[:1, :1]
    if kind in ("no visual tokens", "all visual", "not finite"):
        mask = torch.full_like(mask, kind != "no visual tokens")
    if kind == "not finite":
        hidden[0, 0, 3], hidden[1, 1, 2] = float("nan"), float("inf")
    runtime, config = (
        Runtime(busy(**{"min_tokens": 0, **settings})),
        layer_config(top_k=4 if kind == "k is E" else 2),
    )
    output, _ = planned(runtime, config, (hidden, mask))
    report = runtime.reports()[0]
    bad = 2 if kind == "not finite" else 0
    assert int(report.nonfinite) == bad
    assert int((~output.isfinite()).any(-1).sum()) <= bad
    assert int(report.visual) == int(mask.sum())
    if kind in ("no visual tokens", "all visual"):
        assert float(report.visual_ratio[0]) == float(kind == "all visual")


BAD_MASKS = {
    "length": (lambda mask: mask[:, :-1], "found shape (2, 7), the layer has 2 sequences of 8 tokens"),
    "batch": (lambda mask: mask[:1], "found shape (1, 8), the layer has 2 sequences of 8 tokens"),
    "device": (lambda mask: mask.to("meta"), "found on meta, the hidden states are on cpu"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
@on_megatron(2, timeout=100)
def test_a_mask_that_does_not_fit_is_an_error_and_hangs_nobody(kind):
    """The other rank learns from the closed connection that its peer is gone."""
    layer = build_layer(Runtime(busy(min_tokens=0)), layer_config())
    hidden, mask = batch_of(dist.get_rank(), 2, 8)
    if dist.get_rank() == 1:
        started = time.monotonic()
        with macs.modality(mask), pytest.raises(RuntimeError):
            layer(hidden)
        assert time.monotonic() - started < 30  # before the group's timeout of a minute
        return
    change, message = BAD_MASKS[kind]
    expected = pytest.raises((ValueError, TypeError), match=re.escape(f"modality mask: {message}"))
    with expected, macs.modality(change(mask)):
        layer(hidden)


@newer_megatron
@pytest.mark.parametrize("first", ["prompt", "small"])
@on_megatron(2)
def test_a_prompt_is_planned_where_decoding_is_captured(first):
    """The first step of a layer, or one after a small step."""
    runtime = Runtime(busy(min_tokens=8, capacity_factor=0.5))
    graphs = {"cuda_graph_impl": "local", "moe_pad_experts_for_cuda_graph_inference": True}
    layer, plain = (build_layer(runtime, layer_config(experts=8, **changes)) for changes in (graphs, {}))
    dispatcher = layer.token_dispatcher
    if first == "small":
        hidden, mask = batch_of(dist.get_rank(), 1, 4)
        with macs.modality(mask):
            layer(hidden)
        assert dispatcher.cuda_dtoh_point == "before_ep_alltoall"
    hidden, mask = batch_of(dist.get_rank(), 3, 12)
    with macs.modality(mask):
        output, _ = layer(hidden)
        assert dispatcher.cuda_dtoh_point == "before_permutation_1"
        rows = dispatcher.num_out_tokens
        assert torch.equal(output, plain(hidden)[0])
    report = runtime.reports()[0]
    assert int(rows) == int(report.kept[-1] + report.rerouted[-1])
    assert not isinstance(rows, torch.Tensor) or rows.device.type == "cpu"


@pytest.mark.parametrize("extra", [0, 2])
@on_megatron(2)
def test_reports_of_ranks_with_different_steps_are_not_added(extra):
    runtime = Runtime(busy(min_tokens=0), policy="vanilla")
    layer = build_layer(runtime, layer_config())
    hidden, mask = batch_of(dist.get_rank(), 2, 8)
    for step in range(1 + extra):
        runtime.recording = step == 0 or dist.get_rank() == 0
        with macs.modality(mask):
            layer(hidden)
    assert [len(one.records) for one in runtime.reports()] == [1 + extra if dist.get_rank() == 0 else 1]
    if extra:
        with pytest.raises(ValueError, match="recorded 1 to 3 steps"):
            runtime.reports(dist.group.WORLD)
    else:
        assert [len(one.records) for one in runtime.reports(dist.group.WORLD)] == [1]
