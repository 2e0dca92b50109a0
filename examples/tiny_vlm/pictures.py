"""Pictures of handwritten digits on photographs.

Photographs come with scikit-image, digits with scikit-learn. The test split uses digits and crops that
training never sees. Every function draws from the generator it is given, so that a seed fixes the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

PICTURE_SIZE = 128  # pixels a side
IMAGE_TOKENS = 64  # (128 / patch 8 / merge 2) ** 2
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
COLUMNS = 4  # of a dense picture's grid
LARGE, SMALL = (46, 55), (22, 29)
"""Pixels a side of a digit: from, and up to but without."""

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


@dataclass(frozen=True)
class Picture:
    """A picture and what is on it.

    pixels uint8 [128, 128, 3]; digits by quadrant, -1: none, or, of a dense picture, in the order they are
    read; patches int [64], the digit that an image token shows, -1: background.
    """

    pixels: np.ndarray
    digits: tuple[int, ...]
    patches: np.ndarray

    @property
    def present(self) -> list[int]:
        return [digit for digit in self.digits if digit >= 0]


def split_of(index: int) -> str:
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
    mine = np.array([split_of(index) == split for index in range(len(source.target))])
    images = source.images / 16.0
    return {digit: images[mine & (source.target == digit)] for digit in range(10)}


class _Canvas:
    """A dimmed crop of a photograph that digits are pasted on."""

    def __init__(self, rng: np.random.Generator, split: str) -> None:
        available = photographs(split)
        photograph = available[rng.integers(len(available))]
        top = rng.integers(photograph.shape[0] - PICTURE_SIZE + 1)
        left = rng.integers(photograph.shape[1] - PICTURE_SIZE + 1)
        pixels = 0.5 * photograph[top : top + PICTURE_SIZE, left : left + PICTURE_SIZE]
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        self.rng, self.split = rng, split
        self.pixels = pixels.copy()
        self.shown = np.full((PICTURE_SIZE, PICTURE_SIZE), -1)  # the digit at every pixel

    def paste(self, digit: int, corner: tuple[int, int], cell: int, sizes: tuple[int, int]) -> None:
        """The digit somewhere in the square cell whose upper left corner is given, all in pixels."""
        rng = self.rng
        images = _digits(self.split)[digit]
        glyph = Image.fromarray((images[rng.integers(len(images))] * 255).astype(np.uint8))
        size = int(rng.integers(*sizes))
        glyph = glyph.resize((size, size), Image.Resampling.BICUBIC)
        glyph = glyph.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
        alpha = np.clip(np.asarray(glyph) / 255.0 * 1.1, 0, 1)[:, :, None]
        y = corner[0] + rng.integers(cell - size + 1)
        x = corner[1] + rng.integers(cell - size + 1)
        colour = rng.uniform(180, 255, size=3)
        spot = self.pixels[y : y + size, x : x + size]
        self.pixels[y : y + size, x : x + size] = spot * (1 - alpha) + colour * alpha
        self.shown[y : y + size, x : x + size] = digit

    def picture(self, digits: Sequence[int]) -> Picture:
        """What it has become."""
        side = PICTURE_SIZE // round(IMAGE_TOKENS**0.5)
        return Picture(
            pixels=np.clip(self.pixels, 0, 255).astype(np.uint8),
            digits=tuple(digits),
            patches=self.shown[side // 2 :: side, side // 2 :: side].flatten(),
        )


def draw_picture(rng: np.random.Generator, split: str, sizes: tuple[int, int] = LARGE) -> Picture:
    """One to three digits in different quadrants."""
    canvas = _Canvas(rng, split)
    digits, half = [-1, -1, -1, -1], PICTURE_SIZE // 2
    for quadrant in rng.permutation(4)[: rng.integers(1, 4)]:
        digits[quadrant] = int(rng.integers(10))
        canvas.paste(digits[quadrant], ((quadrant // 2) * half, (quadrant % 2) * half), half, sizes)
    return canvas.picture(digits)


def draw_dense_picture(rng: np.random.Generator, split: str) -> Picture:
    """Two to four lines of four small digits each, from the top: most of the picture matters."""
    canvas = _Canvas(rng, split)
    digits = [int(digit) for digit in rng.integers(10, size=COLUMNS * int(rng.integers(2, 5)))]
    cell = PICTURE_SIZE // COLUMNS
    for place, digit in enumerate(digits):
        canvas.paste(digit, (place // COLUMNS * cell, place % COLUMNS * cell), cell, SMALL)
    return canvas.picture(digits)
