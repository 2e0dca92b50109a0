"""A multimodal MoE answers questions about real pictures through Megatron-Core, with and without MACS.

    torchrun --nproc-per-node 2 examples/megatron_inference.py

Loads the tiny Qwen3-VL-MoE of this repository into Megatron's GPT model, its experts spread over
the processes (expert parallelism), and runs held-out pictures and texts, in mixed batches, through
Megatron's StaticInferenceEngine under every policy. On a CPU it uses gloo and a shim for Megatron's
CUDA calls; with GPUs it uses NCCL and no shim.
"""

from __future__ import annotations

import argparse
from typing import Any

from tiny_vlm.arguments import example


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
    model = build_megatron_model(source, runtime, expert_model_parallel_size=dist.get_world_size())
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


if __name__ == "__main__":
    example("megatron_inference", __doc__, build, "megatron", "alltoall")
