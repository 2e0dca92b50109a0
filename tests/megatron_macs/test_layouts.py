"""Tensor, expert, expert-tensor and pipeline parallelism, with and without sequence parallelism, on gloo."""

import re

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("skimage", reason="scikit-image is not installed")

from megatron.core import parallel_state
from support.cases import NOTHING_OVER, busy, events_of
from support.fake_deepep import fake_deepep
from support.megatron_ranks import (
    Layout,
    batch_of,
    build_layer,
    layer_config,
    megatron_on,
    on_megatron,
    output_of,
    planned,
)
from support.ranks import gathered, on_ranks
from tiny_vlm import data, plain
from tiny_vlm import model as tiny
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.megatron_engine import Engine

import macs
from macs import Runtime
from megatron_macs import attach_modality

LAYOUTS = {
    "TP 2": Layout(2, tp=2, etp=2),
    "TP 2, sequence parallel": Layout(2, tp=2, etp=2, sp=True),
    "TP 2, EP 2": Layout(2, tp=2, ep=2),
    "TP 2, EP 2, sequence parallel": Layout(2, tp=2, ep=2, sp=True),
    "TP 2 x EP 2 x ETP 2": Layout(4, tp=2, ep=2, etp=2),
    "TP 2 x EP 2 x ETP 2, sequence parallel": Layout(4, tp=2, ep=2, etp=2, sp=True),
    "TP 2 x EP 4, sequence parallel": Layout(4, tp=2, ep=4, sp=True),
    "EP 2 x DP 2": Layout(4, ep=2),
}
SEQUENCE_PARALLEL = LAYOUTS["TP 2, EP 2, sequence parallel"]
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


def config_of(layout, dispatcher="alltoall", **changes):
    return layer_config(dispatcher, 8, 3, sequence_parallel=layout.sp, **changes)


