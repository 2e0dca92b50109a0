"""What a split does to a model's answers: the plain adapter, virtual ranks, the answers it gave without.

Shapes: A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tiny_vlm import model as tiny
from tiny_vlm.plain import Engine
from torch import Tensor

import macs
from macs import MACSConfig, Profile, Runtime

from ..common.answers import divergence, read
from ..evaluate.kinds import answer_tokens, draw_batches
from .search import UNBOUNDED, Measured


@dataclass(frozen=True)
class Batch:
    """inputs: the model's arguments for the prompts; answers: token ids that it says without a bound;
    expected: log-probabilities [A, V] that predict them there, of each request."""

    inputs: dict[str, Tensor]
    answers: list[list[int]]
    expected: list[Tensor]


class Tuned:
    """A model whose layers are bounded one by one, and the requests of two halves: tune, verify."""

    def __init__(self, model: Any, prompts: Sequence[Any], arguments: argparse.Namespace) -> None:
        self.model, self.policy, self.ranks = model, arguments.policy, arguments.ranks
        self.config = MACSConfig.from_dict(arguments.settings).updated(min_tokens=0)
        self.runtime = Runtime(virtual_ranks=arguments.ranks)
        macs.attach_plain(model, self.runtime)
        macs.attach_modality(model)
        self.passes = 0
        self.runtime.enabled = False
        whole = [self._batch(one) for one in prompts]
        self.halves = {"tune": whole[::2], "verify": whole[1::2]}
        self.runtime.enabled = True
        self.tokens = whole[0].inputs["input_ids"].numel() // arguments.ranks

    def _batch(self, prompt: tuple[dict[str, Tensor], list[list[int]]]) -> Batch:
        """A prompt and its answers, with what the model makes of them."""
        inputs, answers = prompt
        return Batch(inputs, answers, read(self.model, self.runtime, inputs).said_of(answers))

    def measure(self, half: str, bounds: Sequence[float]) -> Measured:
        """What the layers' bounds do to the requests of a half."""
        self.runtime.use(self.policy, self.config.updated(target_load=UNBOUNDED))
        for layer, bound in zip(self.runtime.layers, bounds, strict=True):
            layer.planner.update_target(float(bound))
        damage: list[float] = []
        same: list[bool] = []
        for batch in self.halves[half]:
            given = read(self.model, self.runtime, batch.inputs).said_of(batch.answers)
            for expected, found, ids in zip(batch.expected, given, batch.answers, strict=True):
                damage.append(divergence(expected, found))
                same.append(found.argmax(-1).tolist() == ids)
            self.passes += 1
        loads = [float(one.straggler("after").mean()) for one in self.runtime.reports()]
        return Measured(np.array(loads), np.array(damage), np.array(same))

    def natural(self) -> np.ndarray:
        """Loads [L] without a bound, on the tuning half."""
        self.measure("tune", [UNBOUNDED] * len(self.runtime.layers))
        return np.array([float(one.straggler("before").mean()) for one in self.runtime.reports()])

    def profile(self) -> Profile:
        """Which expert serves which modality, on the tuning half."""
        with self.runtime.calibration():
            for batch in self.halves["tune"]:
                read(self.model, self.runtime, batch.inputs)
        return self.runtime.measured_profile()


def tiny_prompts(arguments: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The tiny model, and its answers to questions of the training split, batches of the kinds in turn."""
    model = tiny.load_model(arguments.checkpoint)
    engine = Engine(model)
    count = arguments.requests // arguments.batch // len(arguments.batches)
    by_kind = [
        [
            (tiny.sample_inputs(batch), engine.generate(batch, tokens=answer_tokens(kind)))
            for batch in draw_batches(kind, "train", arguments.seed, count, arguments.batch)
        ]
        for kind in arguments.batches
    ]
    # Halves take turns: every second batch of a kind is for either.
    prompts = [batch for pair in range(0, count, 2) for kind in by_kind for batch in kind[pair : pair + 2]]
    return model, prompts


def own_prompts(arguments: argparse.Namespace) -> tuple[Any, list[Any]]:
    """A checkpoint in Hugging Face format with its processor, and its answers to one's own requests."""
    from tiny_vlm.own_model import ProcessorEngine
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..calibrate.engines import processor_request
    from ..calibrate.requests import read_requests

    model: Any = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    engine = ProcessorEngine(model, AutoProcessor.from_pretrained(arguments.model), arguments.tokens)
    asked = [processor_request(one) for one in read_requests(arguments.data)[: arguments.requests]]
    prompts = []
    for start in range(0, len(asked) - arguments.batch + 1, arguments.batch):
        batch = asked[start : start + arguments.batch]
        prompts.append((engine.inputs_of(batch), engine.generate(batch)))
    return model, prompts
