"""Pictures, questions and texts: everything the tiny model learns and is asked.

A *picture* is a photograph's crop with one to three handwritten digits pasted into its quadrants.
Photographs come with scikit-image, digits with scikit-learn. The test split uses digits, crops and
sums that training never sees. Every function draws from the generator it is given, so that a seed
fixes the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from .vocabulary import BEGIN, END, FILLER, IMAGE, VISION_END, VISION_START, encode

PICTURE_SIZE = 128  # pixels a side
IMAGE_TOKENS = 64  # (128 / patch 8 / merge 2) ** 2
QUESTION_TOKENS = 6  # every picture question has as many
ANSWER_TOKENS = 3  # at most: two digits and the end
PROMPT_TOKENS = 1 + 1 + IMAGE_TOKENS + 1 + QUESTION_TOKENS  # of every prompt, text ones too
QUESTIONS_PER_PICTURE = 7
SEQUENCE_TOKENS = PROMPT_TOKENS - QUESTION_TOKENS + QUESTIONS_PER_PICTURE * (QUESTION_TOKENS + ANSWER_TOKENS)
IGNORE = -100  # label of a position that is not learned from

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
PICTURE_TASKS = ("where", "count", "largest", "sum", "exists")
TEXT_TASKS = ("arithmetic", "recall")
TASKS = PICTURE_TASKS + TEXT_TASKS
LETTERS = "abcdefghijklmnop"
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
)

PICTURE_PREFIX = encode(f"{BEGIN} {VISION_START} " + f"{IMAGE} " * IMAGE_TOKENS + VISION_END)


@dataclass(frozen=True)
class Picture:
    """A picture and what is on it.

    pixels uint8 [128, 128, 3]; digits by quadrant, -1: none; patches int [64], the digit that an
    image token shows, -1: background.
    """

    pixels: np.ndarray
    digits: tuple[int, int, int, int]
    patches: np.ndarray

    @property
    def present(self) -> list[int]:
        return [digit for digit in self.digits if digit >= 0]


@dataclass(frozen=True)
class Sample:
    """One prompt of ``PROMPT_TOKENS`` ids with its answer, end token included.

    pixels uint8 [128, 128, 3], the picture asked about. A prompt may show others ``before`` it, and is
    longer then.
    """

    task: str
    prompt: list[int]
    answer: list[int]
    pixels: np.ndarray | None = None
    before: tuple[np.ndarray, ...] = ()

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """All pictures, in the order of the prompt."""
        return self.before if self.pixels is None else (*self.before, self.pixels)


def _split_of(index: int) -> str:
    """Of ten items seven are for training, one for validation, two for test."""
    return {4: "test", 9: "test", 3: "validation"}.get(index % 10, "train")


@cache
def photographs(split: str) -> list[np.ndarray]:
    """Photographs, uint8 RGB, at least 440 pixels high: the right 30 % are kept for test."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    photographs = []
    for name in PHOTOGRAPHS:
        image = Image.open(folder / name).convert("RGB")
        height = max(440, min(image.height, 600))
        image = image.resize((round(image.width * height / image.height), height))
        pixels = np.asarray(image)
        border = int(pixels.shape[1] * 0.7)
        photographs.append(pixels[:, border:] if split == "test" else pixels[:, :border])
    return photographs


@cache
def _digits(split: str) -> dict[int, np.ndarray]:
    """Digit -> its handwritten images of the split, float [n, 8, 8] in 0..1."""
    from sklearn.datasets import load_digits

    source = load_digits()
    mine = np.array([_split_of(index) == split for index in range(len(source.target))])
    images = source.images / 16.0
    return {digit: images[mine & (source.target == digit)] for digit in range(10)}


