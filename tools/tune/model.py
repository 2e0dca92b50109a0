"""What a split does to a model's answers: the plain adapter, virtual ranks, the answers it gave without.

Shapes: B requests in a batch, S tokens, A answer tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.plain import Engine
from torch import Tensor

import macs
from macs import IMAGE, MACSConfig, Modality, Profile, Runtime

from .search import UNBOUNDED, Measured


@dataclass(frozen=True)
class Batch:
    """inputs: the model's arguments for prompts and answers, input_ids [B, S]; answers bool [B, S]: the
    tokens of the answers; expected: log-probabilities of the model without a bound that predict them, one
    tensor [A, V] a request."""

    inputs: dict[str, Tensor]
    modality: Modality
    answers: Tensor
    expected: list[Tensor]


class Tuned:
    """A model whose layers are bounded one by one, and the requests of two halves: tune, verify."""

    def __init__(self, model: Any, prompts: Sequence[Any], arguments: argparse.Namespace) -> None:
        self.model, self.policy, self.ranks = model, arguments.policy, arguments.ranks
        self.config = MACSConfig.from_dict(arguments.settings).updated(min_tokens=0)
        self.runtime = Runtime(virtual_ranks=arguments.ranks)
        macs.attach_plain(model, self.runtime)
        self.hook = macs.attach_modality(model)
        self.passes = 0
        self.runtime.enabled = False
        whole = [self._batch(one) for one in prompts]
        self.halves = {"tune": whole[::2], "verify": whole[1::2]}
        self.runtime.enabled = True
        self.tokens = whole[0].answers.numel() // arguments.ranks

    def _batch(self, prompt: tuple[dict[str, Tensor], list[list[int]]]) -> Batch:
        """Inputs of a prompt, with the answers behind it, and what the model makes of them."""
        inputs, answers = prompt
        longest = max(map(len, answers))
        ids, start = inputs["input_ids"], inputs["input_ids"].shape[1]
        device = ids.device
        behind = torch.tensor([one + [0] * (longest - len(one)) for one in answers], device=device)
        given = dict(inputs, input_ids=torch.cat([ids, behind], 1))
        whole = given["input_ids"].shape
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                more = torch.full_like(behind, int(name == "attention_mask"))
                given[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], 1)
        if "position_ids" in inputs:
            given["position_ids"] = torch.arange(whole[1], device=device).expand(3, *whole)
        length = torch.tensor([len(one) for one in answers], device=device)
        at = torch.arange(whole[1], device=device)
        marked = (at >= start) & (at < start + length[:, None])
        valid = (at < start) | marked
        if "attention_mask" in inputs:
            valid = valid & (given["attention_mask"] > 0)
        image = given["input_ids"] == self.model.config.image_token_id
        # Answers are decoded later, in steps too small to be planned: here they are spared.
        modality = Modality.of(image.long() * IMAGE, valid=valid, exempt=marked)
        logits = self.model(**given).logits
        return Batch(given, modality, marked, self._predicted(logits, marked))

    @staticmethod
    def _predicted(logits: Tensor, answers: Tensor) -> list[Tensor]:
        """The log-probabilities that predict each request's answer tokens."""
        said = logits[:, :-1].float().log_softmax(-1)
        return [one[mark] for one, mark in zip(said, answers[:, 1:], strict=True)]

    def measure(self, half: str, bounds: Sequence[float]) -> Measured:
        """What the layers' bounds do to the requests of a half."""
        self.runtime.use(self.policy, self.config.updated(target_load=UNBOUNDED))
        for layer, bound in zip(self.runtime.layers, bounds, strict=True):
            layer.planner.update_target(float(bound))
        damage: list[float] = []
        same: list[bool] = []
        for batch in self.halves[half]:
            with macs.modality(batch.modality):
                logits = self.model(**batch.inputs).logits
            for given, expected, mark, ids in zip(
                self._predicted(logits, batch.answers),
                batch.expected,
                batch.answers,
                batch.inputs["input_ids"],
                strict=True,
            ):
                damage.append(float((expected.exp() * (expected - given)).sum(-1).mean().clamp(min=0)))
                same.append(bool((given.argmax(-1) == ids[mark]).all()))
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
                with macs.modality(batch.modality):
                    self.model(**batch.inputs)
        return self.runtime.measured_profile()


def tiny_prompts(arguments: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The tiny model, and its answers to questions of the training split, in batches."""
    model = tiny.load_model(arguments.checkpoint)
    engine = Engine(model)
    samples = data.draw_samples(arguments.seed, "train", data.TASKS, arguments.requests)
    prompts = []
    for start in range(0, len(samples) - arguments.batch + 1, arguments.batch):
        batch = samples[start : start + arguments.batch]
        prompts.append((tiny.sample_inputs(batch), engine.generate(batch)))
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
