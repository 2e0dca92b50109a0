"""Jobs for worker processes: the tiny model in Megatron."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.utils import get_attention_mask
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.megatron_engine import Engine

from macs import Runtime
from macs.adapters import current_modality
from megatron_macs import attach_modality
from support.cases import busy

from .megatron_jobs import on_megatron


def samples_of(tasks: tuple[str, ...], count: int) -> list[data.Sample]:
    return data.draw_samples(5, "test", tasks, count)


@on_megatron
def logits_differ_by(tasks: tuple[str, ...], dispatcher: str) -> list[float]:
    """Largest difference of Megatron's logits from Hugging Face's: stock, and MACS with room."""
    source = tiny.load_model()
    samples = samples_of(tasks, 14)[dist.get_rank() :: dist.get_world_size()]
    expected = source(**tiny.sample_inputs(samples)).logits
    ids = torch.tensor([sample.prompt for sample in samples])
    found = []
    for runtime in (None, Runtime(busy(capacity_factor=1e6))):
        model = build_megatron_model(
            source,
            runtime,
            expert_model_parallel_size=dist.get_world_size(),
            moe_token_dispatcher_type=dispatcher,
        )
        if runtime is not None:
            attach_modality(model, image_token_id=source.config.image_token_id)
        with model.pictures(PictureEncoder(source)(samples)):
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            logits = model(ids, positions, get_attention_mask(ids.shape[1]))
        found.append(float((logits - expected).abs().max()))
    return found


@on_megatron
def engine_answers(policy: str, settings: dict[str, Any], count: int) -> dict[str, Any]:
    """Answers of Megatron's engine, what Hugging Face's greedy decoding says, and prompt steps."""
    source = tiny.load_model()
    runtime = Runtime(busy(**settings), policy=policy)
    model = build_megatron_model(source, runtime, expert_model_parallel_size=dist.get_world_size())
    attach_modality(model, image_token_id=source.config.image_token_id)
    samples = samples_of(data.TASKS, count)[dist.get_rank() :: dist.get_world_size()]
    answers = Engine(model, PictureEncoder(source), len(samples)).generate(samples)
    ids = torch.tensor([sample.prompt for sample in samples])
    greedy: list[list[int]] = [[] for _ in samples]
    inputs = tiny.sample_inputs(samples)
    for _ in range(data.ANSWER_TOKENS):
        inputs["input_ids"] = ids
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        following = source(**inputs).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], 1)
        for answer, token in zip(greedy, following.tolist(), strict=True):
            if not answer or answer[-1] != 2:
                answer.append(token)
    report = runtime.reports(dist.group.WORLD)[0]
    return {
        "answers": answers,
        "greedy": greedy,
        "right": sum(answer == sample.answer for answer, sample in zip(answers, samples, strict=True)),
        "steps": report.tokens.tolist(),
        "planned": report.planned.tolist(),
        "prefill": [float(report.prefill.tokens.sum()), len(report.prefill.records)],
    }


@on_megatron
def plan_of_real_pictures(virtual_ranks: int) -> list[Any]:
    """Plans of every layer for the same pictures on one process or on several."""
    source = tiny.load_model()
    runtime = Runtime(busy(min_tokens=0), virtual_ranks=virtual_ranks)
    model = build_megatron_model(source, runtime, expert_model_parallel_size=dist.get_world_size())
    attach_modality(model, image_token_id=source.config.image_token_id)
    samples = samples_of(data.TASKS, 12)
    share = len(samples) // dist.get_world_size()
    samples = samples[dist.get_rank() * share :][:share]
    plans = []
    runtime.layers[0].on_plan(lambda event: plans.append(event.plan))
    ids = torch.tensor([sample.prompt for sample in samples])
    with model.pictures(PictureEncoder(source)(samples)):
        model(ids, torch.arange(ids.shape[1]).expand_as(ids), get_attention_mask(ids.shape[1]))
    assert current_modality() is None
    shape = (ids.shape[1], len(samples), -1)
    return [plans[0].experts.view(shape).transpose(0, 1).tolist(), float(plans[0].statistics.rerouted)]