def tokens_of(layout):
    """This rank's hidden states [S / TP, B, D] or [S, B, D], and the mask [B, S] of whole sequences."""
    hidden, mask = batch_of(dist.get_rank() // layout.tp, 3, 12)
    return (part_of(hidden, layout).contiguous(), mask)


def part_of(sequences, layout):
    """What a rank has of tensors [S, ...] under sequence parallelism."""
    return sequences.chunk(layout.tp)[dist.get_rank() % layout.tp] if layout.sp else sequences


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@every_layout
@on_megatron()
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(layout, dispatcher):
    config, (hidden, mask) = config_of(layout, dispatcher), tokens_of(layout)
    stock, _ = build_layer(None, config)(hidden)
    for policy, settings in NOTHING_OVER:
        layer = build_layer(Runtime(busy(**{"min_tokens": 0, **settings}), policy=policy), config)
        with macs.modality(mask):
            assert torch.equal(layer(hidden)[0], stock), (policy, settings)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@every_layout
@on_megatron()
def test_the_layer_computes_its_plan(layout, dispatcher):
    runtime, (hidden, mask) = Runtime(busy(min_tokens=0, capacity_factor=0.6)), tokens_of(layout)
    output, event = planned(runtime, config_of(layout, dispatcher), (hidden, mask))
    plan, tokens = event.plan, event.tokens
    torch.testing.assert_close(output, output_of(plan, hidden, 8), rtol=0, atol=1e-5)
    assert torch.equal(tokens.modality.bool(), part_of(mask.t(), layout).flatten())
    assert plan.statistics.rerouted + plan.statistics.dropped > 0
    first = gathered(plan.experts)[dist.get_rank() // layout.tp * layout.tp]
    # Ranks with the same tokens agree.
    assert torch.equal(plan.experts, first) == (not layout.sp or dist.get_rank() % layout.tp == 0)
    weights = gathered(plan.weights)[dist.get_rank() // layout.tp * layout.tp]
    assert layout.sp or torch.equal(plan.weights, weights)


@pytest.mark.parametrize("layout", [LAYOUTS["TP 2, EP 2"]], ids=["TP 2, EP 2"])
@on_megatron()
def test_replicas_must_plan_alike(layout):
    with pytest.raises(
        ValueError, match="policy expanded-drop: every rank would add experts of its own"
    ) as error:
        build_layer(Runtime(policy="expanded-drop"), config_of(layout))
    assert "set sequence_parallel" in str(error.value)


@pytest.mark.parametrize(
    "layout", [LAYOUTS["TP 2, sequence parallel"], SEQUENCE_PARALLEL], ids=["TP 2", "EP 2"]
)
@on_megatron()
def test_an_engine_may_take_sequence_parallelism_back(layout):
    """As Megatron's static engine does when it begins to serve: every rank then has whole sequences."""
    whole = layout._replace(sp=False)
    hidden, mask = tokens_of(whole)

    def plan_of(policy, built, used):
        runtime = Runtime(busy(min_tokens=0, capacity_factor=0.6), policy=policy)
        config = config_of(built)
        layer = build_layer(runtime, config)
        config.sequence_parallel = used.sp
        events = events_of(runtime)
        with macs.modality(mask):
            layer(hidden)
        return events[0].plan

    found, expected = plan_of("macs", layout, whole), plan_of("macs", whole, whole)
    assert torch.equal(found.experts, expected.experts) and torch.equal(found.weights, expected.weights)
    with pytest.raises(ValueError, match="every rank would add experts of its own"):
        plan_of("expanded-drop", layout, whole)


@pytest.mark.parametrize("layout", [SEQUENCE_PARALLEL], ids=["TP 2, EP 2"])
@on_megatron()
def test_sequence_parallelism_wants_the_whole_mask(layout):
    layer = build_layer(Runtime(busy(min_tokens=0)), config_of(layout))
    hidden, mask = tokens_of(layout)
    expected = re.escape("modality mask: found shape (3, 6), the layer has 3 sequences of 12 tokens")
    with macs.modality(mask[:, : len(hidden)]), pytest.raises(ValueError, match=expected):
        layer(hidden)


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
@pytest.mark.parametrize("policy", ["macs", "token-drop"])
@pytest.mark.parametrize("layout", [Layout(2, ep=2), Layout(4, ep=4)], ids=["EP 2", "EP 4"])
@on_megatron()
def test_flex_dispatchers_carry_the_plan(layout, policy, backend):
    config = config_of(layout, "flex", moe_flex_dispatcher_backend=backend)
    hidden, mask = tokens_of(layout)
    with fake_deepep() as fake, macs.modality(mask):
        stock, _ = build_layer(None, config)(hidden)
        roomy = Runtime(busy(capacity_factor=1e6, min_tokens=0))
        assert torch.equal(build_layer(roomy, config)(hidden)[0], stock)
        runtime = Runtime(busy(capacity_factor=0.5, min_tokens=0), policy=policy)
        layer = build_layer(runtime, config)
        events = events_of(runtime)
        output, _ = layer(hidden)
        (chosen, weights), rows = fake.handed[-1], fake.rows
        runtime.enabled = False
        assert torch.equal(layer(hidden)[0], stock)
    plan = events[0].plan
    torch.testing.assert_close(output, output_of(plan, hidden, 8), rtol=0, atol=1e-5)
    kept = int((plan.experts >= 0).sum())
    assert kept == int((chosen >= 0).sum() if backend == "deepep" else chosen.sum())
    assert abs(float(weights.sum() - plan.weights.sum())) < 1e-4 and plan.statistics.dropped > 0
    # What is dropped reaches no expert.
    assert sum(gathered(rows[2])) == sum(gathered(kept))
    assert sum(gathered(rows[0])) == layout.world * 3 * 12 * 3


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("expanded-drop", {}, "moe_flex_dispatcher_backend = 'deepep' sends 3 assignments a token"),
        ("macs", {"moe_flex_dispatcher_backend": "ncclep"}, "expected one of deepep, hybridep"),
        ("macs", {"moe_expert_rank_capacity_factor": 1.0}, "it drops what the plan keeps"),
    ],
)
@on_megatron(2)
def test_what_flex_dispatchers_cannot_express_is_refused(policy, changes, message):
    config = layer_config("flex", 8, 3)
    for name, value in changes.items():
        setattr(config, name, value)
    with fake_deepep(), pytest.raises(ValueError, match=message):
        build_layer(Runtime(policy=policy), config)


MODEL_LAYOUTS = {
    "PP 2": Layout(2, pp=2),
    "TP 2": Layout(2, tp=2, etp=2),
    "EP 4": Layout(4, ep=4),
    "TP 2, EP 2": Layout(4, tp=2, ep=2),
    "PP 2 x EP 2": Layout(4, pp=2, ep=2),
    "TP 2 x PP 2 x EP 2": Layout(8, tp=2, pp=2, ep=2),
}
QUESTIONS = 14  # two of each task


def answered(runtime, replicas=None, **changes):
    """Events of a runtime's layers while the tiny model answers; each knew what every token is. Questions
    are divided among ``replicas``, those of the data-parallel group by default."""
    source = tiny.load_model()
    model = build_megatron_model(
        source,
        runtime,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        **changes,
    )
    attach_modality(model, image_token_id=source.config.image_token_id)
    replicas = replicas or parallel_state.get_data_parallel_world_size()
    replica = parallel_state.get_data_parallel_rank() % replicas
    samples = data.draw_samples(5, "test", data.TASKS, QUESTIONS)[replica::replicas]
    events = [[] for _ in runtime.layers]
    for layer, own in zip(runtime.layers, events, strict=True):
        layer.on_plan(own.append)
    answers = Engine(model, PictureEncoder(source), len(samples)).generate(samples)
    ids = torch.tensor([sample.prompt for sample in samples])
    image = (ids == source.config.image_token_id).t().flatten()
    for own in events:
        assert torch.equal(torch.cat([event.tokens.modality for event in own]).bool(), image)
    return answers, samples, events


@pytest.mark.parametrize(
    ("name", "chunks"), [*((name, 1) for name in MODEL_LAYOUTS), ("PP 2 x EP 2", 2), ("PP 2 x EP 2", 3)]
)
@on_ranks(lambda name, **_: MODEL_LAYOUTS[name].world)
def test_vanilla_gives_the_same_answers_under_every_layout(name, chunks):
    """Those of Hugging Face; also where a prompt is prefilled in chunks, which split the mask, too."""
    layout = MODEL_LAYOUTS[name]
    with megatron_on(layout):
        answers, samples, events = answered(Runtime(policy="vanilla"), mlp_chunks_for_prefill=chunks)
    assert answers == plain.Engine(tiny.load_model()).generate(samples)
    assert [len(own) for own in events] == [chunks] * (4 // layout.pp)


@pytest.mark.parametrize("chunks", [2, 3])
@on_ranks(4)
def test_chunks_of_a_prompt_are_planned(chunks):
    with megatron_on(MODEL_LAYOUTS["PP 2 x EP 2"]):
        *_, events = answered(Runtime(busy(capacity_factor=0.8)), mlp_chunks_for_prefill=chunks)
    assert [len(own) for own in events] == [chunks] * 2
    assert all(int(event.plan.statistics.planned) == 1 for own in events for event in own)


@pytest.mark.parametrize(
    ("name", "alike", "replicas"),
    [
        ("PP 2", Layout(2), 1),
        ("TP 2", Layout(2), 1),
        ("PP 2 x EP 2", Layout(4, ep=2), 2),
        ("TP 2 x PP 2 x EP 2", Layout(8, tp=2, ep=2), 2),
    ],
)
@on_ranks(lambda name, **_: MODEL_LAYOUTS[name].world)
def test_layouts_that_split_the_tokens_alike_plan_alike(name, alike, replicas):
    settings, found = busy(capacity_factor=0.8), []
    for layout in (alike, MODEL_LAYOUTS[name]):
        with megatron_on(layout):
            answers, samples, events = answered(Runtime(settings), replicas)
            assert [len(own) for own in events] == [1] * (4 // layout.pp)
            plans = [own[0].plan.experts.tolist() for own in events]
            first = parallel_state.get_pipeline_model_parallel_rank() * len(plans)
        found.append((tuple(samples[0].prompt), answers, plans))
    whole = {asked: (answers, plans) for asked, answers, plans in gathered(found[0])}
    asked, answers, plans = found[1]
    assert answers == whole[asked][0] and plans == whole[asked][1][first : first + len(plans)]
