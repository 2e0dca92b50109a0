"""The tiny model with the plain adapter, planned as several expert-parallel ranks would."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.plain import Engine

from macs import Profile, Runtime, attach_modality, attach_plain

from ..common.command import quiet
from .points import MIXES, Point
from .statistics import Answers


class Bench:
    """The tiny model in one process, planned as ``ranks`` expert-parallel ranks would."""

    def __init__(self, arguments: argparse.Namespace, ranks: int) -> None:
        self.arguments = arguments
        self.runtime = Runtime(virtual_ranks=ranks)
        self.model = tiny.load_model(arguments.checkpoint)
        attach_plain(self.model, self.runtime)
        attach_modality(self.model)
        self.engine = Engine(self.model)
        self.profile = self._calibrated()

    def batches(self, kind: str, split: str, seed: int) -> list[list[data.Sample]]:
        """Whole batches of the questions of a kind."""
        size = self.arguments.batch
        samples = data.draw_samples(seed, split, MIXES[kind], self.arguments.questions // size * size)
        if kind == "multi-image":
            rng = np.random.default_rng(seed)
            samples = [data.after_another(sample, data.draw_picture(rng, split)) for sample in samples]
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def _calibrated(self) -> Profile:
        """A profile from the training split, which nothing is measured on."""
        with self.runtime.calibration():
            for batch in self.batches("mixed", "train", 1)[:4]:
                self.engine.generate(batch, tokens=1)
        return self.runtime.measured_profile()

    def ask(self, point: Point) -> tuple[Answers, list[Any]]:
        """Answers under a point's policy, and what its layers recorded while they read the prompts."""
        self.runtime.use(point.policy, point.config, self.profile)
        found = Answers()
        with contextlib.ExitStack() as stack:
            if point.random_weights:
                stack.enter_context(self._noise())
            if point.spared_text:
                stack.enter_context(self._sparing())
            if point.rerouted_weight != "score":
                stack.enter_context(self._reweighed(point.rerouted_weight))
            stack.enter_context(self.first_answers(found))
            for batch in self.batches(point.batches, self.arguments.split, self.arguments.seed):
                found.ids += self.engine.generate(batch)
        return found, [report.prefill for report in self.runtime.reports()]

    @contextlib.contextmanager
    def first_answers(self, found: Answers) -> Iterator[None]:
        """Keeps what the model says after every prompt."""

        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if kwargs["input_ids"].shape[1] > 1:
                found.first += output.logits[:, -1].double().log_softmax(-1).unbind()

        handle = self.model.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _noise(self) -> contextlib.AbstractContextManager[None]:
        """Layers plan on noise for features; their real features go on as they are."""
        generator = torch.Generator().manual_seed(0)
        return planning(
            self.runtime.layers,
            lambda inner, hidden, *rest: inner(torch.randn(hidden.shape, generator=generator), *rest),
        )

    def _sparing(self) -> contextlib.AbstractContextManager[None]:
        """Text is exempt: neither dropped nor rerouted."""

        def plan(inner: Any, *inputs: Any) -> Any:
            *given, tokens = inputs
            return inner(*given, replace(tokens, exempt=tokens.exempt | ~tokens.visual & tokens.valid))

        return planning(self.runtime.layers, plan)

    def _reweighed(self, rule: str) -> contextlib.AbstractContextManager[None]:
        """Rerouted assignments count half of what was planned, or what they did at their former expert."""

        def plan(inner: Any, *inputs: Any) -> Any:
            planned = inner(*inputs)
            other = inputs[2] if rule == "former" else planned.weights / 2
            return replace(planned, weights=torch.where(planned.rerouted, other, planned.weights))

        return planning(self.runtime.layers, plan)


@contextlib.contextmanager
def planning(layers: Sequence[Any], plan: Callable[..., Any]) -> Iterator[None]:
    """Layers whose plans are ``plan(inner, hidden, experts, weights, scores, tokens)``, where ``inner`` of
    the rest is what they would have been."""
    for layer in layers:
        layer.plan = functools.partial(plan, layer.plan)
    try:
        yield
    finally:
        for layer in layers:
            del layer.plan


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Without gradients, and without a word from a library."""
    quiet()
    with torch.inference_mode():
        yield
