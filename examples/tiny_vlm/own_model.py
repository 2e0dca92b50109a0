"""A Hugging Face checkpoint of one's own with its processor: questions in words about photographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from . import pictures
from .experiment import Experiment

PICTURE_QUESTIONS = (
    "Describe this picture.",
    "What is in the foreground, and what is behind it?",
    "Which colours do you see?",
)
TEXT_QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
)


@dataclass(frozen=True)
class Request:
    """A question in words, perhaps about a picture; nobody knows the right answer."""

    text: str
    picture: Image.Image | None
    task: str = ""
    answer: None = None


class ProcessorEngine:
    """``generate`` of a model with a processor: chat template, left padding, a cache."""

    def __init__(self, model: Any, processor: Any, tokens: int) -> None:
        self.model, self.processor, self.tokens = model, processor, tokens
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def inputs_of(self, samples: Sequence[Request]) -> dict[str, torch.Tensor]:
        """The model's arguments for a batch of prompts."""
        conversations = []
        for sample in samples:
            content: list[dict[str, Any]] = [{"type": "text", "text": sample.text}]
            if sample.picture is not None:
                content.insert(0, {"type": "image", "image": sample.picture})
            conversations.append([{"role": "user", "content": content}])
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return {
            name: tensor.to(self.model.device, self.model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }

    @torch.inference_mode()
    def generate(self, samples: Sequence[Request], tokens: int | None = None) -> list[list[int]]:
        """Greedy answers of equally many tokens, so that ranks stay in step."""
        tokens = self.tokens if tokens is None else tokens
        inputs = self.inputs_of(samples)
        answers = self.model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
        )
        return answers[:, inputs["input_ids"].shape[1] :].tolist()

    def words(self, ids: Sequence[int]) -> str:
        """An answer as text."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)


class OwnExperiment(Experiment):
    """Photographs and texts for a model of one's own."""

    def questions(self, seed: int, split: str, count: int) -> list[Any]:
        shown = [Image.fromarray(pixels) for pixels in pictures.photographs(split)]
        found = []
        for number in range(count):
            if number % 4 == 3:
                found.append(Request(TEXT_QUESTIONS[number // 4 % len(TEXT_QUESTIONS)], None))
            else:
                question = PICTURE_QUESTIONS[number % len(PICTURE_QUESTIONS)]
                found.append(Request(question, shown[(seed + number) % len(shown)]))
        return found

    caution = ""

    def own_question(self, picture: Path, question: str) -> Any:
        with Image.open(picture) as image:
            return Request(question, image.convert("RGB"))
