"""Time of a whole prefill on one of the expert-parallel ranks: vision encoder, attention, MoE, exchange.

Attention and the vision encoder are data-parallel, experts expert-parallel; nothing overlaps. A step has P
prompts a rank, each of t text and v visual tokens: T = P (t + v) tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..common.cost_model import at_load
from ..common.workloads import IMAGE_TOKENS, TEXT_TOKENS, VISUAL_TOKENS, Shape
from .machine import MEMORY_GBS, engine_figures, machine

HEAD = 128  # features of an attention head, in all of these models


@dataclass(frozen=True)
class Vision:
    """A vision transformer; ``merged`` patches become one visual token; ``mergers`` project them."""

    depth: int = 27
    hidden: int = 1152
    ffn: int = 4304
    merged: int = 4
    mergers: int = 1


@dataclass(frozen=True)
class Model:
    """A multimodal MoE model as its published config states it; ``shared`` experts see every token."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    experts: int
    top_k: int
    vocabulary: int
    shared: int = 0
    dense: int = 0
    dense_ffn: int = 0
    vision: Vision = Vision()

    def shape(self, tokens: int) -> Shape:
        return Shape(self.hidden, self.ffn, self.experts, self.top_k, tokens)


MODELS = {
    "qwen3-vl-30b-a3b": Model(48, 2048, 32, 4, 768, 128, 8, 151936, vision=Vision(mergers=4)),
    "qwen3-vl-235b-a22b": Model(94, 4096, 64, 4, 1536, 128, 8, 151936, vision=Vision(mergers=4)),
    "kimi-vl-a3b": Model(27, 2048, 16, 16, 1408, 64, 6, 163840, shared=2, dense=1, dense_ffn=11264),
    "deepseek-vl2": Model(30, 2560, 32, 32, 1536, 72, 6, 129280, shared=2, dense=1, dense_ffn=12288),
}
"""DeepSeek's latent attention is taken as attention of as many heads, which is what a prefill computes."""


@dataclass(frozen=True)
class Prompts:
    """What a rank reads in a step; ``images`` of a prompt share its visual tokens."""

    count: float
    text: int
    visual: int
    images: int = 1

    @property
    def length(self) -> int:
        return self.text + self.visual

    @property
    def tokens(self) -> int:
        return round(self.count * self.length)

    def pruned(self, keep: float) -> Prompts:
        """With so large a share of the visual tokens, dropped behind the vision encoder."""
        return replace(self, visual=round(keep * self.visual))


def served_prompts(tokens: int) -> Prompts:
    """Mean prompts of production traffic, of so many tokens a rank together."""
    count = tokens / (TEXT_TOKENS + VISUAL_TOKENS)
    return Prompts(count, TEXT_TOKENS, VISUAL_TOKENS, round(VISUAL_TOKENS / IMAGE_TOKENS))


@dataclass(frozen=True)
class Prefill:
    """Milliseconds of a step, by part."""

    vision: float
    attention: float
    moe: float
    exchange: float
    planning: float = 0.0

    @property
    def total(self) -> float:
        """Time to the first token, of a step that begins at once."""
        return self.vision + self.attention + self.moe + self.exchange + self.planning


