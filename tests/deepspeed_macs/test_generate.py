"""The modality mask through ``generate()``: caches, left padding, ranks that stop at different steps."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("skimage", reason="scikit-image is not installed")

from support.cases import BUSY
from support.deepspeed_ranks import on_deepspeed, padded_inputs, tiny_engine
from tiny_vlm import data
from tiny_vlm import model as tiny

ROOMY = {**BUSY, "capacity_factor": 1e6}


def prepared():
    """Left-padded inputs of two pictures and two texts, of another length on every rank."""
    samples = data.draw_samples(5, "test", ("where", "arithmetic", "recall", "count"), 4)
    return padded_inputs(samples, [100, 20 + 5 * dist.get_rank(), 30, 100])


def check_prompt(event, inputs):
    image = inputs["input_ids"] == tiny.build_config().image_token_id
    assert int(image.any(1).sum()) == 2 and (inputs["attention_mask"] == 0).any()
    assert torch.equal(event.tokens.modality.view(image.shape) == 1, image)
    assert torch.equal(event.tokens.valid.view(image.shape), inputs["attention_mask"].bool())


@pytest.mark.parametrize(
    ("world", "policy", "min_tokens"),
    [
        (1, "vanilla", 0),
        (1, "macs", 0),
        (2, "vanilla", 0),
        (2, "macs", 0),
        (2, "macs", None),
    ],
)
@on_deepspeed()
def test_generation_is_hugging_faces_and_the_mask_follows_it(world, policy, min_tokens):
    """By default decoding is bypassed."""
    inputs, new = prepared(), 3 + 2 * dist.get_rank()  # ranks stop at different steps
    steps = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    expected = tiny.load_model().generate(**inputs, **steps)
    engine = tiny_engine({**ROOMY, "policy": policy, "min_tokens": min_tokens})
    events = []
    engine.macs.layers[0].on_plan(events.append)
    assert torch.equal(engine.module.generate(**inputs, **steps, synced_gpus=world > 1), expected)
    check_prompt(events[0], inputs)
    # One new token a sequence, text, no padding; as many steps as the rank that needs most.
    later = [one.tokens for one in events[1:]]
    assert len(later) == (0 if min_tokens is None else 2 if world == 1 else 4)
    for tokens in later:
        assert len(tokens.modality) == 4 and not tokens.modality.any() and tokens.valid.all()
    assert engine.macs.reports()[0].planned.tolist() == [float(policy == "macs")] * len(events)


@on_deepspeed(1)
def test_without_a_processors_types_the_ids_are_read():
    """The model needs positions of its own then."""
    inputs = prepared()
    del inputs["mm_token_type_ids"]
    engine, events = tiny_engine({**BUSY, "policy": "macs"}), []
    engine.macs.layers[0].on_plan(events.append)
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, *inputs["input_ids"].shape)
    engine(**inputs, position_ids=positions, use_cache=False)
    check_prompt(events[0], inputs)
