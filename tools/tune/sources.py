"""Models to tune, in their engines, and the requests they are asked."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import macs
from macs import IMAGE, MACSConfig, Modality, Runtime

from ..common.answers import read
from ..common.requests import question_of, read_requests
from .engines import rank_of, running
from .model import Said, Scorer


def tiny_asked(arguments: argparse.Namespace, engine: Any) -> list[tuple[list[Any], list[list[int]]]]:
    """Questions of a split with the tiny model's answers, batches of the kinds in turn; of every batch this
    rank's share."""
    from tiny_vlm.kinds import answer_tokens, draw_batches

    rank, ranks = rank_of()
    size = arguments.batch // ranks
    count = arguments.requests // arguments.batch // len(arguments.batches)
    by_kind = []
    for kind in arguments.batches:
        drawn = draw_batches(kind, arguments.split, arguments.seed, count, arguments.batch)
        mine = [batch[rank * size :][:size] for batch in drawn]
        tokens = answer_tokens(kind)
        by_kind.append([(one, engine.generate(one, tokens=tokens)) for one in mine])
    # Halves take turns: every second batch of a kind is for either.
    return [one for pair in range(0, count, 2) for kind in by_kind for one in kind[pair : pair + 2]]


def own_asked(arguments: argparse.Namespace, engine: Any) -> list[tuple[list[Any], list[list[int]]]]:
    """One's own requests with the answers of one's own checkpoint; of every batch this rank's share."""
    rank, ranks = rank_of()
    size = arguments.batch // ranks
    asked = [question_of(one) for one in read_requests(arguments.data)[: arguments.requests]]
    found = []
    for start in range(0, len(asked) - arguments.batch + 1, arguments.batch):
        batch = asked[start + rank * size :][:size]
        found.append((batch, engine.generate(batch)))
    if len(found) < 2:
        raise ValueError(
            f"--data: found {len(asked)} requests, expected two batches ({2 * arguments.batch}) or more"
        )
    return found


class FromCache:
    """How a Hugging Face model scores answers: prompts are read under MACS, answers follow from the cache."""

    def __init__(self, runtime: Runtime, engine: Any) -> None:
        self.runtime, self.model, self.inputs_of = runtime, engine.model, engine.inputs_of

    def __call__(self, prompts: Any, answers: list[list[int]]) -> list[Tensor]:
        return read(self.model, self.runtime, self.inputs_of(prompts)).said_of(answers)


def in_one_pass(engine: Any) -> Said:
    """How the tiny model in Megatron scores answers: prompts and answers in one pass, in which answers are
    exempt, for they are decoded later, in steps too small to be planned."""
    from megatron.core.inference.utils import get_attention_mask

    def said(samples: list[Any], answers: list[list[int]]) -> list[Tensor]:
        device = next(engine.model.parameters()).device
        longest, start = max(map(len, answers)), len(samples[0].prompt)
        padded = [
            [*one.prompt, *answer, *[0] * (longest - len(answer))]
            for one, answer in zip(samples, answers, strict=True)
        ]
        ids = torch.tensor(padded, device=device)
        at = torch.arange(ids.shape[1], device=device).expand_as(ids)
        end = start + torch.tensor([[len(one)] for one in answers], device=device)
        image = ids == engine.model.image_token_id
        modality = Modality.of(image.long() * IMAGE, valid=at < end, exempt=at >= start)
        with macs.modality(modality), engine.model.pictures(engine.pictures(samples)):
            mask = get_attention_mask(ids.shape[1]).to(device)
            logits = engine.model(ids, at, mask, runtime_gather_output=True)
        said = logits[:, start - 1 : -1].float().log_softmax(-1)
        return [one[: len(answer)] for one, answer in zip(said, answers, strict=True)]

    return said


@contextlib.contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Scorer]:
    """The model in the engine that is asked for, with what it is asked."""
    with running(arguments) as (runtime, engine):
        runtime.enabled = False
        asked = (tiny_asked if arguments.model is None else own_asked)(arguments, engine)
        said: Said = in_one_pass(engine) if arguments.engine == "megatron" else FromCache(runtime, engine)
        yield Scorer(
            runtime,
            said,
            asked,
            policy=arguments.policy,
            config=MACSConfig.from_dict(arguments.settings),
            groups=arguments.groups,
            group=None if arguments.engine == "plain" else dist.group.WORLD,
        )
