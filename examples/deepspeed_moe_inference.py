"""A model built from ``deepspeed.moe.layer.MoE`` answers questions, with and without MACS.

    torchrun --nproc-per-node 2 examples/deepspeed_moe_inference.py
    deepspeed --num_gpus 2 examples/deepspeed_moe_inference.py

The tiny Qwen3-VL-MoE of this repository with DeepSpeed's own MoE layer in every block, its experts
spread over the processes, under ``deepspeed.init_inference`` with ``examples/ds_config.json``. All of
MACS is that file's "macs" block and one import. On a CPU by default, on GPUs where there are any.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tiny_vlm.arguments import checked, example_parser

from macs_tools.common.command import one_line, quiet

CONFIG = Path(__file__).parent / "ds_config.json"


def parse_arguments() -> argparse.Namespace:
    parser = example_parser("deepspeed_moe_inference", __doc__)
    parser.add_argument("--deepspeed_config", type=Path, default=CONFIG)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return checked(parser)


def build(arguments: argparse.Namespace, console: Any) -> Any:
    """The tiny model in DeepSpeed's inference engine, with MACS."""
    import torch.distributed as dist
    from deepspeed.moe.layer import MoE
    from tiny_vlm import model as tiny
    from tiny_vlm.clock import LayerClock
    from tiny_vlm.deepspeed import MoEExperiment, with_moe_layers
    from tiny_vlm.plain import Engine

    import deepspeed_macs
    from macs import MACSConfig
    from macs_tools.tune.sources import from_cache

    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = with_moe_layers(tiny.load_model(arguments.checkpoint), rank, ranks)
    config = json.loads(arguments.deepspeed_config.read_text())
    config["moe"]["ep_size"] = ranks
    engine = deepspeed_macs.init_inference(model, config)
    engine.eval()
    answers = Engine(engine.module)
    experiment = MoEExperiment(
        arguments,
        console,
        engine.macs,
        answers,
        LayerClock(engine.module, MoE, length_axis=1),
        dist.group.WORLD,
        {"paper": ("paper", MACSConfig()), "padded": (engine.macs.policy, engine.macs.config)},
        from_cache(engine.macs, answers, answers.inputs_of),
    )
    experiment.watch(engine.module)
    return experiment


def main(arguments: argparse.Namespace) -> None:
    """Run what the arguments, which are in order, ask for."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from tiny_vlm.deepspeed import start
    from tiny_vlm.experiment import run

    run(arguments, start, build, f"DeepSpeed {deepspeed.__version__}, deepspeed.moe.layer.MoE")


if __name__ == "__main__":
    arguments = parse_arguments()
    quiet()
    with one_line("deepspeed_moe_inference"):
        main(arguments)
