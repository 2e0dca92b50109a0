"""Questions about pictures, and texts: everything the tiny model learns and is asked.

The test split uses digits, crops and sums that training never sees. Every function draws from the
generator it is given, so that a seed fixes the data.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import easy_vqa
from .pictures import (
    COLUMNS,
    IMAGE_TOKENS,
    QUADRANTS,
    SMALL,
    Picture,
    draw_dense_picture,
    draw_picture,
    split_of,
)
from .sample import PICTURE_PREFIX, Sample
from .vocabulary import BEGIN, END, FILLER, encode

QUESTION_TOKENS = 6  # every picture question has as many
ANSWER_TOKENS = 3  # at most, but for "read": two digits and the end
PROMPT_TOKENS = 1 + 1 + IMAGE_TOKENS + 1 + QUESTION_TOKENS  # of every prompt with at most one picture
READ_TOKENS = COLUMNS * COLUMNS + 1  # of the longest answer to "read"

PICTURE_TASKS = ("where", "count", "largest", "sum", "exists")
TEXT_TASKS = ("arithmetic", "recall")
TASKS = PICTURE_TASKS + TEXT_TASKS
HARD_TASKS = ("read", "small", "pair")
"""Pictures that are harder to spare: 8 to 16 digits to be read in order, digits a quarter as large, and two
pictures in a prompt."""
IGNORE = -100  # label of a position that is not learned from
LETTERS = "abcdefghijklmnop"


def two_digits(number: int) -> str:
    return f"{number // 10} {number % 10}"


def ask(rng: np.random.Generator, picture: Picture, task: str) -> tuple[list[int], list[int]]:
    """A question of the task about the picture and its answer: two lists of token ids."""
    present = picture.present
    if task == "where":
        quadrant = int(rng.integers(4))
        question = f"what is at {QUADRANTS[quadrant]} ?"
        digit = picture.digits[quadrant]
        answer = "none" if digit < 0 else str(digit)
    elif task == "count":
        question, answer = "how many digits are there ?", str(len(present))
    elif task == "largest":
        question, answer = "what is the largest digit ?", str(max(present))
    elif task == "sum":
        question, answer = "what is the digit sum ?", two_digits(sum(present))
    elif task == "exists":
        absent = sorted(set(range(10)) - set(present))
        wanted = rng.random() < 0.5
        digit = int(rng.choice(present if wanted else absent))
        question, answer = f"tell me is there a {digit}", "yes" if wanted else "no"
    elif task == "read":
        question, answer = "read all digits in order ?", " ".join(map(str, picture.digits))
    else:
        expected = ", ".join((*PICTURE_TASKS, "read"))
        raise ValueError(f"task: expected one of {expected}; found {task!r}")
    return encode(question), encode(f"{answer} {END}")


def ask_pair(rng: np.random.Generator, pictures: tuple[Picture, Picture]) -> tuple[list[int], list[int]]:
    """A question about one of two pictures and its answer: two lists of token ids."""
    which, quadrant = int(rng.integers(2)), int(rng.integers(4))
    digit = pictures[which].digits[quadrant]
    question = f"what is {('first', 'second')[which]} {QUADRANTS[quadrant]} ?"
    return encode(question), encode(f"{'none' if digit < 0 else digit} {END}")


def _addition(rng: np.random.Generator, split: str) -> tuple[str, str]:
    """Two numbers below 50 and their sum; no pair is in two splits."""
    while True:
        first, second = (int(number) for number in rng.integers(0, 50, size=2))
        # A multiplicative hash scatters the splits over the table of pairs.
        if split_of((first * 50 + second) * 7919 % 1009) == split:
            return f"{two_digits(first)} + {two_digits(second)} =", two_digits(first + second)


def draw_text(
    rng: np.random.Generator, split: str, task: str, tokens: int, keys: int = 12
) -> tuple[list[int], list[int]]:
    """A text of exactly ``tokens`` ids (filler in front), and labels for the answers in it.

    Arithmetic is a run of additions, recall a list of ``keys`` letters with digits and then queries for
    them. Outside training only the last answer is held out; what comes before is context.
    """
    if task == "arithmetic":
        head, unit = [], 9
        turns = (tokens - 1) // unit
        pairs = [_addition(rng, "train") for _ in range(turns - 1)] + [_addition(rng, split)]
    elif task == "recall":
        letters = rng.permutation(len(LETTERS))[:keys]
        values = rng.integers(0, 10, size=keys)
        head = encode(" ".join(f"{LETTERS[one]} {value}" for one, value in zip(letters, values, strict=True)))
        turns = (tokens - 1 - len(head)) // 4
        asked = rng.integers(0, keys, size=turns)
        pairs = [(f"? {LETTERS[letters[i]]}", str(values[i])) for i in asked]
    else:
        raise ValueError(f"task: expected one of {', '.join(TEXT_TASKS)}; found {task!r}")

    ids, labels = encode(BEGIN) + head, [IGNORE] * (1 + len(head))
    for question, answer in pairs:
        prompt, reply = encode(question), encode(f"{answer} {END}")
        ids += prompt + reply
        labels += [IGNORE] * len(prompt) + reply
    padding = tokens - len(ids)
    return encode(FILLER) * padding + ids, [IGNORE] * padding + labels


def draw_sample(rng: np.random.Generator, split: str, task: str) -> Sample:
    """One prompt of the task with its answer."""
    if task in easy_vqa.TASKS:
        return easy_vqa.draw_sample(rng, split, task)
    if task in TEXT_TASKS:
        answer_tokens = 3 if task == "arithmetic" else 2
        ids, _ = draw_text(rng, split, task, PROMPT_TOKENS + answer_tokens)
        return Sample(task, ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:])
    if task == "pair":
        first, second = draw_picture(rng, split), draw_picture(rng, split)
        question, answer = ask_pair(rng, (first, second))
        return after_another(Sample(task, PICTURE_PREFIX + question, answer, second.pixels), first)
    if task == "read":
        picture = draw_dense_picture(rng, split)
    elif task == "small":
        picture = draw_picture(rng, split, SMALL)
    else:
        picture = draw_picture(rng, split)
    question, answer = ask(rng, picture, "where" if task == "small" else task)
    return Sample(task, PICTURE_PREFIX + question, answer, picture.pixels)


def after_another(sample: Sample, picture: Picture) -> Sample:
    """The same question about the same picture, with another picture in the prompt before it."""
    shown = PICTURE_PREFIX[1:]
    prompt = sample.prompt[:1] + shown + sample.prompt[1:]
    return replace(sample, prompt=prompt, before=(picture.pixels, *sample.before))


def draw_samples(seed: int, split: str, tasks: tuple[str, ...], count: int) -> list[Sample]:
    """``count`` samples that go through the tasks in turn."""
    rng = np.random.default_rng([seed, {"train": 0, "validation": 1, "test": 2}[split]])
    return [draw_sample(rng, split, tasks[i % len(tasks)]) for i in range(count)]
