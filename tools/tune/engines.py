"""Models in their engines: plain, DeepSpeed's AutoEP, Megatron for the tiny model."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

import macs
from macs import Runtime
from macs.adapters import CallReader, ModalityHook

from ..common import clone
from ..common.processes import processes
from ..common.requests import ProcessorEngine, load_model


def loaded(arguments: argparse.Namespace) -> tuple[Any, Callable[[Any], Any]]:
    """The model, and what makes an engine of it that answers."""
    if arguments.model is None:
        import tiny_vlm.model
        import tiny_vlm.plain

        return tiny_vlm.model.load_model(arguments.checkpoint or tiny_vlm.CHECKPOINT), tiny_vlm.plain.Engine
    model, processor = load_model(arguments.model, arguments.dtype)
    return model, lambda module: ProcessorEngine(module, processor, arguments.tokens)


@contextlib.contextmanager
def megatron(arguments: argparse.Namespace) -> Iterator[tuple[Runtime, Any]]:
    """The tiny model in Megatron's static engine."""
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
        model, answering = loaded(arguments)
        if not hasattr(model.config, "vision_config"):
            config["macs"]["modality"] = "text"
        engine = deepspeed_macs.initialize(model=model, config=config)[0]
        engine.eval()
        yield engine.macs, answering(engine.module)


@contextlib.contextmanager
def plain(arguments: argparse.Namespace) -> Iterator[tuple[Runtime, Any]]:
    """The tiny model, or a checkpoint of one's own, on one device with the plain adapter."""
    runtime = Runtime(virtual_ranks=arguments.ranks)
    model, answering = loaded(arguments)
    model = model.cuda() if torch.cuda.is_available() else model
    macs.attach_plain(model, runtime)
    if hasattr(model.config, "vision_config"):
        macs.attach_modality(model)
    else:  # text alone
        ModalityHook(model, CallReader(text_only=True))
    yield runtime, answering(model)


def rank_of() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


ENGINES = {"plain": plain, "deepspeed": deepspeed, "megatron": megatron}


@contextlib.contextmanager
def running(arguments: argparse.Namespace) -> Iterator[tuple[Runtime, Any]]:
    """The model in the engine that is asked for."""
    if arguments.model is None:
        clone.examples()
    with ENGINES[arguments.engine](arguments) as (runtime, engine):
        yield runtime, engine
