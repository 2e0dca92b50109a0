"""Megatron's multimodal and hybrid models: every layer knows which token is which.

Encoders put out a constant for each modality, so that the tokens which reach the language model show what
they are.
"""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("skimage", reason="scikit-image is not installed")

from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from support.cases import busy, events_of
from support.megatron_ranks import (
    HIDDEN,
    LONGEST,
    VOCABULARY,
    Layout,
    language_config,
    local_spec,
    megatron_on,
    on_megatron,
)
from support.ranks import gathered, on_ranks
from tiny_vlm import data, plain
from tiny_vlm import model as tiny
from tiny_vlm.megatron_llava import LLaVAEngine, build_llava_model, one_token_a_picture

import macs
from macs import Runtime
from megatron_macs import attach_modality, install, with_macs

MARK = {macs.IMAGE: 1000.0, macs.VIDEO: 2000.0, macs.AUDIO: 3000.0}
by_either = pytest.mark.parametrize("by", ["with_macs", "install"])


class Watch:
    """What the layers of a runtime know of the tokens, and what the language model is really given."""

    def __init__(self, runtime, language_model):
        self.events, self.given = events_of(runtime), []
        language_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.given.append(kwargs.get("decoder_input")), with_kwargs=True
        )

    def check(self):
        """Every layer knew what every token is; padding is all zeros. Tokens of every layer's step."""
        calls = len(self.events) // len(self.given)
        for number, tokens in enumerate(event.tokens for event in self.events):
            value = self.given[number // calls].flatten(0, 1).float()
            kinds = torch.zeros(len(value), dtype=torch.int8)
            for kind, mark in MARK.items():
                kinds[(value == mark).all(1)] = kind
            real = (value != 0).any(1)
            assert torch.equal(tokens.modality[real], kinds[real]) and torch.equal(tokens.valid, real)
            assert (kinds > 0).any()
        return [len(event.tokens.modality) for event in self.events]


class Constant(nn.Module):
    """An encoder or a tower: whatever comes in, rows of one number come out."""

    class_token_len = 0

    def __init__(self, value, hidden):
        super().__init__()
        self.value, self.hidden = value, hidden

    def forward(self, x):
        return torch.full((*x.shape[:2], self.hidden), self.value)


@pytest.mark.parametrize(("policy", "questions"), [("vanilla", 14), ("macs", 4)])
@pytest.mark.parametrize("world", [1, 2])
@on_megatron()
def test_llava_expands_the_mask_as_it_expands_its_pictures(world, policy, questions):
    """The tiny model as a LLaVA model, through ``VLMInferenceWrapper``."""
    source = tiny.load_model()
    runtime = Runtime(busy(), policy=policy)
    model = build_llava_model(source, runtime, expert_model_parallel_size=world)
    attach_modality(model)
    samples = data.draw_samples(5, "test", data.TASKS, questions)[dist.get_rank() :: world]
    events = events_of(runtime)
    answers = LLaVAEngine(model).generate(samples)
    if policy == "vanilla":
        assert answers == plain.Engine(tiny.load_model()).generate(samples)
    prompts = [one.tokens.modality.bool() for one in events if len(one.tokens.modality) > 1]
    image = [torch.tensor(sample.prompt) == source.config.image_token_id for sample in samples]
    assert len(prompts) == 4 * len(samples)
    assert all(torch.equal(prompt, image[index // 4]) for index, prompt in enumerate(prompts))


@on_megatron(1)
def test_llava_with_several_pictures_of_several_tiles():
    """And with none; a cached step; bad calls."""
    runtime = Runtime(busy(min_tokens=0))
    model = build_llava_model(tiny.load_model(), runtime)
    model.vision_model = Constant(MARK[macs.IMAGE], model.config.hidden_size)
    model.img_seq_len = 5
    hook = attach_modality(model)
    watch = Watch(runtime, model.language_model)
    image = model.image_token_index
    ids = torch.arange(30, 48).view(3, 6)
    ids[0, 1], ids[0, 3], ids[1, 2] = image, image, image
    tiles = torch.tensor([2, 1, 3], dtype=torch.int)

    def run():
        model(
            input_ids=ids,
            position_ids=torch.arange(6)[None],
            attention_mask=None,
            images=torch.zeros(6, 5, 1),
            num_image_tiles=tiles,
        )

    run()
    model._language_max_sequence_length = 12  # cuts the end of the longest off
    run()
    # 6 tokens, of which one is a picture of 3 tiles of 5 tokens each.
    assert watch.check() == [3 * 20] * 4 + [3 * 12] * 4
    with pytest.raises(ValueError, match="num_image_tiles: found 2 pictures, expected 3, as in input_ids"):
        hook.of_call({"input_ids": ids, "num_image_tiles": tiles[:2]})
    assert "found imgs_sizes" in hook.of_call({"input_ids": ids, "imgs_sizes": torch.ones(1, 2)}).reason
    cached = SimpleNamespace(key_value_memory_dict={"image_tokens_count": 5}, is_static_batching=lambda: True)
    step = hook.of_call({"input_ids": ids[:, -1:], "inference_context": cached})
    assert step.ids.tolist() == [[0], [0], [0]]
    with macs.modality(torch.ones(3, 12, dtype=torch.bool)):
        outer = hook.of_call({"input_ids": ids, "num_image_tiles": tiles})
    assert outer.ids.tolist() == [[1] * 12] * 3


def llava_stage(layout):
    """A prompt with a picture through a stage: masks and plans of its layers, and the last one's logits.

    Stages after the first get no picture. Megatron's VLMInferenceWrapper itself has no pipeline in either
    version: the stages by hand.
    """
    runtime = Runtime(busy(capacity_factor=0.8))
    model = build_llava_model(tiny.load_model(), runtime, pipeline_model_parallel_size=layout.pp)
    attach_modality(model)
    (sample,) = data.draw_samples(5, "test", ("count",), 1)
    ids = torch.tensor([one_token_a_picture(sample.prompt, model.image_token_index)])
    events = events_of(runtime)
    if not model.pre_process:
        before = torch.empty(ids.shape[1] + data.IMAGE_TOKENS - 1, 1, model.config.hidden_size)
        dist.recv(before, 0)
        model.set_input_tensor(before)
    output, _ = model(
        images=torch.tensor(sample.pixels)[None] if model.pre_process else None,
        input_ids=ids,
        position_ids=torch.arange(ids.shape[1])[None],
        attention_mask=None,
        num_image_tiles=torch.ones(1, dtype=torch.int),
        inference_context=StaticInferenceContext(1, 128),
        runtime_gather_output=True,
    )
    if not model.post_process:
        dist.send(output.contiguous(), 1)
    masks = [event.tokens.modality.tolist() for event in events]
    return masks, [event.plan.experts.tolist() for event in events], output if model.post_process else None


@on_ranks(2)
def test_later_stages_of_llava_know_the_pictures_by_the_ids():
    with megatron_on(Layout(2)):
        masks, plans, logits = llava_stage(Layout())
    with megatron_on(Layout(2, pp=2)):
        stage = parallel_state.get_pipeline_model_parallel_rank()
        own_masks, own_plans, own_logits = llava_stage(Layout(2, pp=2))
    assert len(masks) == 4 and sum(masks[0]) == data.IMAGE_TOKENS
    assert own_masks == masks[2 * stage :][:2] == masks[:2] and own_plans == plans[2 * stage :][:2]
    assert stage == 0 or torch.equal(own_logits, logits)
    first, last = gathered(own_plans)
    assert first + last == plans and len(first) == len(last) == 2 and masks == [masks[0]] * 4


@by_either
@on_megatron(1)
def test_mimo_distinguishes_pictures_video_and_sound(by):
    runtime = Runtime(busy(min_tokens=0))
    ids_of = {"images": 28, "video_frames": 29, "audios": 30}
    kinds = {"images": macs.IMAGE, "video_frames": macs.VIDEO, "audios": macs.AUDIO}
    encoders = {
        name: ModuleSpec(
            module=AudioModalitySubmodules if name == "audios" else VisionModalitySubmodules,
            submodules={
                "encoders": {
                    "one": ModuleSpec(module=Constant, params={"value": MARK[kind], "hidden": HIDDEN})
                }
            },
        )
        for name, kind in kinds.items()
    }
    language = ModuleSpec(
        module=GPTModel,
        params={
            "config": language_config(),
            "transformer_layer_spec": local_spec(None if by == "install" else runtime),
            "vocab_size": VOCABULARY,
            "max_sequence_length": LONGEST,
            "position_embedding_type": "rope",
            "parallel_output": False,
        },
    )
    settings = MimoModelConfig(
        language_model_spec=language, modality_submodules_spec=encoders, special_token_ids=ids_of
    )
    undo = install(runtime) if by == "install" else None
    model = MimoModel(settings).eval()
    if undo is None:
        attach_modality(model)
    else:
        undo()
    watch = Watch(runtime, model.language_model)
    ids = torch.tensor([[1, 28, 28, 28, 2, 29, 29, 3], [4, 30, 5, 28, 28, 6, 7, 8]])
    counts = {name: int((ids == token).sum()) for name, token in ids_of.items()}
    inputs = {name: {"one": {"x": torch.zeros(1, count, 1)}} for name, count in counts.items()}
    model(input_ids=ids, position_ids=torch.arange(8).expand_as(ids), modality_inputs=inputs)
    assert watch.check() == [16, 16]
    odd = copy.copy(model)
    odd.special_token_ids = {"smell": 27, "images": 28}
    with pytest.raises(ValueError, match="found a modality 'smell', expected its token id"):
        attach_modality(odd)


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.core.models.hybrid") is None, reason="no hybrid model in this Megatron"
)
@by_either
@on_megatron(1)
def test_hybrid_models_have_the_mask_too(by):
    """Attention and MoE layers in turn."""
    from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    full = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm").submodules
    stack = hybrid_layer_specs.hybrid_stack_spec
    kinds = type(stack.submodules)(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=full.input_layernorm,
                self_attention=full.self_attention,
                self_attn_bda=full.self_attn_bda,
            ),
        ),
        moe_layer=ModuleSpec(
            module=stack.submodules.moe_layer.module,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=full.pre_mlp_layernorm, mlp=full.mlp, mlp_bda=full.mlp_bda
            ),
        ),
    )
    spec = ModuleSpec(module=stack.module, submodules=kinds, params=stack.params)
    hybrid_block.TENorm = WrappedTorchNorm  # for want of transformer-engine
    runtime = Runtime(busy(min_tokens=0))
    undo = install(runtime, {"image_token_id": 28}) if by == "install" else None
    model = HybridModel(
        language_config(num_layers=4),
        spec if by == "install" else with_macs(spec, runtime),
        vocab_size=VOCABULARY,
        max_sequence_length=LONGEST,
        hybrid_layer_pattern="*E*E",
        position_embedding_type="rope",
        parallel_output=False,
    ).eval()
    if undo is None:
        attach_modality(model, image_token_id=28)
    else:
        undo()
    ids = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    model(ids, torch.arange(12).expand_as(ids), None)
    assert [type(layer.mlp).__name__ for layer in model.decoder.layers[1::2]] == ["MACSMoELayer"] * 2
    images = int((ids == 28).sum())
    assert images and [int(report.visual) for report in runtime.reports()] == [images] * 2
