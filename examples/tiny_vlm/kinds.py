"""Kinds of batches that the tiny models are asked: what tasks, how long the answers."""

from __future__ import annotations

from . import data, easy_vqa

MIXES: dict[str, tuple[str, ...]] = {
    "mixed": data.TASKS,
    "image-flood": data.PICTURE_TASKS,
    "texts": data.TEXT_TASKS,
    "easy-vqa": easy_vqa.TASKS,
    **{task: (task,) for task in (*data.TASKS, *data.HARD_TASKS)},
}
"""What a batch is made of: tasks in turn."""


def draw_batches(kind: str, split: str, seed: int, count: int, size: int) -> list[list[data.Sample]]:
    """``count`` batches of a kind, ``size`` questions each, all of one length."""
    samples = data.draw_samples(seed, split, MIXES[kind], count * size)
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def answer_tokens(kind: str) -> int:
    """Tokens of the longest answer, with its end."""
    return data.READ_TOKENS if kind == "read" else data.ANSWER_TOKENS
