"""A Hugging Face Qwen3-VL-MoE under DeepSpeed's AutoEP, with and without MACS.

    torchrun --nproc-per-node 2 examples/deepspeed_qwen3_vl_moe.py
    deepspeed --num_gpus 2 examples/deepspeed_qwen3_vl_moe.py
    torchrun --nproc-per-node 8 examples/deepspeed_qwen3_vl_moe.py --model DIR

The tiny model of this repository answers questions about real pictures; with ``--model`` a checkpoint
directory of your own, in Hugging Face format and with its processor, describes photographs and
answers in words. Its experts are spread over the processes by ``examples/ds_autoep_config.json``, whose
"macs" block is all that MACS needs. On a CPU by default, on GPUs where there are any.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tiny_vlm.arguments import example

CONFIG = Path(__file__).parent / "ds_autoep_config.json"


FLAGS: dict[str, dict[str, Any]] = {
    "--model": {"type": Path, "help": "a checkpoint directory in Hugging Face format"},
    "--dtype": {"default": "auto", "help": "of --model: auto, float32, bfloat16, ..."},
    "--tokens": {"type": int, "default": 16, "help": "tokens of an answer of --model"},
    "--deepspeed_config": {"type": Path, "default": CONFIG},
    "--local_rank": {"type": int, "help": "set by the deepspeed launcher"},
}


def build(arguments: argparse.Namespace, console: Any) -> Any:
    """The model in DeepSpeed's engine, with MACS."""
    import torch.distributed as dist
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from tiny_vlm import model as tiny
    from tiny_vlm.clock import LayerClock
    from tiny_vlm.experiment import PAPER, Experiment
    from tiny_vlm.own_model import OwnExperiment
    from tiny_vlm.plain import Engine

    import deepspeed_macs
    from macs_tools.common.requests import ProcessorEngine, load_model
    from macs_tools.tune.sources import FromCache

    model: Any
    config = json.loads(arguments.deepspeed_config.read_text())
    config["expert_parallel"]["autoep_size"] = dist.get_world_size()
    if arguments.model is None:
        model, kind = tiny.load_model(arguments.checkpoint), Experiment
    else:
        kind = OwnExperiment
        model, processor = load_model(arguments.model, arguments.dtype)
    engine = deepspeed_macs.initialize(model=model, config=config)[0]
    engine.eval()
    if arguments.model is None:
        answers: Any = Engine(engine.module)
    else:
        answers = ProcessorEngine(engine.module, processor, arguments.tokens)
    return kind(
        arguments,
        console,
        engine.macs,
        answers,
        LayerClock(engine.module, AutoEPMoELayer, length_axis=1),
        dist.group.WORLD,
        {"paper": PAPER, config["macs"].get("preset", "default"): (engine.macs.policy, engine.macs.config)},
        # Of a large vocabulary they would not fit; macs evaluate measures the KL of --model.
        FromCache(engine.macs, answers) if arguments.model is None else None,
    )


if __name__ == "__main__":
    example("deepspeed_qwen3_vl_moe", __doc__, build, "deepspeed", "AutoEP", FLAGS)
