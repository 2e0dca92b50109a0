"""The tiny model as one of Megatron's LLaVA models, behind its engine for vision-language models.

There a picture is one token of the prompt, and its 64 features take that token's place inside the
model. The weights are the same, and so are the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.inference_request import VLMInferenceRequest
from megatron.core.inference.model_inference_wrappers.multimodal.vlm_inference_wrapper import (
    VLMInferenceWrapper,
)
from megatron.core.inference.text_generation_controllers.vlm_text_generation_controller import (
    VLMTextGenerationController,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformers import Qwen3VLMoeForConditionalGeneration

from macs import Runtime
from megatron_macs import with_macs

from .data import ANSWER_TOKENS, PROMPT_TOKENS, Sample
from .megatron import copy_weights, transformer_config
from .megatron_engine import WordTokenizer
from .model import picture_inputs
from .pictures import IMAGE_TOKENS, PICTURE_SIZE
from .static_engine import engine_of, greedy, wrapper_arguments
from .vocabulary import up_to_end

PATCH = PICTURE_SIZE // round(IMAGE_TOKENS**0.5)  # pixels a side of what one token stands for


class PictureTower(nn.Module):
    """The Hugging Face vision tower as the ``vision_model`` of a LLaVA model.

    images uint8 [P, 128, 128, 3] -> features [P, 64, D], the width of the language model already.
    """

    class_token_len = 0

    def __init__(self, source: Qwen3VLMoeForConditionalGeneration) -> None:
        super().__init__()
        self.visual = source.model.visual

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        inputs = picture_inputs(list(images.cpu().numpy()))
        parameter = next(self.visual.parameters())
        features = self.visual(
            inputs["pixel_values"].to(parameter), grid_thw=inputs["image_grid_thw"].to(parameter.device)
        )
        return features.pooler_output.view(len(images), IMAGE_TOKENS, -1)


class Wrapped(nn.Module):
    """A model as the engine expects to find it: inside another module, as training leaves it, and with
    what the engine asks of a language model."""

    def __init__(self, module: LLaVAModel) -> None:
        super().__init__()
        self.module, self.config = module, module.config
        self.vocab_size = module.language_model.vocab_size

    @property
    def decoder(self) -> nn.Module:
        return self.module.language_model.decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def set_input_tensor(self, tensor: Any) -> None:
        self.module.set_input_tensor(tensor)


def build_llava_model(
    source: Qwen3VLMoeForConditionalGeneration, runtime: Runtime | None, **changes: Any
) -> LLaVAModel:
    """``source`` as a LLaVA model of Megatron, with MACS (a runtime) or stock (none).

    Needs Megatron's parallel state. ``changes`` are fields of the language model's ``TransformerConfig``.
    """
    text = source.config.text_config
    language = transformer_config(text, **changes)
    spec = get_gpt_layer_local_spec(
        num_experts=text.num_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    # Megatron builds a vision tower and a projection of its own; a small one, for the real one's place.
    vision = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=1, use_cpu_initialization=True
    )
    vision.vision_model_type = "internvit"
    dense = get_gpt_layer_local_spec()
    projection = dense.submodules.mlp
    model = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=spec if runtime is None else with_macs(spec, runtime),
        language_vocab_size=text.vocab_size,
        language_max_sequence_length=text.max_position_embeddings,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=dense,
        drop_vision_class_token=True,
        vision_projection_config=vision,
        vision_projection_layer_spec=submodules_of(projection),
        language_position_embedding_type="rope",
        language_rotary_base=text.rope_parameters["rope_theta"],
        parallel_output=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        add_encoder=parallel_state.is_pipeline_first_stage(),
        img_h=PICTURE_SIZE,
        img_w=PICTURE_SIZE,
        patch_dim=PATCH,
        image_token_index=source.config.image_token_id,
    )
    if model.add_encoder:
        model.vision_model, model.vision_projection = PictureTower(source), nn.Identity()
    copy_weights(source, model.language_model)
    return model.eval()


def submodules_of(mlp: Any) -> MLPSubmodules:
    """Of a dense layer's ``mlp`` slot: a ``ModuleSpec`` in Megatron 0.16, a partial later."""
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]


class LLaVAEngine:
    """``generate``: prompts and pictures in, answers out, one request at a time, as the engine has it.

    Every expert-parallel rank must call it equally often, with as many samples.
    """

    def __init__(self, model: LLaVAModel) -> None:
        self.model = model
        context = StaticInferenceContext(1, PROMPT_TOKENS + ANSWER_TOKENS)
        language = model.language_model
        wrapper = VLMInferenceWrapper(Wrapped(model), *wrapper_arguments(language, context))
        self.engine = engine_of(VLMTextGenerationController(wrapper, WordTokenizer()), 1)

    def generate(self, samples: Sequence[Sample], tokens: int = ANSWER_TOKENS) -> list[list[int]]:
        """The answer to every sample: token ids up to and with the end token."""
        return [self._answer(sample, tokens) for sample in samples]

    def _answer(self, sample: Sample, tokens: int) -> list[int]:
        pixels = [] if sample.pixels is None else [torch.tensor(sample.pixels)]
        images = torch.stack(pixels) if pixels else torch.zeros(0, PICTURE_SIZE, PICTURE_SIZE, 3)
        device = next(self.model.parameters()).device
        request = VLMInferenceRequest(
            request_id=self.engine.get_new_request_id(),
            prompt="",
            prompt_tokens=one_token_a_picture(sample.prompt, self.model.image_token_index),
            sampling_params=greedy(tokens),
            num_img_embeddings_per_tile=IMAGE_TOKENS,
            imgs=images.to(device),
            num_tiles=torch.ones(len(pixels), dtype=torch.int, device=device),
            decoder_seq_length=PROMPT_TOKENS + ANSWER_TOKENS,
        )
        (result,) = self.engine.generate(inference_requests=[request])
        return up_to_end(result.generated_tokens.tolist())


def one_token_a_picture(prompt: Sequence[int], image_token: int) -> list[int]:
    """A prompt in which a picture is one token instead of 64."""
    return [
        token
        for place, token in enumerate(prompt)
        if token != image_token or place == 0 or prompt[place - 1] != image_token
    ]
