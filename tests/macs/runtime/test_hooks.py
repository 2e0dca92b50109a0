"""Hooks that tell which token is which from what a model is called with."""

import types

import pytest
import torch
from support.cases import AnyAdapter
from torch import nn

from macs import AUDIO, IMAGE, TEXT, VIDEO, MACSConfig, Runtime, Topology, attach_modality, modality
from macs.adapters import current_modality


class Model(nn.Module):
    def forward(self, input_ids, position_ids=None):
        if input_ids is not None and input_ids[0, 0] == 99:
            raise RuntimeError("in the model")
        return current_modality()


def test_the_hook_reads_the_ids_of_every_call():
    model = Model()
    hook = attach_modality(model, image_token_id=5, video_token_id=6, audio_token_id=7, padding_token_id=0)
    ids = torch.tensor([[0, 5, 6, 7, 1]])
    for found in (model(ids), model(input_ids=ids)):
        assert found.ids.tolist() == [[TEXT, IMAGE, VIDEO, AUDIO, TEXT]]
        assert found.valid.tolist() == [[False, True, True, True, True]]
    assert model(torch.tensor([[1]])).ids.shape == (1, 1)  # a decoding step
    assert model(None) is None and current_modality() is None
    with pytest.raises(RuntimeError, match="in the model"):
        model(torch.tensor([[99]]))
    assert current_modality() is None  # also when the model fails
    hook.remove()
    assert model(ids) is None


def test_a_call_does_not_walk_the_model(monkeypatch):
    """``modules`` of a large model takes milliseconds: no decode step pays that once the layers are known."""
    layer = Runtime(MACSConfig(capacity_factor=1.0)).add_layer(
        AnyAdapter(lambda: torch.ones(4, 8), Topology(4), 2)
    )
    model = Model()
    model.inside = nn.Linear(1, 1)
    model.inside.macs = layer
    attach_modality(model, image_token_id=5)
    ids = torch.tensor([[5, 1]])
    model(ids)
    monkeypatch.setattr(nn.Module, "modules", lambda self: pytest.fail("walked"))
    assert model(ids).ids.tolist() == [[IMAGE, TEXT]]


def test_a_block_goes_before_the_calls_arguments():
    model = Model()
    attach_modality(model, image_token_id=5)
    ids = torch.tensor([[5, 1]])
    with modality(ids == 5, exempt=ids == 1):
        assert model(ids).exempt.tolist() == [[False, True]]
        assert model(ids[:, :1]).ids.tolist() == [[IMAGE]]  # another shape is another batch


def test_an_id_outside_the_vocabulary_is_refused():
    model = Model()
    model.config = types.SimpleNamespace(text_config=types.SimpleNamespace(vocab_size=128))
    with pytest.raises(ValueError, match="found token id 99999, expected one of the 128 of the model's"):
        attach_modality(model, image_token_id=99999)
    attach_modality(model, image_token_id=127)


def test_the_hook_needs_something_to_look_for():
    with pytest.raises(ValueError, match="found none"):
        attach_modality(Model())
    with pytest.raises(ValueError, match="takes no input_ids"):
        attach_modality(nn.Linear(1, 1), image_token_id=1)


class Multimodal(nn.Module):
    """Called as Hugging Face's models are."""

    def __init__(self, **config):
        super().__init__()
        self.config = types.SimpleNamespace(**config)

    def forward(self, input_ids=None, attention_mask=None, mm_token_type_ids=None, **kwargs):
        return current_modality()


def test_the_models_own_config_names_its_tokens():
    model = Multimodal(image_token_id=5, video_token_index=6, audio_token_id=None)
    attach_modality(model, audio_token_id=7)
    assert model(torch.tensor([[5, 6, 7, 1]])).ids.tolist() == [[IMAGE, VIDEO, AUDIO, TEXT]]


def test_what_the_caller_names_goes_before_the_config():
    model = Multimodal(image_token_id=5)
    attach_modality(model, image_token_id=4)
    assert model(torch.tensor([[5, 4]])).ids.tolist() == [[TEXT, IMAGE]]


def test_a_model_without_token_ids_needs_its_processors_ids():
    model = Multimodal()
    attach_modality(model)
    assert model(torch.tensor([[5, 1]])) is None  # nothing tells, and the layers say so
    assert model(torch.tensor([[5, 1]]), mm_token_type_ids=torch.tensor([[1, 0]])).ids.tolist() == [[1, 0]]


def test_arguments_behind_stars_are_read():
    class Starred(Multimodal):
        def forward(self, input_ids=None, **kwargs):
            return current_modality()

    model = Starred(image_token_id=5)
    attach_modality(model)
    found = model(
        torch.tensor([[5, 5]]),
        attention_mask=torch.tensor([[0, 1]]),
        mm_token_type_ids=torch.tensor([[2, 2]]),
    )
    assert found.valid.tolist() == [[False, True]] and found.ids.tolist() == [[VIDEO, VIDEO]]


def test_somebody_elses_hook_may_fail():
    model = Multimodal(image_token_id=5)

    def fail(module, args):
        if fail.now:
            raise RuntimeError("in a hook")

    fail.now = False
    model.register_forward_pre_hook(fail)
    attach_modality(model)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids):
            fail.now = True
            with pytest.raises(RuntimeError, match="in a hook"):
                self.inner(input_ids)
            fail.now = False
            return current_modality()

    outer = Outer()
    attach_modality(outer, image_token_id=5)
    assert outer(torch.tensor([[5, 1]])).ids.tolist() == [[IMAGE, TEXT]]
    assert current_modality() is None
