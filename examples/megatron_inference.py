"""A multimodal MoE answers questions about real pictures through Megatron-Core, with and without MACS.

    torchrun --nproc-per-node 2 examples/megatron_inference.py

Loads the tiny Qwen3-VL-MoE of this repository into Megatron's GPT model, its experts spread over
the processes (expert parallelism), and runs held-out pictures and texts, in mixed batches, through
Megatron's StaticInferenceEngine under every policy. On a CPU it uses gloo and a shim for Megatron's
CUDA calls; with GPUs it uses NCCL and no shim.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

from tiny_vlm.arguments import checked, example_parser

from macs_tools.common.command import one_line, quiet


def parse_arguments() -> argparse.Namespace:
    parser = example_parser("megatron_inference", __doc__)
    parser.add_argument("--dispatcher", choices=("alltoall", "allgather"), default="alltoall")
    return checked(parser)


def build(arguments: argparse.Namespace, console: Any) -> Any:
    """The tiny model in Megatron's engine, with MACS."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from tiny_vlm import model as tiny
    from tiny_vlm.clock import LayerClock
    from tiny_vlm.experiment import Experiment, columns_of, share_of
    from tiny_vlm.megatron import PictureEncoder, build_megatron_model
    from tiny_vlm.megatron_engine import Engine

    from macs import Runtime
    from macs_tools.tune.sources import in_one_pass
    from megatron_macs import attach_modality

    source = tiny.load_model(arguments.checkpoint)
    runtime = Runtime()
    model = build_megatron_model(
        source,
        runtime,
        expert_model_parallel_size=dist.get_world_size(),
        moe_token_dispatcher_type=arguments.dispatcher,
    )
    attach_modality(model, image_token_id=source.config.image_token_id)
    pictures = PictureEncoder(source)
    if torch.cuda.is_available():
        model, pictures = model.cuda(), pictures.cuda()
    engine = Engine(model, pictures, share_of(arguments))
    return Experiment(
        arguments,
        console,
        runtime,
        engine,
        LayerClock(model, MoELayer, length_axis=0),
        parallel_state.get_expert_model_parallel_group(),
        columns_of(arguments),
        in_one_pass(engine),
    )


def main(arguments: argparse.Namespace) -> None:
    """Run what the arguments, which are in order, ask for."""
    import megatron.core
    import torch
    from tiny_vlm.experiment import run
    from tiny_vlm.megatron import start_expert_parallel

    from megatron_macs import cpu_engine

    title = f"Megatron-Core {megatron.core.__version__}, {arguments.dispatcher}"
    with nullcontext() if torch.cuda.is_available() else cpu_engine():
        run(arguments, start_expert_parallel, build, title)


if __name__ == "__main__":
    arguments = parse_arguments()
    quiet()
    with one_line("megatron_inference"):
        main(arguments)
