"""The tiny model's language part in Megatron's GPT model, with the same weights.

The vision tower stays the Hugging Face module; its features take the place of the image tokens'
embeddings. Experts are spread over the expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLMoeForConditionalGeneration

from macs import Runtime
from megatron_macs import cpu_engine, with_macs

from .data import Sample
from .model import picture_inputs


class TinyVLM(GPTModel):
    """``GPTModel`` that puts pictures where the image tokens are.

    Within ``with model.pictures(features):`` the image tokens of a prompt, in the order of the
    batch, get the rows of features [P * 64, D] for embeddings.
    """

    image_token_id: int
    _features: Tensor | None = None

    @contextmanager
    def pictures(self, features: Tensor | None) -> Iterator[None]:
        self._features = features
        try:
            yield
        finally:
            self._features = None

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """input_ids and position_ids int64 [B, S]; the rest as in ``GPTModel``."""
        # Only prompts hold image tokens; a decoding step is one new token a sequence.
        if self.pre_process and self._features is not None and input_ids.shape[1] > 1:
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)  # [S, B, D]
            image = (input_ids == self.image_token_id)[..., None]
            embedded = embedded.transpose(0, 1).masked_scatter(image, self._features.to(embedded.dtype))
            kwargs["decoder_input"] = embedded.transpose(0, 1).contiguous()
        return super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)


@contextmanager
def joined() -> Iterator[None]:
    """In the process group and in Megatron's parallel groups, every rank with a part of the experts."""
    with nullcontext() if torch.cuda.is_available() else cpu_engine():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
        yield


def transformer_config(source: Any, **changes: Any) -> TransformerConfig:
    """Megatron's config of a Hugging Face ``Qwen3VLMoeTextConfig``; ``changes`` override it."""
    settings: dict[str, Any] = {
        "num_layers": source.num_hidden_layers,
        "hidden_size": source.hidden_size,
        "num_attention_heads": source.num_attention_heads,
        "num_query_groups": source.num_key_value_heads,
        "kv_channels": source.head_dim,
        "ffn_hidden_size": source.intermediate_size,
        "moe_ffn_hidden_size": source.moe_intermediate_size,
        "num_moe_experts": source.num_experts,
        "moe_router_topk": source.num_experts_per_tok,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "normalization": "RMSNorm",
        "layernorm_epsilon": source.rms_norm_eps,
        "qk_layernorm": True,
        "activation_func": functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": source.attention_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "attention_backend": AttnBackend.local,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }
    return TransformerConfig(**{**settings, **changes})


def build_megatron_model(
    source: Qwen3VLMoeForConditionalGeneration, runtime: Runtime | None, **changes: Any
) -> TinyVLM:
    """The language part of ``source`` in Megatron, with MACS (a runtime) or stock (none).

    Needs Megatron's parallel state. ``changes`` are fields of ``TransformerConfig``, such as
    ``expert_model_parallel_size``.
    """
    text = source.config.text_config
    config = transformer_config(text, **changes)
    spec = get_gpt_layer_local_spec(
        num_experts=text.num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=True,
        normalization="RMSNorm",
    )
    model = TinyVLM(
        config=config,
        transformer_layer_spec=spec if runtime is None else with_macs(spec, runtime),
        vocab_size=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=text.rope_parameters["rope_theta"],
        share_embeddings_and_output_weights=False,
        parallel_output=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    model.image_token_id = source.config.image_token_id
    copy_weights(source, model)
    return model.eval()


@torch.no_grad()
def copy_weights(source: Qwen3VLMoeForConditionalGeneration, target: GPTModel) -> None:
    """Copy the language part's weights; every parameter of ``target``, which may be one stage of a
    pipeline and one tensor-parallel part of it, must be written once."""
    text = source.config.text_config
    language = source.model.language_model
    written: set[str] = set()
    parameters = dict(target.named_parameters())

    def write(name: str, tensor: Tensor, dim: int | None = None) -> None:
        """``dim``: along which tensor parallelism divides it, if it does."""
        if dim is not None:
            expert = ".experts." in name
            tensor = tensor.chunk(tensor_parallel_size(expert), dim)[tensor_parallel_rank(expert)]
        if parameters[name].shape != tensor.shape:
            raise ValueError(
                f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}"
            )
        parameters[name].copy_(tensor)
        written.add(name)

    if target.pre_process:
        write("embedding.word_embeddings.weight", language.embed_tokens.weight, 0)
    if target.post_process:
        write("decoder.final_layernorm.weight", language.norm.weight)
        write("output_layer.weight", source.lm_head.weight, 0)
    for index, own in enumerate(target.decoder.layers):
        layer = language.layers[own.layer_number - 1]
        prefix = f"decoder.layers.{index}."
        attention, moe = layer.self_attn, layer.mlp
        write(prefix + "input_layernorm.weight", layer.input_layernorm.weight)
        write(prefix + "pre_mlp_layernorm.weight", layer.post_attention_layernorm.weight)
        write(prefix + "self_attention.q_layernorm.weight", attention.q_norm.weight)
        write(prefix + "self_attention.k_layernorm.weight", attention.k_norm.weight)
        write(prefix + "self_attention.linear_proj.weight", attention.o_proj.weight, 1)
        # Megatron keeps, for each key-value head, its queries, its key and its value together.
        groups = text.num_key_value_heads
        parts = [
            projection.weight.view(groups, -1, text.hidden_size)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        write(
            prefix + "self_attention.linear_qkv.weight",
            torch.cat(parts, dim=1).reshape(-1, text.hidden_size),
            0,
        )
        write(prefix + "mlp.router.weight", moe.gate.weight)
        for local, expert in enumerate(own.mlp.local_expert_indices):
            experts = prefix + f"mlp.experts.local_experts.{local}."
            # Each part has its share of the gates, then of the ups.
            halves = [
                half.chunk(tensor_parallel_size(True)) for half in moe.experts.gate_up_proj[expert].chunk(2)
            ]
            interleaved = torch.cat([part for pair in zip(*halves, strict=True) for part in pair])
            write(experts + "linear_fc1.weight", interleaved, 0)
            write(experts + "linear_fc2.weight", moe.experts.down_proj[expert], 1)
    missing = set(parameters) - written
    if missing:
        raise ValueError(f"copy_weights: nothing was written to {', '.join(sorted(missing))}")


def tensor_parallel_size(expert: bool) -> int:
    """Of the experts, or of everything else."""
    if expert:
        return parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_parallel_rank(expert: bool) -> int:
    """In the group of ``tensor_parallel_size``."""
    if expert:
        return parallel_state.get_expert_tensor_parallel_rank()
    return parallel_state.get_tensor_model_parallel_rank()


class PictureEncoder(nn.Module):
    """The Hugging Face vision tower: samples in, features of their pictures out."""

    def __init__(self, source: Qwen3VLMoeForConditionalGeneration) -> None:
        super().__init__()
        self.visual = source.model.visual

    @torch.inference_mode()
    def forward(self, samples: Sequence[Sample]) -> Tensor | None:
        """Features [P * 64, D] of the samples' pictures, in order; none if there is no picture."""
        pictures = [picture for sample in samples for picture in sample.pictures]
        if not pictures:
            return None
        inputs = picture_inputs(pictures)
        parameter = next(self.visual.parameters())
        pixels = inputs["pixel_values"].to(parameter)
        return self.visual(pixels, grid_thw=inputs["image_grid_thw"].to(parameter.device)).pooler_output
