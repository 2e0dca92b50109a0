"""Jobs for worker processes: Megatron's multimodal and hybrid models, and what their layers are told.

Encoders put out a constant for each modality, so that the tokens which reach the language model say
themselves what they are.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.megatron_llava import LLaVAEngine, build_llava_model, one_token_a_picture
from torch import Tensor, nn

import macs
from macs import Runtime
from megatron_macs import attach_modality, with_macs
from megatron_macs.installation import install
from support.cases import busy

from .megatron_jobs import layer_config, on_megatron
from .megatron_layouts import on_layout
from .plan_log import PlanLog

MARK = {macs.IMAGE: 1000.0, macs.VIDEO: 2000.0, macs.AUDIO: 3000.0}
VOCABULARY, LONGEST = 32, 64


class Watch:
    """What the layers of a runtime are told, and what the language model is really given."""

    def __init__(self, runtime: Runtime, language_model: nn.Module) -> None:
        self.tokens: list[macs.Tokens] = []
        self.given: list[Tensor] = []
        for layer in runtime.layers:
            layer.on_plan(lambda event: self.tokens.append(event.tokens))
        language_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.given.append(kwargs.get("decoder_input")), with_kwargs=True
        )

    def right(self) -> list[bool]:
        """For each layer's call, whether it was told what every token is; padding is all zeros."""
        found = []
        calls = len(self.tokens) // len(self.given)
        for call, tokens in enumerate(self.tokens):
            value = self.given[call // calls].flatten(0, 1).float()
            kinds = torch.zeros(len(value), dtype=torch.int8)
            for kind, mark in MARK.items():
                kinds[(value == mark).all(1)] = kind
            padding = (value == 0).all(1)
            found.append(
                torch.equal(tokens.modality[~padding], kinds[~padding])
                and torch.equal(tokens.valid, ~padding)
                and int((kinds > 0).sum()) > 0
            )
        return found


class Constant(nn.Module):
    """An encoder or a tower: whatever comes in, rows of one number come out."""

    class_token_len = 0

    def __init__(self, value: float, hidden: int) -> None:
        super().__init__()
        self.value, self.hidden = value, hidden

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((*x.shape[:2], self.hidden), self.value)


def language_config(**changes: Any) -> Any:
    return layer_config(
        "alltoall",
        4,
        2,
        **{
            "num_layers": 2,
            "attention_backend": AttnBackend.local,
            "perform_initialization": True,
            "attention_dropout": 0.0,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            **changes,
        },
    )


def local_spec(runtime: Runtime | None) -> Any:
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    return spec if runtime is None else with_macs(spec, runtime)


@on_layout
def llava_answers(layout: dict[str, Any], policy: str, settings: dict[str, Any], count: int) -> Any:
    """The tiny model's answers as a LLaVA model, through ``VLMInferenceWrapper``."""
    source = tiny.load_model()
    runtime = Runtime(busy(**settings), policy=policy)
    model = build_llava_model(
        source,
        runtime,
        expert_model_parallel_size=layout["ep"],
        pipeline_model_parallel_size=layout.get("pp", 1),
    )
    attach_modality(model)
    replica, replicas = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    samples = data.draw_samples(5, "test", data.TASKS, count)[replica::replicas]
    kinds: list[Any] = []
    for layer in runtime.layers:
        layer.on_plan(lambda event: kinds.append(event.tokens.modality))
    answers = LLaVAEngine(model).generate(samples)
    prompts = [kind for kind in kinds if len(kind) > 1]
    image = [torch.tensor(sample.prompt) == source.config.image_token_id for sample in samples]
    layers = len(runtime.layers)
    right = [torch.equal(prompts[i].bool(), image[i // layers]) for i in range(len(prompts))]
    return {"answers": answers, "right": right, "replica": replica, "replicas": replicas, "layers": layers}


@on_layout
def llava_stages(layout: dict[str, Any]) -> dict[str, Any]:
    """A prompt with a picture through a pipeline; stages after the first get no picture."""
    source = tiny.load_model()
    runtime = Runtime(busy(capacity_factor=0.8))
    model = build_llava_model(source, runtime, pipeline_model_parallel_size=layout["pp"])
    attach_modality(model)
    (sample,) = data.draw_samples(5, "test", ("count",), 1)
    ids = torch.tensor([one_token_a_picture(sample.prompt, model.image_token_index)])
    log, kinds = PlanLog(runtime), []
    for layer in runtime.layers:
        layer.on_plan(lambda event: kinds.append(event.tokens.modality.tolist()))
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
    return {
        "layers": len(runtime.layers),
        "kinds": kinds,
        "plans": [plan.experts.tolist() for plan in log.plans],
        "logits": output.tolist() if model.post_process else None,
    }


@on_megatron
def llava_of_many_tiles() -> dict[str, Any]:
    """Prompts with several pictures of several tiles, and with none; a cached step; bad calls."""
    source = tiny.load_model()
    runtime = Runtime(busy(min_tokens=0))
    model = build_llava_model(source, runtime)
    hidden = model.config.hidden_size
    model.vision_model = Constant(MARK[macs.IMAGE], hidden)
    model.img_seq_len = 5
    hook = attach_modality(model)
    watch = Watch(runtime, model.language_model)
    image = model.image_token_index
    ids = torch.arange(30, 48).view(3, 6)
    ids[0, 1], ids[0, 3], ids[1, 2] = image, image, image
    tiles = torch.tensor([2, 1, 3], dtype=torch.int)

    def run(**changes: Any) -> None:
        call = {"input_ids": ids, "num_image_tiles": tiles, "images": torch.zeros(6, 5, 1), **changes}
        model(position_ids=torch.arange(call["input_ids"].shape[1])[None], attention_mask=None, **call)

    run()
    lengths = [len(one.modality) for one in watch.tokens]
    model._language_max_sequence_length = 12  # cuts the end of the longest off
    run()
    cut = [len(one.modality) for one in watch.tokens[len(lengths) :]]
    errors = {}
    for name, changes in (
        ("tiles", {"num_image_tiles": tiles[:2]}),
        ("sizes", {"imgs_sizes": torch.ones(1, 2)}),
    ):
        try:
            found = hook.of_call({"input_ids": ids, **changes})
            errors[name] = found.reason
        except ValueError as error:
            errors[name] = str(error)
    cached = SimpleNamespace(key_value_memory_dict={"image_tokens_count": 5}, is_static_batching=lambda: True)
    step = hook.of_call({"input_ids": ids[:, -1:], "inference_context": cached})
    given = torch.ones(3, 12, dtype=torch.bool)
    with macs.modality(given):
        outer = hook.of_call({"input_ids": ids, "num_image_tiles": tiles})
    return {
        "right": watch.right(),
        "lengths": [one // 3 for one in lengths],
        "cut": [one // 3 for one in cut],
        "errors": errors,
        "cached": step.ids.tolist(),
        "outer": bool((outer.ids == 1).all()) and tuple(outer.ids.shape) == (3, 12),
    }


@on_megatron
def mimo_of_many_kinds(by: str) -> dict[str, Any]:
    """A model of text, pictures, film and sound, with MACS by ``with_macs`` or by ``install``."""
    config = language_config()
    runtime = Runtime(busy(min_tokens=0))
    ids_of = {"images": 28, "video_frames": 29, "audios": 30}
    kinds = {"images": macs.IMAGE, "video_frames": macs.VIDEO, "audios": macs.AUDIO}
    encoders = {
        name: ModuleSpec(
            module=AudioModalitySubmodules if name == "audios" else VisionModalitySubmodules,
            submodules={
                "encoders": {"one": ModuleSpec(module=Constant, params={"value": MARK[kind], "hidden": 16})}
            },
        )
        for name, kind in kinds.items()
    }
    language = ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
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
    if by == "install":
        undo = install(runtime)
        model = MimoModel(settings).eval()
        undo()
    else:
        model = MimoModel(settings).eval()
        attach_modality(model)
    watch = Watch(runtime, model.language_model)
    ids = torch.tensor([[1, 28, 28, 28, 2, 29, 29, 3], [4, 30, 5, 28, 28, 6, 7, 8]])
    counts = {name: int((ids == token).sum()) for name, token in ids_of.items()}
    inputs = {name: {"one": {"x": torch.zeros(1, count, 1)}} for name, count in counts.items()}
    model(input_ids=ids, position_ids=torch.arange(8).expand_as(ids), modality_inputs=inputs)
    odd = copy.copy(model)
    odd.special_token_ids = {"smell": 27, "images": 28}
    try:
        attach_modality(odd)
        error = ""
    except ValueError as found:
        error = str(found)
    return {"right": watch.right(), "layers": len(runtime.layers), "error": error}


@on_megatron
def hybrid_layers(by: str) -> dict[str, Any]:
    """A hybrid model, attention and MoE layers in turn, with MACS by ``with_macs`` or by ``install``."""
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
    return {
        "layers": [type(getattr(layer, "mlp", None)).__name__ for layer in model.decoder.layers],
        "visual": [float(report.visual.sum()) for report in runtime.reports()],
        "images": int((ids == 28).sum()),
    }
