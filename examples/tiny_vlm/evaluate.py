"""How well the Hugging Face model answers, and how unevenly it routes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import Sample
from .model import sample_inputs

BATCH = 70


def _with_answers(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Prompt and answer ids [B, S + A], and which of them are answers; short answers are padded."""
    longest = max(len(sample.answer) for sample in samples)
    rows = [sample.prompt + sample.answer + [0] * (longest - len(sample.answer)) for sample in samples]
    answers = torch.zeros(len(rows), len(rows[0]), dtype=torch.bool)
    for row, sample in enumerate(samples):
        answers[row, len(sample.prompt) : len(sample.prompt) + len(sample.answer)] = True
    return torch.tensor(rows), answers


@torch.inference_mode()
def accuracy_by_task(model: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the answers that greedy decoding gets wholly right.

    One forward pass over prompt and answer tells: greedy decoding gives the answer if and only if
    each of its tokens is the likeliest after the right ones before it.
    """
    device = next(model.parameters()).device
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        ids, answers = _with_answers(batch)
        inputs = {name: tensor.to(device) for name, tensor in sample_inputs(batch).items()}
        inputs["input_ids"] = ids.to(device)
        inputs["position_ids"] = torch.arange(ids.shape[1], device=device).expand(3, *ids.shape)
        logits = model(**inputs).logits[:, :-1].cpu()
        hits = (logits.argmax(-1) == ids[:, 1:]) | ~answers[:, 1:]
        for sample, hit in zip(batch, hits.all(1).tolist(), strict=True):
            right[sample.task].append(hit)
    return {task: round(sum(hits) / len(hits), 4) for task, hits in right.items()}


@torch.inference_mode()
def rank_imbalance(model: nn.Module, samples: Sequence[Sample], ranks: int) -> list[float]:
    """The load of each layer, with experts split contiguously."""
    device = next(model.parameters()).device
    config = model.config.text_config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        inputs = {name: tensor.to(device) for name, tensor in sample_inputs(batch).items()}
        outputs = model(**inputs, output_router_logits=True)
        for layer, logits in enumerate(outputs.router_logits):
            chosen = logits.topk(config.num_experts_per_tok, -1).indices
            counts[layer] += torch.bincount(chosen.flatten().cpu(), minlength=config.num_experts)
    loads = counts.view(config.num_hidden_layers, ranks, -1).sum(-1)
    return [round(value, 3) for value in (loads.amax(-1) / loads.mean(-1)).tolist()]
