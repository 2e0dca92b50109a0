"""The tiny model as Hugging Face has it, asked and answering in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from macs import Runtime
from macs_tools.common.answers import read

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
        answers = read(self.model, Runtime(), self.inputs_of(samples)).greedy(tokens)
        return [up_to_end(ids) for ids in answers.tolist()]
