"""Batches to train the tiny model on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import data, easy_vqa
from .pictures import SMALL, Picture, draw_dense_picture, draw_picture
from .vocabulary import FILLER, IMAGE, encode

IGNORE = data.IGNORE  # label of a position that is not learned from
TURNS = (*data.PICTURE_TASKS, "where", "exists", "where", "sum", "exists")
"""What is asked about every picture in training."""
SEQUENCE_TOKENS = 157  # of the longest row


@dataclass(frozen=True)
class TrainingBatch:
    """B sequences of S tokens, showing P pictures in the order of their rows.

    ids, labels  int64 [B, S]    positions int64 [B, S]    attends bool [B, S, S]
    patches      int64 [B, S]    what an image token itself should say it shows: a digit or "none"
    pixels       uint8 [P, 128, 128, 3]
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    attends: np.ndarray
    patches: np.ndarray
    pixels: np.ndarray


@dataclass
class _Row:
    """A prefix and several *independent* turns of question and answer.

    Every turn sees the prefix and itself only, at the positions it would have if it stood alone, so
    training sees exactly what a prompt with a single question looks like.
    """

    prefix: list[int]
    turns: list[tuple[list[int], list[int]]]  # ids and labels
    pictures: Sequence[Picture] = ()
    pixels: list[np.ndarray] = field(default_factory=list)

    def arrays(self, tokens: int) -> tuple[np.ndarray, ...]:
        """ids, labels, positions [S], attends [S, S] and patches [S], filled up to ``tokens``."""
        named = np.array(encode("0 1 2 3 4 5 6 7 8 9 none"))  # -1 is the last
        ids, labels = list(self.prefix), [IGNORE] * len(self.prefix)
        positions, block = list(range(len(ids))), [0] * len(ids)
        for number, (turn, turn_labels) in enumerate(self.turns, 1):
            positions += range(len(self.prefix), len(self.prefix) + len(turn))
            block += [number] * len(turn)
            ids, labels = ids + turn, labels + turn_labels
        spare = tokens - len(ids)
        if spare < 0:
            raise ValueError(f"a row of {len(ids)} tokens; expected at most {tokens}")
        blocks = np.array(block + [-1] * spare)
        causal = np.tril(np.ones((tokens, tokens), bool))
        attends = causal & ((blocks[None, :] == 0) | (blocks[None, :] == blocks[:, None]))
        row = np.array(ids + encode(FILLER) * spare)
        patches = np.full(tokens, IGNORE)
        if self.pictures:
            shown = np.concatenate([picture.patches for picture in self.pictures])
            patches[row == encode(IMAGE)[0]] = named[shown]
        return row, np.array(labels + [IGNORE] * spare), np.array(positions + [0] * spare), attends, patches


def _turn(question: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    return question + answer, [IGNORE] * len(question) + answer


def _picture_row(rng: np.random.Generator, picture: Picture, tasks: Sequence[str]) -> _Row:
    turns = [_turn(*data.ask(rng, picture, task)) for task in tasks]
    return _Row(data.PICTURE_PREFIX, turns, (picture,), [picture.pixels])


def _pair_row(rng: np.random.Generator) -> _Row:
    pictures = draw_picture(rng, "train"), draw_picture(rng, "train")
    turns = [_turn(*data.ask_pair(rng, pictures)) for _ in range(3)]
    prefix = data.PICTURE_PREFIX + data.PICTURE_PREFIX[1:]
    return _Row(prefix, turns, pictures, [picture.pixels for picture in pictures])


def _text_row(rng: np.random.Generator, task: str, tokens: int) -> _Row:
    # A random amount of filler, as the fixed prompt length of the test split asks for.
    spare = int(rng.integers(0, 5))
    # Recall is learned sooner where some lists are short.
    keys = int(rng.choice((2, 3, 4, 6, 12, 12)))
    ids, labels = data.draw_text(rng, "train", task, tokens - spare, keys)
    return _Row([], [(encode(FILLER) * spare + ids, [IGNORE] * spare + labels)])


def _easy_vqa_row(rng: np.random.Generator) -> _Row:
    available = easy_vqa.pictures("train")
    shown = available[rng.integers(len(available))]
    asked = [pair for pairs in shown.questions.values() for pair in pairs]
    chosen = rng.permutation(len(asked))[:6]
    return _Row(data.PICTURE_PREFIX, [_turn(*asked[i]) for i in chosen], (), [shown.pixels])


def draw_training_batch(rng: np.random.Generator, mix: dict[str, int]) -> TrainingBatch:
    """A batch with so many rows of each kind: "pictures", "small", "read", "pairs", "texts", "easy-vqa"."""
    kinds: dict[str, Callable[[int], _Row]] = {
        "pictures": lambda index: _picture_row(rng, draw_picture(rng, "train"), TURNS),
        "small": lambda index: _picture_row(rng, draw_picture(rng, "train", SMALL), TURNS),
        "read": lambda index: _picture_row(rng, draw_dense_picture(rng, "train"), ("read",)),
        "pairs": lambda index: _pair_row(rng),
        "texts": lambda index: _text_row(rng, ("recall", "arithmetic", "recall")[index % 3], SEQUENCE_TOKENS),
        "easy-vqa": lambda index: _easy_vqa_row(rng),
    }
    rows = [kinds[kind](index) for kind, count in mix.items() for index in range(count)]
    tokens = max(len(row.prefix) + sum(len(ids) for ids, _ in row.turns) for row in rows)
    parts = [np.stack(part) for part in zip(*(row.arrays(tokens) for row in rows), strict=True)]
    pixels = [picture for row in rows for picture in row.pixels]
    return TrainingBatch(*parts, pixels=np.stack(pixels) if pixels else np.zeros((0, 128, 128, 3), np.uint8))
