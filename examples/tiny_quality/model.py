"""The tiny model with the plain adapter, planned as several expert-parallel ranks would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.kinds import answer_tokens, draw_batches
from tiny_vlm.vocabulary import up_to_end
from torch import Tensor

from macs import Profile, Runtime, attach_modality, attach_plain
from macs_tools.common.answers import read
from macs_tools.common.command import quiet

from .points import Point, profiles_of
from .statistics import Answers

Reading = Callable[[int, dict[str, Tensor]], AbstractContextManager[dict[str, Tensor]]]
"""Around a batch, by its number and inputs: the inputs that the model is given."""


def unchanged(number: int, inputs: dict[str, Tensor]) -> AbstractContextManager[dict[str, Tensor]]:
    return contextlib.nullcontext(inputs)


class Bench:
    """The tiny model in one process, planned as several expert-parallel ranks would."""

    def __init__(self, arguments: Any) -> None:
        """arguments: a ``Run``, or the command line of a comparison, which has the same fields."""
        self.arguments = arguments
        self.runtime = Runtime(virtual_ranks=arguments.ranks)
        self.model = tiny.load_model(arguments.checkpoint)
        attach_plain(self.model, self.runtime)
        attach_modality(self.model)
        self.profile = self._calibrated()
        self.profiles = profiles_of(arguments.tuning)

    def batches(self, kind: str) -> list[list[data.Sample]]:
        """Whole batches of the questions of a kind."""
        arguments = self.arguments
        count = arguments.questions // arguments.batch
        return draw_batches(kind, arguments.split, arguments.seed, count, arguments.batch)

    def _calibrated(self) -> Profile:
        """A profile from the training split, which nothing is measured on."""
        kind = self.arguments.batches[0]
        with self.runtime.calibration():
            for batch in draw_batches(kind, "train", 1, 4, self.arguments.batch):
                read(self.model, self.runtime, tiny.sample_inputs(batch))
        return self.runtime.measured_profile()

    def ask(self, point: Point, expected: Answers | None) -> tuple[Answers, list[Any]]:
        """Answers under a point's policy, and what its layers recorded while they read the prompts; what the
        model makes of the ``expected`` answers, or of its own."""
        profile, config = self.profile, point.config
        if config.split == "tuned":
            profile = self.profiles[point.policy, point.ranks]
        elif config.compensation != "tuned":
            profile = replace(profile, compensation=self.profiles["macs", point.ranks].compensation)
        self.runtime.use(point.policy, config, profile)
        found = self.answers(point.batches, expected)
        return found, [report.prefill for report in self.runtime.reports()]

    def answers(self, kind: str, expected: Answers | None, reading: Reading = unchanged) -> Answers:
        """What the model in use answers, and what it makes of the ``expected`` answers, or of its own."""
        found = Answers()
        for number, batch in enumerate(self.batches(kind)):
            with reading(number, tiny.sample_inputs(batch)) as inputs:
                prompt = read(self.model, self.runtime, inputs)
                start = len(found.ids)
                found.ids += map(up_to_end, prompt.greedy(answer_tokens(kind)).tolist())
                prompt.rewind()
                given = (found if expected is None else expected).ids[start : start + len(batch)]
                found.said += prompt.said_of(given)
        return found


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Without gradients, and without a word from a library."""
    quiet()
    with torch.inference_mode():
        yield
