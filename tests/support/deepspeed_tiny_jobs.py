"""Jobs for worker processes: the trained tiny model under DeepSpeed, on real pictures and texts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.vocabulary import FILLER, VOCABULARY
from torch import Tensor

import deepspeed_macs
from support.cases import BUSY

from .deepspeed_jobs import on_deepspeed

FILL = VOCABULARY[FILLER]


def tiny_engine(block: dict[str, Any]) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {"enabled": True, "autoep_size": dist.get_world_size()},
        "macs": block,
    }
    engine = deepspeed_macs.initialize(model=tiny.load_model(), config=config)[0]
    engine.eval()
    return engine


def padded_inputs(samples: list[data.Sample], lengths: list[int]) -> dict[str, Tensor]:
    """As a processor would make them: prompts cut to their last tokens, padded on the left."""
    longest = max(lengths)
    inputs = tiny.sample_inputs(samples)
    del inputs["position_ids"]
    rows = []
    for sample, length in zip(samples, lengths, strict=True):
        words = [token for token in sample.prompt if token != FILL]
        rows.append(([FILL] * longest + words)[-longest:] if sample.pixels is not None else words[-length:])
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[FILL] * (longest - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    real &= ids != FILL
    image = tiny.build_config().image_token_id
    kinds = (ids == image).long()
    return {**inputs, "input_ids": ids, "attention_mask": real, "mm_token_type_ids": kinds}


@on_deepspeed
def generated(policy: str, settings: dict[str, Any], use_types: bool) -> dict[str, Any]:
    """``generate()`` of left-padded batches of pictures and texts, of another length on every rank."""
    rank = dist.get_rank()
    samples = data.draw_samples(5, "test", ("where", "arithmetic", "recall", "count"), 4)
    inputs = padded_inputs(samples, [100, 20 + 5 * rank, 30, 100])
    steps = {"min_new_tokens": 3 + 2 * rank, "max_new_tokens": 3 + 2 * rank}  # ranks stop at different ones
    expected = tiny.load_model().generate(**inputs, **steps, do_sample=False)
    engine = tiny_engine({**BUSY, "policy": policy, **settings})
    seen: list[Any] = []
    engine.macs.layers[0].on_plan(lambda event: seen.append(event.tokens))
    if not use_types and inputs["pixel_values"] is not None:
        # Without a processor's kinds the ids tell; the model needs positions of its own then.
        ids = inputs["input_ids"]
        expected = None
        del inputs["mm_token_type_ids"]
        positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        engine(**inputs, position_ids=positions, use_cache=False)
        found = None
    else:
        found = engine.module.generate(
            **inputs, **steps, do_sample=False, synced_gpus=dist.get_world_size() > 1
        )
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    image = engine.module.config.image_token_id
    first = seen[0]
    return {
        "same": found is None or torch.equal(found, expected),
        "kinds": torch.equal(first.modality.view(ids.shape) == 1, ids == image),
        "valid": torch.equal(first.valid.view(ids.shape), real.bool()),
        "pictures": int((ids == image).any(1).sum()),
        "padding": int((real == 0).sum()),
        "later": [(len(one.modality), int(one.modality.sum()), bool(one.valid.all())) for one in seen[1:]],
        "planned": engine.macs.reports()[0].planned.tolist(),
    }
