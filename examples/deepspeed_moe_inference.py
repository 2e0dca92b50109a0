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
import statistics
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from rich.console import Console
from tiny_vlm import model as tiny
from tiny_vlm.deepspeed import start, with_moe_layers
from tiny_vlm.experiment import (
    VANILLA,
    Experiment,
    LayerClock,
    add_arguments,
    check_arguments,
    run,
)
from tiny_vlm.plain import Engine

import deepspeed_macs
from macs import MACSConfig

CONFIG = Path(__file__).parent / "ds_config.json"


class MoEExperiment(Experiment):
    """Also counts the rows that experts compute: in this layer every expert computes as many as the
    fullest one, so these, not the loads, are what a step costs."""

    def watch(self, model: torch.nn.Module) -> None:
        self.rows: dict[str, list[int]] = {}
        self.counted: list[int] = []
        for module in model.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(self._count)

    def _count(self, module: Experts, args: tuple[torch.Tensor]) -> None:
        self.counted.append(args[0].numel() // args[0].shape[-1])

    def answers(self, batches: list, progress: object, title: str) -> list[list[int]]:
        self.counted.clear()
        found = super().answers(batches, progress, title)
        largest = max(self.counted)
        self.rows[title] = [rows for rows in self.counted if rows * 4 > largest]  # prompts, not decoding
        return found

    def further_rows(self, titles: list[str]) -> dict[str, list[str]]:
        means = {title: statistics.mean(self.rows[title]) for title in titles}
        return {"rows computed / vanilla": [f"{means[title] / means[VANILLA]:.2f}" for title in titles]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--deepspeed_config", type=Path, default=CONFIG)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    return arguments


def build(arguments: argparse.Namespace, console: Console) -> Experiment:
    """The tiny model in DeepSpeed's inference engine, with MACS."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = with_moe_layers(tiny.load_model(arguments.checkpoint), rank, ranks)
    config = json.loads(arguments.deepspeed_config.read_text())
    config["moe"]["ep_size"] = ranks
    engine = deepspeed_macs.init_inference(model, config)
    engine.eval()
    experiment = MoEExperiment(
        arguments,
        console,
        engine.macs,
        Engine(engine.module),
        LayerClock(engine.module, MoE, length_axis=1),
        dist.group.WORLD,
        {"paper": MACSConfig.preset("paper"), config["macs"].get("preset", "default"): engine.macs.config},
    )
    experiment.watch(engine.module)
    return experiment


if __name__ == "__main__":
    run(parse_arguments(), start, build, f"DeepSpeed {deepspeed.__version__}, deepspeed.moe.layer.MoE")
