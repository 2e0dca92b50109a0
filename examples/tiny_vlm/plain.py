"""The tiny model as Hugging Face has it, asked and answering in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .data import ANSWER_TOKENS, Sample
from .model import sample_inputs
from .vocabulary import up_to_end


class Engine:
    """``generate``: prompts and pictures in, answers out, by greedy decoding with a cache.

    Every expert-parallel rank must call it equally often, with batches of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def inputs_of(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """The model's arguments for a batch of prompts, on its device."""
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in sample_inputs(samples).items()}

    @torch.inference_mode()
    def generate(self, samples: Sequence[Sample], tokens: int = ANSWER_TOKENS) -> list[list[int]]:
        """The answer to every sample: token ids up to and with the end token.

        Every answer takes ``tokens`` steps, so that ranks stay in step. Positions are plain, as in
        training; ``model.generate`` would make its own.
        """
        inputs = self.inputs_of(samples)
        device = inputs["input_ids"].device
        length, cache, answers = inputs["input_ids"].shape[1], None, []
        for step in range(tokens):
            outputs = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = outputs.past_key_values
            answers.append(outputs.logits[:, -1].argmax(-1, keepdim=True))
            position = torch.full((3, len(samples), 1), length + step, device=device)
            inputs = {"input_ids": answers[-1], "position_ids": position}
        return [up_to_end(ids) for ids in torch.cat(answers, 1).tolist()]
