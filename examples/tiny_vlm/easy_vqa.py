"""The public data set easy-vqa, in the tiny model's words: ``pip install easy-vqa`` (MIT, 3 MB).

5 000 pictures of one coloured shape each, 64 pixels a side, with 48 000 questions; the data set brings its
own train and test split. Of its training pictures every tenth is kept for validation.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from .pictures import PICTURE_SIZE
from .sample import PICTURE_PREFIX, Sample
from .vocabulary import END, FILLER, encode

TASKS = ("shape", "color", "is there")
QUESTION_TOKENS = 11  # shorter questions have filler in front


@dataclass(frozen=True)
class Shown:
    """A picture, uint8 [128, 128, 3], and its questions by task: token ids of question and answer."""

    pixels: np.ndarray
    questions: dict[str, list[tuple[list[int], list[int]]]]


def _task(answer: str) -> str:
    if answer in ("yes", "no"):
        return "is there"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def _asked(question: str, answer: str) -> tuple[list[int], list[int]]:
    ids = encode(question.lower().replace("?", " ?"))
    return encode(FILLER) * (QUESTION_TOKENS - len(ids)) + ids, encode(f"{answer} {END}")


@cache
def pictures(split: str) -> list[Shown]:
    """Every picture of the split with its questions."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("the data set is not installed; install it with: pip install easy-vqa") from error
    test = split == "test"
    asked = easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()
    paths = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
    questions: dict[int, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for question, answer, number in zip(*asked, strict=True):
        questions[number][_task(answer)].append(_asked(question, answer))
    found = []
    for number, by_task in sorted(questions.items()):
        if test or (number % 10 == 3) == (split == "validation"):
            with Image.open(paths[number]) as image:
                pixels = np.asarray(image.convert("RGB").resize((PICTURE_SIZE, PICTURE_SIZE)))
            found.append(Shown(pixels, dict(by_task)))
    return found


def draw_sample(rng: np.random.Generator, split: str, task: str) -> Sample:
    """One question of the task about a picture of the split."""
    available = pictures(split)
    while True:  # nearly every picture has questions of every task
        shown = available[rng.integers(len(available))]
        if task in shown.questions:
            question, answer = shown.questions[task][rng.integers(len(shown.questions[task]))]
            return Sample(task, PICTURE_PREFIX + question, answer, shown.pixels)
