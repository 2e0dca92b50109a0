"""What a prompt of the tiny model is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .pictures import IMAGE_TOKENS
from .vocabulary import BEGIN, IMAGE, VISION_END, VISION_START, encode

PICTURE_PREFIX = encode(f"{BEGIN} {VISION_START} " + f"{IMAGE} " * IMAGE_TOKENS + VISION_END)


@dataclass(frozen=True)
class Sample:
    """One prompt, token ids, with its answer, end token included.

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
