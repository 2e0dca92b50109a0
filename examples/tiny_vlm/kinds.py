"""Kinds of batches that the tiny models are asked: what tasks, how long the answers."""

from __future__ import annotations

import numpy as np

from . import data, easy_vqa
from .pictures import draw_picture

MIXES: dict[str, tuple[str, ...]] = {
    "mixed": data.TASKS,
    "image-flood": data.PICTURE_TASKS,
    "multi-image": data.PICTURE_TASKS,
    "text-heavy": (*data.TEXT_TASKS * 3, "count"),
    "texts": data.TEXT_TASKS,
    "easy-vqa": easy_vqa.TASKS,
    **{task: (task,) for task in (*data.TASKS, *data.HARD_TASKS)},
}
"""What a batch is made of: tasks in turn. In multi-image batches another picture comes first."""


def draw_batches(kind: str, split: str, seed: int, count: int, size: int) -> list[list[data.Sample]]:
    """``count`` batches of a kind, ``size`` questions each, all of one length."""
    samples = data.draw_samples(seed, split, MIXES[kind], count * size)
    if kind == "multi-image":
        rng = np.random.default_rng(seed)
        samples = [data.after_another(sample, draw_picture(rng, split)) for sample in samples]
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def answer_tokens(kind: str) -> int:
    """Tokens of the longest answer, with its end."""
    return data.READ_TOKENS if kind == "read" else data.ANSWER_TOKENS
