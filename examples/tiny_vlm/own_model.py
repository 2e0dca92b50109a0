"""A Hugging Face checkpoint of one's own with its processor: questions in words about photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from macs_tools.common.requests import Question

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


class OwnExperiment(Experiment):
    """Photographs and texts for a model of one's own."""

    def questions(self, seed: int, split: str, count: int) -> list[Any]:
        shown = [Image.fromarray(pixels) for pixels in pictures.photographs(split)]
        found = []
        for number in range(count):
            if number % 4 == 3:
                found.append(Question(TEXT_QUESTIONS[number // 4 % len(TEXT_QUESTIONS)], None))
            else:
                question = PICTURE_QUESTIONS[number % len(PICTURE_QUESTIONS)]
                found.append(Question(question, shown[(seed + number) % len(shown)]))
        return found

    caution = ""

    def words(self, ids: Sequence[int]) -> str:
        return self.engine.words(ids)

    def own_question(self, picture: Path, question: str) -> Any:
        with Image.open(picture) as image:
            return Question(question, image.convert("RGB"))
