"""Answers of a prompt that was read once: as without a cache, and as the model's own ``generate``."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from support.hf_models import build
from tiny_vlm import data
from tiny_vlm import model as tiny

import macs
from macs import MACSConfig, Runtime
from macs_tools.common.answers import divergence, read
from macs_tools.common.requests import ProcessorEngine, Question


@pytest.fixture(scope="module")
def model():
    return tiny.load_model()


@pytest.fixture
def attached(model):
    runtime = Runtime(virtual_ranks=4)
    detach, hook = macs.attach_plain(model, runtime), macs.attach_modality(model)
    yield model, runtime
    detach()
    hook.remove()


@torch.inference_mode()
def test_given_answers_are_scored_as_without_a_cache_and_greedy_ones_are_the_likeliest(model):
    batch = data.draw_samples(3, "validation", data.TASKS, 14)
    answers = [sample.answer for sample in batch]
    prompt = read(model, Runtime(), tiny.sample_inputs(batch))
    greedy = prompt.greedy(data.ANSWER_TOKENS).tolist()
    prompt.rewind()
    for ids, one in zip(greedy, prompt.said_of(greedy), strict=True):
        assert one.argmax(-1).tolist() == ids
    prompt.rewind()
    said = prompt.said_of(answers)
    longest = max(map(len, answers))
    rows = [sample.prompt + sample.answer + [0] * (longest - len(sample.answer)) for sample in batch]
    inputs = tiny.sample_inputs(batch)
    inputs["input_ids"] = torch.tensor(rows)
    inputs["position_ids"] = torch.arange(len(rows[0])).expand(3, *inputs["input_ids"].shape)
    whole = model(**inputs).logits[:, data.PROMPT_TOKENS - 1 : -1].log_softmax(-1)
    for one, expected, answer in zip(said, whole, answers, strict=True):
        torch.testing.assert_close(one, expected[: len(answer)], atol=1e-4, rtol=1e-4)
        assert divergence(expected[: len(answer)], one) < 1e-6


def padded(ids, model):
    """As requests come from a processor: left padding, a mask, no positions."""
    padding = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 1]])
    mask = torch.cat([padding, torch.ones(4, ids.shape[1], dtype=torch.long)], 1)
    inputs = {"input_ids": torch.cat([torch.full((4, 3), 3) * padding, ids], 1), "attention_mask": mask}
    if hasattr(model.config, "image_token_id"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    return inputs


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["pictures", "texts", "a text model"])
def test_padded_prompts_follow_the_models_own_positions(model, kind):
    tasks = ("where", "count") if kind == "pictures" else data.TEXT_TASKS
    batch = data.draw_samples(4, "validation", tasks, 4)
    ids = torch.tensor([sample.prompt for sample in batch])
    if kind == "a text model":
        model, ids = build("qwen3_moe"), ids % 50
    inputs = padded(ids, model)
    if kind == "pictures":
        inputs |= tiny.picture_inputs([sample.pixels for sample in batch])
    done = model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=4,
        max_new_tokens=4,
        output_scores=True,
        return_dict_in_generate=True,
    )
    answers = done.sequences[:, inputs["input_ids"].shape[1] :]
    # Its scores rule the end token out.
    scores = torch.stack(done.scores, 1)
    prompt = read(model, Runtime(), inputs)
    for one, expected in zip(prompt.said_of(answers.tolist()), scores, strict=True):
        finite = expected.isfinite()
        masked = one.masked_fill(~finite, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(masked, expected.log_softmax(-1), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_prompts_are_planned_and_answers_are_not(attached):
    model, runtime = attached
    runtime.use("macs", MACSConfig(target_load=0.6, min_tokens=0))
    batch = data.draw_samples(3, "validation", ("read",), 8)
    prompt = read(model, runtime, tiny.sample_inputs(batch))
    loads = [report.load("after") for report in runtime.reports()]
    assert all(len(one) == 1 and float(one) <= 0.6 + 1e-6 for one in loads)
    prompt.said_of([sample.answer for sample in batch])
    assert runtime.enabled
    assert [len(report.load("after")) for report in runtime.reports()] == [1] * len(loads)
    assert np.isfinite(prompt.logits.numpy()).all()


def test_a_picture_that_the_model_cannot_be_shown_is_refused():
    tokenizer = SimpleNamespace(chat_template=None, pad_token="x")
    for processor, lacks in ((SimpleNamespace(tokenizer=tokenizer), "chat template"), (tokenizer, "vision")):
        engine = ProcessorEngine(None, processor, 1)
        with pytest.raises(ValueError, match=f"found a picture, .*the model has no {lacks}"):
            engine.inputs_of([Question("what is it ?", picture=object())])
