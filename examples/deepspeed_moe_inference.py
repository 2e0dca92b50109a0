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
from pathlib import Path
from typing import Any

from tiny_vlm.arguments import example

CONFIG = Path(__file__).parent / "ds_config.json"


FLAGS: dict[str, dict[str, Any]] = {
    "--deepspeed_config": {"type": Path, "default": CONFIG},
    "--local_rank": {"type": int, "help": "set by the deepspeed launcher"},
}


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
    from macs_tools.tune.sources import FromCache

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
        FromCache(engine.macs, answers),
    )
    experiment.watch(engine.module)
    return experiment


if __name__ == "__main__":
    example("deepspeed_moe_inference", __doc__, build, "deepspeed", "deepspeed.moe.layer.MoE", FLAGS)
