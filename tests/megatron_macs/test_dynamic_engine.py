"""Megatron's dynamic inference engine: packed requests, padding, chunked prefill, decoding."""

import pytest

pytest.importorskip("megatron.core.inference.config", reason="this Megatron's engine is built otherwise")

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from support.cases import busy, events_of
from support.dynamic_engine import (
    Tokenizer,
    answers_of,
    build_engine,
    build_model,
    pretended_cuda,
    prompts,
)
from support.megatron_ranks import on_megatron

from macs import Runtime

PROMPTS, IMAGES = 70 + 45 + 90, 35 + 22 + 45


def answered(runtime, chunked=None, image=True):
    """Answers, tokens of the engine's steps (real and padded), and the events of the first layer."""
    steps, events = [], []
    with pretended_cuda():
        model = build_model(runtime, image)
        engine = build_engine(model, chunked)
        context = engine.context
        model.register_forward_pre_hook(
            lambda *_: steps.append((context.active_token_count, context.padded_active_token_count))
        )
        if runtime is not None:
            runtime.layers[0].on_plan(events.append)
        answers = answers_of(engine, dict(enumerate(prompts())))
    return answers, steps, events


def known(events):
    """Valid, visual and all tokens of each step."""
    kinds = [event.tokens for event in events]
    return [(int(one.valid.sum()), int(one.visual.sum()), len(one.modality)) for one in kinds]


@pytest.mark.parametrize("chunk", [None, 64])
@on_megatron(1)
def test_with_nothing_over_capacity_the_answers_are_stock(chunk):
    answers, steps, _ = answered(None, chunk)
    assert answered(Runtime(busy(capacity_factor=1e6)), chunk)[:2] == (answers, steps)
    assert len({tuple(answer) for answer in answers.values()}) == 3


@on_megatron(1)
def test_what_a_batch_is_filled_up_with_is_padding():
    runtime = Runtime(busy(capacity_factor=0.7))
    every = events_of(runtime)
    _, steps, events = answered(runtime)
    real, padded = steps[0]
    assert real == PROMPTS < padded
    assert known(events) == [(PROMPTS, IMAGES, padded)]  # one prompt step; decoding is not planned
    statistics = [event.plan.statistics for event in every]
    assert [int(one.tokens) for one in statistics] == [PROMPTS] * 2
    assert sum(int(one.rerouted + one.dropped) for one in statistics) > 0


@on_megatron(1)
def test_padding_is_found_where_no_modality_is():
    _, steps, events = answered(Runtime(busy(capacity_factor=0.7)), image=False)
    assert known(events) == [(PROMPTS, 0, steps[0][1])]


@on_megatron(1)
def test_chunked_prefill_takes_its_part_of_the_mask():
    _, steps, events = answered(Runtime(busy(capacity_factor=0.7)), 64)
    found = known(events)
    filled = [one for one in found if one[0] > 3]
    assert sum(one[0] for one in filled) >= PROMPTS and sum(one[1] for one in filled) == IMAGES
    assert [one[0] for one in found] == [real for real, _ in steps[: len(found)]]


@on_megatron(1)
def test_decoding_is_planned_where_it_is_asked_for():
    _, steps, events = answered(Runtime(busy(capacity_factor=0.7, min_tokens=0)))
    assert [one[0] for one in known(events)] == [real for real, _ in steps]


@on_megatron(1)
def test_the_static_engine_that_runs_on_the_dynamic_one():
    found = []
    for runtime in (None, Runtime(busy(capacity_factor=1e6))):
        with pretended_cuda():
            wrapper = GPTInferenceWrapper(build_model(runtime), StaticInferenceContext(8, 256))
            controller = TextGenerationController(wrapper, Tokenizer())
            engine = StaticInferenceEngine(controller, max_batch_size=8, legacy=False, buffer_size_gb=0.05)
            answers = engine.generate(
                prompts=[" ".join(map(str, prompt)) for prompt in prompts()],
                sampling_params=SamplingParams(top_k=1, num_tokens_to_generate=4),
            )
        assert not engine.legacy
        found.append([list(answer.generated_tokens) for answer in answers])
    assert found[0] == found[1]
    assert [int(report.visual[0]) for report in runtime.reports()] == [IMAGES] * 2