@dataclass(frozen=True)
class Machine:
    """GPUs under an engine, for a model."""

    gpu: str
    engine: str
    model: Model
    dtype: str = "bf16"

    @property
    def figures(self) -> dict[str, Any]:
        return engine_figures(self.gpu, self.engine)

    def gemm_ms(self, rows: float, out: float, into: float, dtype: str | None = None) -> float:
        dtype = self.dtype if dtype is None else dtype
        constant, work, moved = self.figures["gemm"][dtype]
        size = 2 if dtype == "bf16" else 1
        moved_bytes = size * (rows * into + out * into) + 2 * rows * out
        return float(constant + work * 2 * rows * out * into + moved * moved_bytes)

    def memory_ms(self, moved: float) -> float:
        """Of elementwise operations, at 0.8 of the stated memory speed (guessed)."""
        return moved / (0.8 * MEMORY_GBS[self.gpu] * 1e6)

    def vision_ms(self, prompts: Prompts) -> float:
        """Of the vision encoder, in bfloat16."""
        vision, images = self.model.vision, prompts.count * prompts.images
        patches = prompts.visual * vision.merged / prompts.images
        rows, wide = images * patches, vision.hidden
        if not rows:
            return 0.0
        constant, work, moved = self.figures["encoder_attention"]
        layer = constant + work * 4 * rows * patches * wide + moved * 8 * rows * wide
        for out, into in ((3 * wide, wide), (wide, wide), (vision.ffn, wide), (wide, vision.ffn)):
            layer += self.gemm_ms(rows, out, into, "bf16")
        layer += self.memory_ms(16 * rows * wide)
        merged, joined = rows / vision.merged, vision.merged * wide
        merger = self.gemm_ms(merged, joined, joined, "bf16")
        merger += self.gemm_ms(merged, self.model.hidden, joined, "bf16")
        return float(vision.depth * layer + vision.mergers * merger)

    def attention_ms(self, prompts: Prompts) -> float:
        """Of all that is neither routed experts nor their exchange, in all layers."""
        model, tokens = self.model, prompts.tokens
        constant, work, moved = self.figures["attention"]
        layer = constant + work * 2 * tokens * prompts.length * model.heads * HEAD
        layer += moved * 4 * tokens * HEAD * (model.heads + model.kv_heads)
        layer += self.gemm_ms(tokens, (model.heads + 2 * model.kv_heads) * HEAD, model.hidden)
        layer += self.gemm_ms(tokens, model.hidden, model.heads * HEAD)
        layer += self.memory_ms(tokens * (16 * model.hidden + 4 * HEAD * (model.heads + model.kv_heads)))

        def gated(ffn: int) -> float:
            return self.gemm_ms(tokens, 2 * ffn, model.hidden) + self.gemm_ms(tokens, model.hidden, ffn)

        moe = self.gemm_ms(tokens, model.experts, model.hidden, "bf16")
        moe += gated(model.shared * model.ffn) if model.shared else 0.0
        dense = gated(model.dense_ffn) if model.dense else 0.0
        head = self.gemm_ms(prompts.count, model.vocabulary, model.hidden, "bf16")
        return model.layers * layer + (model.layers - model.dense) * moe + model.dense * dense + head

    def prefill(
        self,
        prompts: Prompts,
        ranks: int,
        load: float,
        limit: float | None = None,
        rank: int = 0,
        encoded: Prompts | None = None,
    ) -> Prefill:
        """Of a step whose router gives one rank ``load`` times the mean.

        limit: MACS's; what is over it is dropped. rank: of its compensation, 0 for none. encoded: what the
        vision encoder reads, where pruning comes behind it.
        """
        model, tokens = self.model, prompts.tokens
        costs = machine(self.gpu, self.engine, model.shape(tokens), self.dtype)
        requested = at_load(model.shape(tokens), ranks, load, tokens)
        planning = 0.0
        if limit is not None:
            by_rank = requested.reshape(ranks, ranks, -1)  # source, destination, expert
            mean = tokens * model.top_k / ranks  # of a destination, from each source
            rows = by_rank.sum(2, keepdims=True)
            kept = np.minimum(limit * mean / np.maximum(rows, 1e-9), 1)
            requested = (by_rank * kept).reshape(requested.shape)
            planning = costs.planning_ms("macs", tokens) + (costs.sharing_ms if limit >= 1 else 0.0)
        if rank:
            columns = 2 * model.experts * (1 + rank)  # of text and of visual tokens
            planning += self.gemm_ms(tokens, columns, model.hidden, "bf16") + 2 * costs.launch_ms
            planning += self.memory_ms(2 * tokens * (2 * columns + 4 * model.hidden))
        layers = model.layers - model.dense
        found = costs.layer(requested, tokens=tokens)
        return Prefill(
            vision=self.vision_ms(prompts if encoded is None else encoded),
            attention=self.attention_ms(prompts),
            moe=layers * (found.source + found.experts),
            exchange=layers * found.exchange,
            planning=layers * planning,
        )
