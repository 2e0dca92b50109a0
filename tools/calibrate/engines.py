"""The model that is calibrated, in an engine, and what it is asked."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from macs import Runtime

from ..common import clone
from ..common.processes import processes
from ..common.requests import ProcessorEngine, Request, load_model, opened, question_of


def tiny_sample(request: Request) -> Any:
    """A request as the tiny model's prompt; words it does not know are unknown to it."""
    clone.examples("tiny_vlm")
    from tiny_vlm import data
    from tiny_vlm import model as tiny
    from tiny_vlm.vocabulary import BEGIN, FILLER, build_tokenizer, encode

    pixels = None if request.picture is None else opened(request.picture, tiny.open_picture)
    prefix = encode(BEGIN) if pixels is None else data.PICTURE_PREFIX
    room = data.PROMPT_TOKENS - len(prefix)
    words = list(build_tokenizer()(request.text.lower())["input_ids"])[:room]
    return data.Sample("own", prefix + encode(FILLER) * (room - len(words)) + words, [], pixels)


@contextlib.contextmanager
def megatron(arguments: argparse.Namespace) -> Iterator[tuple[Runtime, Any]]:
    """The tiny model in Megatron's static engine."""
    clone.examples("tiny_vlm")
    import tiny_vlm
    from megatron.core import parallel_state
    from tiny_vlm import model as tiny
    from tiny_vlm.megatron import PictureEncoder, build_megatron_model
    from tiny_vlm.megatron_engine import Engine

    from megatron_macs import attach_modality, cpu_engine

    source, runtime = tiny.load_model(arguments.checkpoint or tiny_vlm.CHECKPOINT), Runtime()
    with contextlib.nullcontext() if torch.cuda.is_available() else cpu_engine(), processes():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
        changes = {"expert_model_parallel_size": dist.get_world_size()}
        model = build_megatron_model(source, runtime, **changes)
        if torch.cuda.is_available():
            model, source = model.cuda(), source.to("cuda")
        attach_modality(model, image_token_id=source.config.image_token_id)
        yield runtime, Engine(model, PictureEncoder(source), arguments.batch)
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def deepspeed(arguments: argparse.Namespace) -> Iterator[tuple[Runtime, Any]]:
    """The tiny model, or a checkpoint of one's own, under DeepSpeed's AutoEP."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed_macs

    with processes():
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "expert_parallel": {"enabled": True, "autoep_size": dist.get_world_size()},
            "macs": {},
        }
        if arguments.model is None:
            clone.examples("tiny_vlm")
            import tiny_vlm.model
            import tiny_vlm.plain

            model: Any = tiny_vlm.model.load_model(arguments.checkpoint or tiny_vlm.CHECKPOINT)
        else:
            model, processor = load_model(arguments.model, arguments.dtype)
        engine = deepspeed_macs.initialize(model=model, config=config)[0]
        engine.eval()
        answers: Any
        if arguments.model is None:
            answers = tiny_vlm.plain.Engine(engine.module)
        else:
            answers = ProcessorEngine(engine.module, processor, getattr(arguments, "tokens", 1))
        yield engine.macs, answers


def own_batches(arguments: argparse.Namespace, requests: list[Request] | None) -> list[list[Any]]:
    """What the engine is asked, in batches; every rank has its share, and equally many batches."""
    if requests is None:
        clone.examples("tiny_vlm")
        from tiny_vlm import data

        asked: list[Any] = data.draw_samples(arguments.seed, "train", data.TASKS, arguments.samples)
    else:
        # In their order, pictures of one kind would make up one half, or all that is taken.
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(arguments.seed))
        requests = [requests[i] for i in order[: arguments.samples].tolist()]
        asked = [tiny_sample(one) for one in requests] if arguments.model is None else requests
    if arguments.model is not None:
        asked = [question_of(one) for one in asked]
    whole = arguments.batch * dist.get_world_size()
    count = len(asked) // whole
    if count < 2:
        raise ValueError(
            f"--data: found {len(asked)} requests, expected {2 * whole} or more: two batches "
            f"(--batch {arguments.batch}) for each of {dist.get_world_size()} processes"
        )
    rank = dist.get_rank()
    batches = [asked[number * whole : (number + 1) * whole] for number in range(count)]
    return [batch[rank * arguments.batch : (rank + 1) * arguments.batch] for batch in batches]


ENGINES = {"deepspeed": deepspeed, "megatron": megatron}
