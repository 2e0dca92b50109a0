"""A LLaVA-style model of Megatron answers questions about real pictures, with and without MACS.

    torchrun --nproc-per-node 2 examples/megatron_llava.py

A picture is one token of the prompt here; its 64 features take that token's place inside the model,
and MACS must know which tokens they became. The tiny model's weights in ``LLaVAModel``, behind
Megatron's ``VLMInferenceWrapper``, which serves one request at a time; experts are spread over the
processes. On a CPU it uses gloo and a shim for Megatron's CUDA calls.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

os.environ.setdefault("TQDM_DISABLE", "1")  # the engine's own bar; ours says more

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from rich.console import Console
from tiny_vlm import model as tiny
from tiny_vlm.experiment import Experiment, LayerClock, add_arguments, check_arguments, run
from tiny_vlm.megatron import start_expert_parallel
from tiny_vlm.megatron_llava import LLaVAEngine, build_llava_model

from macs import Runtime
from megatron_macs import attach_modality, cpu_engine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.set_defaults(samples=280, batch=14, repeats=3)
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    return arguments


def build(arguments: argparse.Namespace, console: Console) -> Experiment:
    """The LLaVA model in Megatron's engine, with MACS."""
    runtime = Runtime()
    model = build_llava_model(
        tiny.load_model(arguments.checkpoint), runtime, expert_model_parallel_size=dist.get_world_size()
    )
    if torch.cuda.is_available():
        model = model.cuda()
    attach_modality(model)
    return Experiment(
        arguments,
        console,
        runtime,
        LLaVAEngine(model),
        LayerClock(model, MoELayer, length_axis=0),
        parallel_state.get_expert_model_parallel_group(),
    )


if __name__ == "__main__":
    arguments = parse_arguments()
    with nullcontext() if torch.cuda.is_available() else cpu_engine():
        run(
            arguments,
            start_expert_parallel,
            build,
            f"Megatron-Core {megatron.core.__version__}, LLaVA, a request at a time",
        )
