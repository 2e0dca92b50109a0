"""How well the Hugging Face model answers, and how unevenly it routes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from .data import Sample
from .model import sample_inputs
from .plain import Engine

BATCH = 70


@torch.inference_mode()
def accuracy_by_task(model: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the answers that greedy decoding gets wholly right."""
    engine = Engine(model)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        answers = engine.generate(batch, max(len(sample.answer) for sample in batch))
        for sample, answer in zip(batch, answers, strict=True):
            right[sample.task].append(answer == sample.answer)
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
