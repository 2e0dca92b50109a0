"""The tiny model: a Hugging Face ``Qwen3VLMoeForConditionalGeneration``, its pictures and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from . import CHECKPOINT
from .data import Sample
from .pictures import PICTURE_SIZE
from .vocabulary import (
    BEGIN,
    END,
    FILLER,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    VOCABULARY_SIZE,
)

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 8, 2, 2
INITIAL_SPREAD = 0.05  # the usual 0.02 is for models sixteen times as wide


def build_config(balance: float = 0.001) -> Qwen3VLMoeConfig:
    """About 3 M parameters. ``balance`` is the coefficient of the model's own balancing loss."""
    hidden = 128
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": hidden,
            "intermediate_size": 256,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": balance,
            "max_position_embeddings": 512,
            "initializer_range": INITIAL_SPREAD,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": False,
            "pad_token_id": VOCABULARY[FILLER],
            "bos_token_id": VOCABULARY[BEGIN],
            "eos_token_id": VOCABULARY[END],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "out_hidden_size": hidden,
            "num_position_embeddings": (PICTURE_SIZE // PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": [],
            "initializer_range": INITIAL_SPREAD,
        },
        image_token_id=VOCABULARY[IMAGE],
        video_token_id=VOCABULARY[VIDEO],
        vision_start_token_id=VOCABULARY[VISION_START],
        vision_end_token_id=VOCABULARY[VISION_END],
        tie_word_embeddings=False,
    )
    return config


def build_model(seed: int, balance: float = 0.001) -> Qwen3VLMoeForConditionalGeneration:
    """A fresh model; the seed fixes its weights."""
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration._from_config(
        build_config(balance), attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    return model


def load_model(folder: Path | str = CHECKPOINT) -> Qwen3VLMoeForConditionalGeneration:
    """The trained model, float32, in evaluation mode."""
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        local_files_only=True,
    )
    return model.eval()


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """The Hugging Face image processor at the tiny model's sizes (pictures come ready sized)."""
    return Qwen2VLImageProcessorPil(
        do_resize=False,
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=TEMPORAL_PATCH_SIZE,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


_PROCESSOR = build_image_processor()


def picture_inputs(pictures: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """uint8 [128, 128, 3] pictures -> ``pixel_values [P * 256, 384]``, ``image_grid_thw [P, 3]``."""
    return dict(_PROCESSOR(images=list(pictures), return_tensors="pt", input_data_format="channels_last"))


def open_picture(path: Path | str) -> np.ndarray:
    """A user's picture, cut to a square around its centre and scaled: uint8 [128, 128, 3]."""
    with Image.open(path) as image:
        square = ImageOps.fit(image.convert("RGB"), (PICTURE_SIZE, PICTURE_SIZE))
    return np.asarray(square)


def sample_inputs(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The model's keyword arguments for the prompts of a mixed batch.

    Position ids are given, and plain (0, 1, 2, ... for every kind of token): with them M-RoPE is
    RoPE, which is what lets Megatron's GPT model host the same weights.
    """
    ids = torch.tensor([sample.prompt for sample in samples])
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    inputs = {"input_ids": ids, "position_ids": positions}
    pictures = [picture for sample in samples for picture in sample.pictures]
    if pictures:
        inputs.update(picture_inputs(pictures))
    return inputs
