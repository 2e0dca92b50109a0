"""What a model answers, and what it makes of answers that are given: prompts are read once, under MACS.

Decoding steps are too small to be planned, so answers follow from a prompt's cache with MACS off. Shapes: B
requests of equal length (padded on the left), A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from macs import Runtime


@dataclass
class Prompt:
    """A batch that was read: the model's arguments, its cache, and what it says next, logits [B, V].

    shift: int64 [B, 1], what M-RoPE's positions behind the prompt have over the number of tokens; of other
    models None.
    """

    model: Any
    runtime: Runtime
    inputs: dict[str, Tensor]
    cache: Any
    logits: Tensor
    shift: Tensor | None

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def _step(self, ids: Tensor) -> Tensor:
        """Logits [B, A, V] behind the tokens ids [B, A], which the cache has from now on."""
        end = self.cache.get_seq_length() + ids.shape[1]
        mask = self.inputs.get("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        mask = torch.cat([mask, mask.new_ones(len(mask), end - self.length)], 1)
        positions = mask.cumsum(-1)[:, -ids.shape[1] :] - 1
        if self.shift is not None:  # behind a picture M-RoPE goes on from elsewhere
            positions = (positions + self.shift).expand(3, *ids.shape)
        given: dict[str, Any] = {"input_ids": ids, "past_key_values": self.cache, "use_cache": True}
        if "attention_mask" in self.inputs:
            given["attention_mask"] = mask
        given["position_ids"] = positions
        enabled, self.runtime.enabled = self.runtime.enabled, False
        try:
            return self.model(**given).logits
        finally:
            self.runtime.enabled = enabled

    def rewind(self) -> None:
        """Forget every token behind the prompt."""
        self.cache.crop(self.length - self.cache.get_seq_length())

    def greedy(self, tokens: int) -> Tensor:
        """The likeliest answer, token by token: ids [B, tokens]."""
        answer = [self.logits.argmax(-1, keepdim=True)]
        while len(answer) < tokens:
            answer.append(self._step(answer[-1])[:, -1].argmax(-1, keepdim=True))
        return torch.cat(answer, 1)

    def said_of(self, answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities that predict every token of the given answers, float32 [A, V] for each."""
        longest = max(map(len, answers))
        ids = torch.tensor(
            [[*one, *[0] * (longest - len(one))] for one in answers], device=self.logits.device
        )
        logits = self.logits[:, None]
        if longest > 1:
            logits = torch.cat([logits, self._step(ids[:, :-1])], 1)
        said = logits.float().log_softmax(-1)
        return [one[: len(answer)] for one, answer in zip(said, answers, strict=True)]


def read(model: Any, runtime: Runtime, inputs: dict[str, Tensor]) -> Prompt:
    """The prompts of a batch, read under what the runtime uses."""
    pictures = not inputs.keys().isdisjoint(("image_grid_thw", "video_grid_thw"))
    if not pictures and "attention_mask" in inputs and "position_ids" not in inputs:
        # A model by itself counts columns, padding included, where ``generate`` and ``_step`` count tokens.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        inputs = {**inputs, "position_ids": positions}
    outputs = model(**inputs, use_cache=True, logits_to_keep=1)
    shift = None
    if pictures:
        # Kept on the model since transformers 5.20, where a batch without a picture leaves it as it was.
        shift = getattr(model.base_model, "rope_deltas", None)
    if "position_ids" in inputs and inputs["position_ids"].dim() == 3:
        ahead = inputs["position_ids"][0, :, -1:] + 1
        shift = ahead - inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum(
            1, keepdim=True
        )
    return Prompt(model, runtime, inputs, outputs.past_key_values, outputs.logits[:, -1], shift)


def divergence(expected: Tensor, given: Tensor) -> float:
    """KL in nats of ``given`` from ``expected``, log-probabilities [A, V], mean over the answer's tokens."""
    return float((expected.exp() * (expected - given)).sum(-1).mean().clamp(min=0))
