"""Masks of Megatron's models where the models themselves are not needed, and versions that do not fit."""

from types import SimpleNamespace

import pytest
import torch
from support.cases import AnyAdapter
from torch import nn

import macs
from macs import MACSConfig, Runtime, Topology
from macs.adapters import current_modality
from megatron_macs import attach_modality, compat
from megatron_macs.hooks import MegatronHook, modality_of_name

IMAGE_TOKEN = 7


class Model(nn.Module):
    """Keeps the modality that its layer would find."""

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.layer = nn.Linear(2, 2)
        self.layer.macs = Runtime(MACSConfig()).add_layer(
            AnyAdapter(lambda: torch.randn(4, 8), Topology(4, 2), 2)
        )

    def forward(self, input_ids, inference_context=None):
        return current_modality()


def context(active, graphed=False):
    return SimpleNamespace(
        active_token_count=active,
        is_static_batching=lambda: False,
        using_cuda_graph_this_step=lambda: graphed,
    )


class Wrapper(nn.Module):
    """As training leaves a model: inside a module that takes any arguments."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


def test_captured_layers_find_every_mask_in_the_same_place():
    model = Model(cuda_graph_impl="local")
    MegatronHook(model, {IMAGE_TOKEN: macs.IMAGE}, None)
    step = context(4, graphed=True)
    first = model(torch.tensor([[1, 7, 7, 2]]), step)
    assert model.layer.macs.recorder._ring is not None  # made before a graph could capture its making
    assert first.held and first.ids.tolist() == [[0, 1, 1, 0]]
    second = model(torch.tensor([[7, 1, 1, 7]]), step)
    assert second is first and first.ids.tolist() == [[1, 0, 0, 1]]
    with macs.modality(torch.tensor([[True, True, True, False]])):
        assert model(torch.tensor([[7, 1, 1, 7]]), step) is first
    assert first.ids.tolist() == [[1, 1, 1, 0]]
    # A step that no graph replays is not kept: prompts have any length.
    assert not model(torch.tensor([[1, 7, 7, 2]]), context(4)).held
    assert not model(torch.tensor([[1, 7, 7, 2]])).held
    plain = Model(cuda_graph_impl="none")
    MegatronHook(plain, {IMAGE_TOKEN: macs.IMAGE}, None)
    assert not plain(torch.tensor([[1, 7]]), step).held


def test_what_training_wraps_around_a_model_may_stay():
    model = Model(cuda_graph_impl="none")
    attach_modality(Wrapper(Wrapper(model)), image_token_id=IMAGE_TOKEN)
    assert model(torch.tensor([[1, 7]])).ids.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match=r"Linear\.forward takes no input_ids"):
        attach_modality(Wrapper(nn.Linear(2, 2)), image_token_id=IMAGE_TOKEN)


def test_a_model_captured_whole_is_refused():
    model = Model(cuda_graph_impl="local")
    model.cudagraph_manager = nn.Identity()
    with pytest.raises(ValueError, match="inference_cuda_graph_scope = 'block' captures the model whole"):
        MegatronHook(model, {IMAGE_TOKEN: macs.IMAGE}, None)


@pytest.mark.parametrize("kinds", [{IMAGE_TOKEN: macs.IMAGE}, {}])
def test_padding_of_the_dynamic_engine_is_found(kinds):
    model = Model(cuda_graph_impl="none")
    MegatronHook(model, kinds, None)
    found = model(torch.tensor([[1, 7, 7, 2, 7, 0]]), inference_context=context(4))
    assert found.valid.tolist() == [[True] * 4 + [False] * 2]
    assert found.ids.tolist() == [[0, 1, 1, 0, 1, 0] if kinds else [0] * 6]
    mask = torch.tensor([[True, False, True, False, True, True]])
    with macs.modality(mask, exempt=~mask):
        found = model(torch.tensor([[1, 7, 7, 2, 7, 0]]), inference_context=context(5))
    assert found.ids.bool().equal(mask) and found.exempt.equal(~mask)
    assert found.valid.tolist() == [[True] * 5 + [False]]


@pytest.mark.parametrize(
    ("name", "modality"),
    [("images", macs.IMAGE), ("Vision", macs.IMAGE), ("video_frames", macs.VIDEO), ("sounds", macs.AUDIO)],
)
def test_modalities_by_name(name, modality):
    assert modality_of_name(name) == modality


def test_what_a_megatron_lacks_is_named(monkeypatch):
    from megatron.core.transformer.moe import token_dispatcher

    compat.check_megatron()
    monkeypatch.delattr(token_dispatcher, "MoEFlexTokenDispatcher")
    with pytest.raises(ImportError) as caught:
        compat.check_megatron()
    assert f"knows megatron-core {compat.KNOWN}; found 0." in str(caught.value)
    assert "lacks megatron.core.transformer.moe.token_dispatcher.MoEFlexTokenDispatcher." in str(caught.value)


def test_a_dispatcher_with_other_arguments_is_named(monkeypatch):
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    monkeypatch.setattr(
        MoEAlltoAllTokenDispatcher, "dispatch_preprocess", lambda self, hidden_states, probs: None
    )
    with pytest.raises(ImportError, match=r"lacks .* dispatch_preprocess\(self, hidden_states, routing_map"):
        compat.check_megatron()
