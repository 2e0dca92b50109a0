"""Visual-token pruning of the tiny model: what MACS is held against.

Before the language model: the vision tower reads every picture, and only a share of its tokens goes on,
chosen at random, by distinctness of their features, or by the attention they get in the tower's last layer.
After layer k: chosen by the attention that the text behind a picture pays them in that layer (as FastV does,
arXiv:2403.06764), and gone from the next layer on. Kept tokens keep their positions.

Shapes: B prompts, S tokens, P pictures of V tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny_vlm.vocabulary import FILLER, IMAGE, VOCABULARY
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as modeling

BEFORE = "random", "distinct", "tower attention"
AFTER = "after layer 1", "after layer 2"


def kept_of(scores: Tensor, keep: float) -> Tensor:
    """The share of each picture's tokens with the highest scores: bool [P, V] for scores [P, V]."""
    count = max(1, round(keep * scores.shape[1]))
    chosen = scores.topk(count, 1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)


def _distinct(features: Tensor) -> Tensor:
    """Features [P, V, D] -> 1 minus the cosine to the picture's mean feature, [P, V]."""
    return 1 - functional.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)


@contextmanager
def watching_tower(model: Any) -> Iterator[dict[str, Any]]:
    """What enters the attention of the vision tower's last layer."""
    seen: dict[str, Any] = {}

    def look(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen["hidden"] = arguments[0] if arguments else named["hidden_states"]
        seen["position"] = named["position_embeddings"]

    attention = model.model.visual.blocks[-1].attn
    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _tower_attention(model: Any, seen: dict[str, Any], pictures: int) -> Tensor:
    """Mean attention that a token's patches get from all patches of their picture, [P, V]."""
    attention = model.model.visual.blocks[-1].attn
    rows = len(seen["hidden"])
    query, key, _ = attention.qkv(seen["hidden"]).view(rows, 3, attention.num_heads, -1).unbind(1)
    query, key = modeling.apply_rotary_pos_emb_vision(query, key, *seen["position"])
    query, key = (
        one.view(pictures, rows // pictures, *one.shape[1:]).transpose(1, 2) for one in (query, key)
    )
    paid = (query @ key.transpose(-1, -2) * attention.scaling).softmax(-1).mean((1, 2))
    return paid.view(pictures, -1, model.model.visual.spatial_merge_size**2).sum(-1)


class Pruned:
    """A batch whose pictures keep a share of their tokens before the language model.

    ``inputs`` are the model's arguments, padded on the left; inside ``applied()`` the model takes the
    features that are left.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], method: str, keep: float, seed: int) -> None:
        self.model = model
        ids = inputs["input_ids"]
        if "pixel_values" not in inputs:
            self.inputs = inputs
            return
        pictures = len(inputs["image_grid_thw"])
        with watching_tower(model) as seen:
            self.output = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        features = torch.stack(list(self.output.pooler_output))
        if method == "random":
            scores = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(seed))
        else:
            scores = _distinct(features) if method == "distinct" else _tower_attention(model, seen, pictures)
        kept = kept_of(scores, keep)
        self.output.pooler_output = tuple(one[chosen] for one, chosen in zip(features, kept, strict=True))
        stays = torch.ones_like(ids, dtype=torch.bool)
        stays[ids == VOCABULARY[IMAGE]] = kept.flatten()
        self.inputs = {**inputs, **shortened(ids, inputs["position_ids"], stays)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        if self.inputs.get("pixel_values") is None:
            yield
            return
        self.model.model.get_image_features = lambda *given, **named: self.output
        try:
            yield
        finally:
            del self.model.model.get_image_features


def shortened(ids: Tensor, positions: Tensor, stays: Tensor) -> dict[str, Tensor]:
    """The tokens that stay, bool [B, S], padded on the left: ids and mask [B, S'], positions [3, B, S']."""
    length = int(stays.sum(1).max())
    order = stays.long().argsort(dim=1, stable=True)[:, -length:]  # those that go come first
    mask = stays.gather(1, order)
    return {
        "input_ids": torch.where(mask, ids.gather(1, order), VOCABULARY[FILLER]),
        "attention_mask": mask.long(),
        "position_ids": torch.stack([one.gather(1, order) for one in positions]),
    }


class AfterLayer:
    """Hooks by which visual tokens vanish after layer k: no later layer attends to them. What their own rows
    compute there is not seen by any other token; ``stays`` [B, S] says which rows count."""

    def __init__(self, model: Any, after: int, keep: float) -> None:
        self.layers, self.after, self.keep = model.model.language_model.layers, after, keep
        self.stays: Tensor | None = None
        self.ids = torch.empty(0)
        self._handles = [
            self.layers[after - 1].self_attn.register_forward_pre_hook(self._choose, with_kwargs=True),
            *(
                layer.self_attn.register_forward_pre_hook(self._hide, with_kwargs=True)
                for layer in self.layers[after:]
            ),
        ]

    def begin(self, ids: Tensor) -> None:
        """A new batch of prompts, ids [B, S]."""
        self.ids, self.stays = ids, None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _choose(self, module: Any, _: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.stays is not None or not (self.ids == VOCABULARY[IMAGE]).any():
            return
        hidden, shape = named["hidden_states"], (*self.ids.shape, -1, module.head_dim)
        query = module.q_norm(module.q_proj(hidden).view(shape)).transpose(1, 2)
        key = module.k_norm(module.k_proj(hidden).view(shape)).transpose(1, 2)
        query, key = modeling.apply_rotary_pos_emb(query, key, *named["position_embeddings"])
        key = modeling.repeat_kv(key, module.num_key_value_groups)
        logits = query @ key.transpose(-1, -2) * module.scaling
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        paid = logits.masked_fill(future, float("-inf")).softmax(-1).mean(1)  # [B, S, S]
        visual = self.ids == VOCABULARY[IMAGE]
        behind = visual.flip(1).cumsum(1).flip(1) == 0  # text behind the last picture
        scores = (paid * behind[..., None]).sum(1)
        self.stays = torch.ones_like(visual)
        pictures = visual.any(1)
        chosen = kept_of(scores[visual].view(int(pictures.sum()), -1), self.keep)
        self.stays[visual] = chosen.flatten()

    def _hide(self, module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self.stays is None:
            return None
        rows = named["hidden_states"].shape[1]
        cache = named.get("past_key_values", named.get("cache"))  # its name since transformers 5.24
        before = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        allowed = torch.ones(rows, before + rows, dtype=torch.bool).tril(before)
        shown = functional.pad(self.stays, (0, before + rows - self.stays.shape[1]), value=True)
        # A token that is gone sees itself: a row that sees nothing would be NaN.
        own = torch.arange(rows)[:, None] + before == torch.arange(before + rows)
        named["attention_mask"] = ((allowed & shown[:, None]) | own)[:, None]
        return given, named
