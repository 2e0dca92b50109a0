"""What benchmarks and reports run: routings, shapes, policies.

Every source rank draws its own tokens. A recording of one's own traffic (``macs.Recording``) is replayed.

Shapes: T tokens of one source rank, D features, E experts, k experts a token, R ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from macs import IMAGE, TEXT, MACSConfig, Recording


@dataclass(frozen=True)
class Shape:
    """A MoE layer of gated experts, and the tokens of a rank."""

    hidden: int
    ffn: int
    experts: int
    top_k: int
    tokens: int


SHAPES = {
    # Small enough for two CPU cores, with the proportions of the real ones.
    "cpu": Shape(hidden=1024, ffn=512, experts=64, top_k=4, tokens=2048),
    "tiny": Shape(hidden=64, ffn=32, experts=16, top_k=2, tokens=256),
    "tiny-vlm": Shape(hidden=128, ffn=96, experts=16, top_k=2, tokens=2400),
    "qwen3-vl-30b-a3b": Shape(hidden=2048, ffn=768, experts=128, top_k=8, tokens=8192),
}


@dataclass(frozen=True)
class Batch:
    """What the router makes of one source rank's tokens: experts int64 [T, k], weights float32 [T, k],
    scores float32 [T, E], modality ids int8 [T]."""

    experts: Tensor
    weights: Tensor
    scores: Tensor
    ids: Tensor

    @property
    def logits(self) -> Tensor:
        """What a softmax router, weights normalised over its choice, must see to do the same. [T, E]"""
        return self.scores.clamp(min=1e-30).log()

    def first(self, count: int) -> Batch:
        """Of so many tokens."""
        return Batch(self.experts[:count], self.weights[:count], self.scores[:count], self.ids[:count])


Draw = Callable[[Shape, int, int, int, torch.Generator], Batch]
"""shape, step, rank, ranks, the stream of this workload, seed, step and rank -> a batch."""


def stream(workload: str, seed: int, step: int, rank: int) -> torch.Generator:
    """Random numbers of a source rank in a step."""
    digest = hashlib.sha256(f"{workload}|{seed}|{step}|{rank}".encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:8], 16))


# Text: picks of experts, with scores made up around them.


def _picked(shape: Shape, experts: Tensor, generator: torch.Generator) -> Batch:
    """Gates even in [0.5, 1) for the picks; every other expert scores less than the least of them."""
    experts = experts.sort(1).values
    gates = torch.rand(experts.shape, generator=generator) / 2 + 0.5
    below = torch.rand(len(experts), shape.experts, generator=generator) * gates.amin(1, keepdim=True) * 0.999
    scores = below.scatter(1, experts, gates)
    scores = scores / scores.sum(1, keepdim=True)
    kinds = torch.full((len(experts),), TEXT, dtype=torch.int8)
    return Batch(experts, gates / gates.sum(1, keepdim=True), scores, kinds)


def uniform(shape: Shape, step: int, rank: int, ranks: int, generator: torch.Generator) -> Batch:
    """Every expert alike, by chance."""
    return _picked(shape, _noise(shape, generator).topk(shape.top_k, 1).indices, generator)


def rotating(shape: Shape, step: int, rank: int, ranks: int, generator: torch.Generator) -> Batch:
    """Three tokens of four choose among a quarter of the experts, which is another one every three steps."""
    count = max(shape.top_k, shape.experts // 4)
    pool = (step // 3 * count + torch.arange(count)) % shape.experts
    hot = torch.arange(shape.tokens) % 4 != 0
    outside = torch.ones(shape.experts, dtype=torch.bool).index_fill(0, pool, False)
    draws = torch.rand(shape.tokens, shape.experts, generator=generator) + (hot[:, None] & outside)
    return _picked(shape, draws.topk(shape.top_k, 1, largest=False).indices, generator)


# Multimodal: scores are the softmax of noise and of what each modality's experts are worth to it.


def _scored(shape: Shape, kinds: Tensor, lean: Tensor, noise: Tensor) -> Batch:
    """lean, noise [T, E]: what every token likes beside chance, and chance."""
    scores = (lean + noise).softmax(1)
    weights, experts = scores.topk(shape.top_k, 1)
    experts, order = experts.sort(1)
    weights = weights.gather(1, order)
    return Batch(experts, weights / weights.sum(1, keepdim=True), scores, kinds.to(torch.int8))


def _noise(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape.tokens, shape.experts, generator=generator)


def _visual_experts(shape: Shape) -> Tensor:
    """The first quarter of the experts, bool [E]: neighbours, as a rank's experts are."""
    return torch.arange(shape.experts) < max(shape.top_k, shape.experts // 4)


def with_visual_share(share: float, lean: float = 0.8) -> Draw:
    """So large a share of visual tokens, which lean to the visual experts."""

    def draw(shape: Shape, step: int, rank: int, ranks: int, generator: torch.Generator) -> Batch:
        visual = torch.arange(shape.tokens) < round(share * shape.tokens)
        leaning = lean * visual[:, None] * _visual_experts(shape)
        return _scored(shape, torch.where(visual, IMAGE, TEXT), leaning, _noise(shape, generator))

    return draw


def _hot_rank(shape: Shape, step: int, rank: int, ranks: int, generator: torch.Generator) -> Batch:
    """Everyone leans to the last rank's experts, texts and the half that is pictures."""
    lean = 0.8 * (torch.arange(shape.experts) >= shape.experts - shape.experts // ranks)
    kinds = torch.where(torch.arange(shape.tokens) % 2 == 0, IMAGE, TEXT)
    return _scored(shape, kinds, lean.expand(shape.tokens, -1), _noise(shape, generator))


# As served: prompts and skew from published figures of production and of training.

TEXT_TOKENS = 572
"""Of a mean prompt to Qwen-VL in production (ServeGen, arXiv:2505.09999)."""

VISUAL_SHARES = 0.36, 0.76, 0.96
"""Visual tokens of a client's prompt tokens there: 10th percentile, median, 90th, by requests."""

VISUAL_TOKENS, IMAGE_TOKENS = 870, 405
"""Of a mean prompt, and of the median image there."""


def served(shape: Shape, step: int, rank: int, ranks: int, generator: torch.Generator) -> Batch:
    """Prompts of three clients in turn, of the sizes above. The popularity of an expert is normal by
    modality, the same on all ranks and in all steps; of 128 experts over 16 ranks the load is 2.8, as was
    measured in training (DeepSpeed#8213: 2.6 to 5.1)."""
    kinds = torch.full((shape.tokens,), TEXT)
    start = int(torch.randint(3, (), generator=generator)) * TEXT_TOKENS // 3
    number = 0
    while start < shape.tokens:
        share = VISUAL_SHARES[number % 3]
        visual = round(TEXT_TOKENS * share / (1 - share))
        kinds[start : start + visual] = IMAGE
        start, number = start + visual + TEXT_TOKENS, number + 1
    popularity = torch.randn(2, shape.experts, generator=stream("liked", 0, 0, 0)) * 1.2
    return _scored(shape, kinds, popularity[(kinds == IMAGE).long()], _noise(shape, generator))


WORKLOADS: dict[str, Draw] = {
    "uniform": uniform,
    "rotating": rotating,
    "image-flood": with_visual_share(0.9),
    "hot-rank": _hot_rank,
    "served": served,
}


def draw(workload: str, shape: Shape, step: int, rank: int, ranks: int, seed: int = 0) -> Batch:
    """What a source rank's router makes of a step."""
    if workload not in WORKLOADS:
        raise ValueError(f"workload: found {workload!r}, expected one of {', '.join(WORKLOADS)}")
    return WORKLOADS[workload](shape, step, rank, ranks, stream(workload, seed, step, rank))


def features(batch: Batch, size: int, step: int, rank: int, seed: int = 0) -> Tensor:
    """hidden float32 [T, D]: unit normal; a visual row is close to what all visual rows of a run have in
    common (background) or far from it, and flat or peaked, by a share drawn for it."""
    generator = stream("features", seed, step, rank)
    hidden = torch.randn(len(batch.ids), size, generator=generator)
    common = torch.randn(size, generator=stream("common", seed, 0, 0))
    own = torch.rand(len(hidden), 1, generator=generator)
    visual = own * hidden * 2 + (1 - own) * common
    return torch.where((batch.ids != TEXT)[:, None], visual, hidden)


def replay(recordings: Sequence[Recording], layer: int, tokens: int | None = None) -> list[list[Batch]]:
    """Batches [step][rank] of what real routers chose in a layer; scores that were not recorded are made
    up, below the least of the token's own. Steps of which some rank has no record are left out. With
    ``tokens``, all batches have so many, or as many as the shortest has."""
    records = [{one.step: one for one in recording.records if one.layer == layer} for recording in recordings]
    steps = sorted(set.intersection(*(set(one) for one in records)))
    if not steps:
        raise ValueError(f"recording: layer {layer} has no step that all {len(records)} files have")
    batches = []
    for step in steps:
        row = []
        for rank, by_step in enumerate(records):
            record = by_step[step]
            real = (record.experts >= 0).all(1)
            experts, order = record.experts[real].sort(1)
            weights = record.weights[real].gather(1, order)
            shape = Shape(0, 0, recordings[rank].num_experts, experts.shape[1], len(experts))
            batch = _picked(shape, experts, stream("replay", 0, step, rank))
            if record.scores is not None:
                scores = record.scores[real]
            else:
                # The others are to the least of the token's own as they would be among even gates.
                ratio = batch.scores / batch.scores.gather(1, experts).amin(1, keepdim=True)
                scores = (ratio * weights.amin(1, keepdim=True)).scatter(1, experts, weights)
            scores = functional.normalize(scores, p=1, dim=1)
            row.append(Batch(experts, weights, scores, record.modality[real]))
        batches.append(row)
    if tokens is None:
        return batches
    least = min(tokens, min(len(one.ids) for row in batches for one in row))
    return [[one.first(least) for one in row] for row in batches]


VANILLA = "vanilla"
NOTHING_OVER = "macs, nothing over"
LADDER = ("token drop", "expanded drop", "macs")
"""Titles that are run under further bounds as well, where some are asked for."""


@dataclass(frozen=True)
class Contender:
    """A policy and its settings."""

    policy: str
    config: MACSConfig


def contenders(load: float) -> dict[str, Contender]:
    """By title: baselines and MACS, all with the load held to ``load``, but for
    the presets that have a bound of their own and the one without any."""
    free: dict[str, Any] = {"min_tokens": 0}
    bound = {"target_load": load, **free}
    plain = MACSConfig(**bound)
    return {
        VANILLA: Contender("vanilla", plain),
        "token drop": Contender("token-drop", plain),
        "expanded drop": Contender("expanded-drop", plain),
        "rank-balanced": Contender("rank-balanced", plain),
        "paper": Contender("paper", plain),
        "macs": Contender("macs", MACSConfig(**bound)),
        "macs fast": Contender("macs", MACSConfig.preset("fast").updated(**free)),
        "macs safe": Contender("macs", MACSConfig.preset("safe").updated(**free)),
        NOTHING_OVER: Contender("macs", MACSConfig(capacity_factor=1e6, **free)),
    }


def loosened(title: str, contender: Contender, load: float) -> tuple[str, Contender]:
    """The same policy under another ``target_load``."""
    config = contender.config.updated(target_load=load)
    return f"{title} {load:g}", replace(contender, config=config)
