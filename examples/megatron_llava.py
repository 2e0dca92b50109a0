"""A LLaVA-style model of Megatron answers questions about real pictures, with and without MACS.

    torchrun --nproc-per-node 2 examples/megatron_llava.py

A picture is one token of the prompt here; its 64 features take that token's place inside the model,
and MACS must know which tokens they became. The tiny model's weights in ``LLaVAModel``, behind
Megatron's ``VLMInferenceWrapper``, which serves one request at a time; experts are spread over the
processes. On a CPU it uses gloo and a shim for Megatron's CUDA calls.
"""

from __future__ import annotations

import argparse
from typing import Any

from tiny_vlm.arguments import example


def build(arguments: argparse.Namespace, console: Any) -> Any:
    """The LLaVA model in Megatron's engine, with MACS."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from tiny_vlm import model as tiny
    from tiny_vlm.clock import LayerClock
    from tiny_vlm.experiment import Experiment
    from tiny_vlm.megatron_llava import LLaVAEngine, build_llava_model

    from macs import Runtime
    from megatron_macs import attach_modality

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
    example(
        "megatron_llava",
        __doc__,
        build,
        "megatron",
        "LLaVA, a request at a time",
        samples=280,
        batch=14,
        repeats=3,
    )