def draw_picture(rng: np.random.Generator, split: str) -> Picture:
    """A dimmed crop of a photograph with one to three digits in different quadrants."""
    available = photographs(split)
    photograph = available[rng.integers(len(available))]
    top = rng.integers(photograph.shape[0] - PICTURE_SIZE + 1)
    left = rng.integers(photograph.shape[1] - PICTURE_SIZE + 1)
    canvas = 0.5 * photograph[top : top + PICTURE_SIZE, left : left + PICTURE_SIZE]
    if rng.random() < 0.5:
        canvas = canvas[:, ::-1]
    canvas = canvas.copy()

    digits = [-1, -1, -1, -1]
    shown = np.full((PICTURE_SIZE, PICTURE_SIZE), -1)
    for quadrant in rng.permutation(4)[: rng.integers(1, 4)]:
        digit = int(rng.integers(10))
        digits[quadrant] = digit
        images = _digits(split)[digit]
        glyph = Image.fromarray((images[rng.integers(len(images))] * 255).astype(np.uint8))
        size = int(rng.integers(46, 55))
        glyph = glyph.resize((size, size), Image.Resampling.BICUBIC)
        glyph = glyph.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
        alpha = np.clip(np.asarray(glyph) / 255.0 * 1.1, 0, 1)[:, :, None]
        half = PICTURE_SIZE // 2
        y = (quadrant // 2) * half + rng.integers(half - size + 1)
        x = (quadrant % 2) * half + rng.integers(half - size + 1)
        colour = rng.uniform(180, 255, size=3)
        spot = canvas[y : y + size, x : x + size]
        canvas[y : y + size, x : x + size] = spot * (1 - alpha) + colour * alpha
        shown[y : y + size, x : x + size] = digit
    side = PICTURE_SIZE // round(IMAGE_TOKENS**0.5)
    return Picture(
        pixels=np.clip(canvas, 0, 255).astype(np.uint8),
        digits=(digits[0], digits[1], digits[2], digits[3]),
        patches=shown[side // 2 :: side, side // 2 :: side].flatten(),
    )


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
    else:
        raise ValueError(f"task: expected one of {', '.join(PICTURE_TASKS)}; found {task!r}")
    return encode(question), encode(f"{answer} {END}")


def _addition(rng: np.random.Generator, split: str) -> tuple[str, str]:
    """Two numbers below 50 and their sum; no pair is in two splits."""
    while True:
        first, second = (int(number) for number in rng.integers(0, 50, size=2))
        # A multiplicative hash scatters the splits over the table of pairs.
        if _split_of((first * 50 + second) * 7919 % 1009) == split:
            return f"{two_digits(first)} + {two_digits(second)} =", two_digits(first + second)


def draw_text(rng: np.random.Generator, split: str, task: str, tokens: int) -> tuple[list[int], list[int]]:
    """A text of exactly ``tokens`` ids (filler in front), and labels for the answers in it.

    Arithmetic is a run of additions, recall a list of letters with digits and then queries for
    them. Outside training only the last answer is held out; what comes before is context.
    """
    if task == "arithmetic":
        head, unit = [], 9
        turns = (tokens - 1) // unit
        pairs = [_addition(rng, "train") for _ in range(turns - 1)] + [_addition(rng, split)]
    elif task == "recall":
        keys = rng.permutation(len(LETTERS))[:12]
        values = rng.integers(0, 10, size=12)
        head = encode(" ".join(f"{LETTERS[key]} {value}" for key, value in zip(keys, values, strict=True)))
        turns = (tokens - 1 - len(head)) // 4
        asked = rng.integers(0, 12, size=turns)
        pairs = [(f"? {LETTERS[keys[i]]}", str(values[i])) for i in asked]
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
    if task in TEXT_TASKS:
        answer_tokens = 3 if task == "arithmetic" else 2
        ids, _ = draw_text(rng, split, task, PROMPT_TOKENS + answer_tokens)
        return Sample(task, ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:])
    picture = draw_picture(rng, split)
    question, answer = ask(rng, picture, task)
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


@dataclass(frozen=True)
class TrainingBatch:
    """B sequences of S tokens, P of them pictures (the first P rows).

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


@cache
def _picture_layout() -> tuple[np.ndarray, np.ndarray]:
    """Positions [S] and attention [S, S] of one picture with several *independent* questions.

    Every question sees the picture and itself only, at the positions it would have if it stood
    alone, so training sees exactly what a single-question prompt looks like.
    """
    prefix, turn = len(PICTURE_PREFIX), QUESTION_TOKENS + ANSWER_TOKENS
    block = np.concatenate([np.zeros(prefix, int), 1 + np.repeat(np.arange(QUESTIONS_PER_PICTURE), turn)])
    positions = np.concatenate([np.arange(prefix), np.tile(prefix + np.arange(turn), QUESTIONS_PER_PICTURE)])
    causal = np.tril(np.ones((len(block), len(block)), bool))
    attends = causal & ((block[None, :] == 0) | (block[None, :] == block[:, None]))
    return positions, attends


def draw_training_batch(seed: int, step: int, pictures: int, texts: int) -> TrainingBatch:
    """The batch of a training step; the same (seed, step) gives the same batch."""
    rng = np.random.default_rng([seed, 3, step])
    ids, labels, patches, pixels = [], [], [], []
    named = np.array(encode("0 1 2 3 4 5 6 7 8 9 none"))  # -1 is the last
    turns = (*PICTURE_TASKS, "where", "exists")
    for _ in range(pictures):
        picture = draw_picture(rng, "train")
        row, row_labels = list(PICTURE_PREFIX), [IGNORE] * len(PICTURE_PREFIX)
        for task in turns:
            question, answer = ask(rng, picture, task)
            spare = ANSWER_TOKENS - len(answer)
            row += question + answer + encode(FILLER) * spare
            row_labels += [IGNORE] * len(question) + answer + [IGNORE] * spare
        ids.append(row)
        labels.append(row_labels)
        shows = np.full(SEQUENCE_TOKENS, IGNORE)
        shows[2 : 2 + IMAGE_TOKENS] = named[picture.patches]
        patches.append(shows)
        pixels.append(picture.pixels)
    for index in range(texts):
        # A random amount of filler, as the fixed prompt length of the test split asks for.
        spare = int(rng.integers(0, 5))
        row, row_labels = draw_text(rng, "train", TEXT_TASKS[index % 2], SEQUENCE_TOKENS - spare)
        ids.append(encode(FILLER) * spare + row)
        labels.append([IGNORE] * spare + row_labels)
        patches.append(np.full(SEQUENCE_TOKENS, IGNORE))

    picture_positions, picture_attends = _picture_layout()
    causal = np.tril(np.ones((SEQUENCE_TOKENS, SEQUENCE_TOKENS), bool))
    positions = np.stack([picture_positions] * pictures + [np.arange(SEQUENCE_TOKENS)] * texts)
    attends = np.stack([picture_attends] * pictures + [causal] * texts)
    return TrainingBatch(
        np.array(ids), np.array(labels), positions, attends, np.stack(patches), np.stack(pixels)
    )
