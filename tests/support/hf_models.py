"""Tiny, randomly initialised models of the Hugging Face classes that AutoEP replaces MoE blocks in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from macs import MACSConfig, Runtime, attach_modality, attach_plain

VOCABULARY, IMAGE_TOKEN = 64, 5

SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "max_position_embeddings": 128}
SIZES |= {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
DEEPSEEK = {**SIZES, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
DEEPSEEK |= {"v_head_dim": 8, "head_dim": 4, "intermediate_size": 24, "moe_intermediate_size": 12}
DEEPSEEK |= {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
GLM = {**DEEPSEEK, "head_dim": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
GROUPS = {"n_group": 4, "topk_group": 2}
QWEN = {**SIZES, "intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 8, "head_dim": 8}
LINEAR = {f"linear_{one}_head_dim": 8 for one in ("key", "value")}
LINEAR |= {f"linear_num_{one}_heads": 2 for one in ("key", "value")}
FULL = {"layer_types": ["full_attention", "full_attention"]}
QWEN_3_5 = {**QWEN, **LINEAR, **FULL, "shared_expert_intermediate_size": 12}
MINIMAX = {**SIZES, **FULL, "head_dim": 8, "rotary_dim": 4, "intermediate_size": 12, "num_local_experts": 8}
MINIMAX |= {"dense_intermediate_size": 24, "shared_intermediate_size": 12, "mlp_layer_types": ["sparse"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
TOWER |= {"patch_size": 4}
QWEN_TOWER = {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": []}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
AUDIO |= {"num_mel_bins": 8, "output_dim": 16, "downsample_hidden_size": 8}
TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 6}


def over(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A multimodal model's settings, over those of its text model and its tower."""
    return {"text_config": text, "vision_config": vision, **TOKENS, **more}


QWEN_VL = over({**QWEN, "rope_parameters": {**ROPE, "mrope_interleaved": True}}, QWEN_TOWER)
INTERNVL = over(
    {**QWEN, "model_type": "qwen3_moe", "norm_topk_prob": True},
    {**VISION, "image_size": [8, 8], "patch_size": [4, 4]},
)
del INTERNVL["video_token_id"]

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**SIZES, "intermediate_size": 12, "num_local_experts": 8}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe, weights not normalised": ("qwen3_moe", {**QWEN, "norm_topk_prob": False}),
    "qwen3_5_moe": ("qwen3_5_moe_text", QWEN_3_5),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v2, limited groups": (
        "deepseek_v2",
        {**DEEPSEEK, **GROUPS, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, **GROUPS}),
    "glm4_moe": ("glm4_moe", GLM),
    "glm4v_moe": (
        "glm4v_moe",
        over({**GLM, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}, TOWER),
    ),
    "minimax_m3": ("minimax_m3_vl_text", MINIMAX),
    "qwen3_5_moe, multimodal": ("qwen3_5_moe", over(QWEN_3_5, QWEN_TOWER)),
    "minimax_m3, multimodal": ("minimax_m3_vl", over(MINIMAX, {**VISION, "patch_size": 4})),
    "qwen3_vl_moe": ("qwen3_vl_moe", QWEN_VL),
    "internvl": ("internvl", INTERNVL),
    "kimi": (
        "kimi_k25",
        over({**DEEPSEEK, **GROUPS, "model_type": "deepseek_v3"}, {**VISION, "patch_size": 4}),
    ),
    "qwen3_omni": ("qwen3_omni_moe_thinker", {**QWEN_VL, "audio_config": AUDIO, "audio_token_id": 4}),
}
MULTIMODAL = [name for name, (_, settings) in CONFIGS.items() if "text_config" in settings]


def build(name: str) -> nn.Module:
    """The model, float32, the same weights every time, its routers uneven."""
    kind, settings = CONFIGS[name]
    config = CONFIG_MAPPING[kind](**settings)
    torch.manual_seed(0)
    maker = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    model = maker.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith("e_score_correction_bias"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
            elif ".mlp." in path and tensor.dim() > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 3)
    return model.eval()


def token_ids(rank: int, rows: int = 3, length: int = 12) -> Tensor:
    """Ids [B, S] of a rank, about half of them the image token."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(7, VOCABULARY, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.5, IMAGE_TOKEN, ids)


IDS = token_ids(0, rows=4, length=24)
TIGHT = {"target_load": 0.7, "min_tokens": 0}


def moe_blocks(model):
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]


def served(name="qwen3_moe", ranks=2, config=None):
    """A model that plans and reads its mask, and its runtime."""
    model, runtime = build(name), Runtime(config or MACSConfig(**TIGHT), virtual_ranks=ranks)
    attach_plain(model, runtime)
    attach_modality(model, image_token_id=IMAGE_TOKEN)
    return model, runtime


def save_llava(folder: str) -> None:
    """A checkpoint directory of a random LLaVA with a Qwen3-MoE inside, and its processor."""
    from tiny_vlm.vocabulary import build_tokenizer
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        text_config={**QWEN, "model_type": "qwen3_moe", "vocab_size": len(tokenizer), "norm_topk_prob": True},
        vision_config={**VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{% for part in message.content %}"
            "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
            "{% endfor %}{% endfor %}"
        ),
    ).save_pretrained(folder)
