"""Hooks that tell which token is which from what a model is called with."""

import types

import pytest
import torch
from torch import nn

from macs import AUDIO, IMAGE, TEXT, VIDEO, attach_modality, current_modality, modality


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
        assert found.kinds.tolist() == [[TEXT, IMAGE, VIDEO, AUDIO, TEXT]]
        assert found.valid.tolist() == [[False, True, True, True, True]]
    assert model(torch.tensor([[1]])).kinds.shape == (1, 1)  # a decoding step
    assert model(None) is None and current_modality() is None
    with pytest.raises(RuntimeError, match="in the model"):
        model(torch.tensor([[99]]))
    assert current_modality() is None  # also when the model fails
    hook.remove()
    assert model(ids) is None


def test_what_the_caller_says_goes_first():
    model = Model()
    attach_modality(model, image_token_id=5)
    ids = torch.tensor([[5, 1]])
    with modality(ids == 5, exempt=ids == 1):
        assert model(ids).exempt.tolist() == [[False, True]]
        assert model(ids[:, :1]).kinds.tolist() == [[IMAGE]]  # another shape is another batch


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
    assert model(torch.tensor([[5, 6, 7, 1]])).kinds.tolist() == [[IMAGE, VIDEO, AUDIO, TEXT]]


def test_what_the_caller_names_goes_before_the_config():
    model = Multimodal(image_token_id=5)
    attach_modality(model, image_token_id=4)
    assert model(torch.tensor([[5, 4]])).kinds.tolist() == [[TEXT, IMAGE]]


def test_a_processors_kinds_go_before_the_ids():
    model = Multimodal(image_token_id=5)
    attach_modality(model)
    ids, kinds = torch.tensor([[5, 5, 1]]), torch.tensor([[0, 2, 1]])
    assert model(ids, mm_token_type_ids=kinds).kinds.tolist() == [[TEXT, VIDEO, IMAGE]]
    assert model(mm_token_type_ids=kinds).kinds.tolist() == [[TEXT, VIDEO, IMAGE]]


def test_a_model_without_token_ids_needs_its_processors_kinds():
    model = Multimodal()
    attach_modality(model)
    assert model(torch.tensor([[5, 1]])) is None  # nothing tells, and the layers say so
    assert model(torch.tensor([[5, 1]]), mm_token_type_ids=torch.tensor([[1, 0]])).kinds.tolist() == [[1, 0]]


@pytest.mark.parametrize("config", [{}, {"image_token_id": 5}])
def test_a_processors_kinds_may_cover_what_is_in_the_cache(config):
    model = Multimodal(**config)
    attach_modality(model)
    step = model(torch.tensor([[1], [5]]), mm_token_type_ids=torch.tensor([[1, 1, 0], [1, 0, 1]]))
    assert step.kinds.tolist() == [[TEXT], [IMAGE]]


def test_padding_follows_the_attention_mask_also_behind_a_cache():
    model = Multimodal(image_token_id=5)
    attach_modality(model)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = model(torch.tensor([[0, 5, 1], [5, 5, 1]]), attention_mask=mask)
    assert found.valid.tolist() == [[False, True, True], [True, True, True]]
    step = model(torch.tensor([[1], [1]]), attention_mask=torch.cat([mask, torch.ones(2, 1).long()], 1))
    assert step.valid.tolist() == [[True], [True]]
    four = model(torch.tensor([[0, 5, 1]]), attention_mask=torch.zeros(1, 1, 3, 3))
    assert four.valid.all()
