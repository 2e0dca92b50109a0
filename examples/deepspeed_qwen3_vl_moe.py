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
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from PIL import Image
from rich.console import Console
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.deepspeed import start
from tiny_vlm.experiment import (
    PAPER,
    PROFILE,
    Experiment,
    LayerClock,
    add_arguments,
    check_arguments,
    run,
)
from tiny_vlm.plain import Engine

import deepspeed_macs

CONFIG = Path(__file__).parent / "ds_autoep_config.json"
PICTURE_QUESTIONS = (
    "Describe this picture.",
    "What is in the foreground, and what is behind it?",
    "Which colours do you see?",
)
TEXT_QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
)


@dataclass(frozen=True)
class Request:
    """A question in words, perhaps about a picture; nobody knows the right answer."""

    text: str
    picture: Image.Image | None
    task: str = ""
    answer: None = None


class ProcessorEngine:
    """``generate`` of a model with a processor: chat template, left padding, a cache."""

    def __init__(self, model: Any, processor: Any, tokens: int) -> None:
        self.model, self.processor, self.tokens = model, processor, tokens
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    @torch.inference_mode()
    def generate(self, samples: Sequence[Request], tokens: int | None = None) -> list[list[int]]:
        """Greedy answers of equally many tokens, so that ranks stay in step."""
        tokens = self.tokens if tokens is None else tokens
        conversations = []
        for sample in samples:
            content: list[dict[str, Any]] = [{"type": "text", "text": sample.text}]
            if sample.picture is not None:
                content.insert(0, {"type": "image", "image": sample.picture})
            conversations.append([{"role": "user", "content": content}])
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        inputs = {
            name: tensor.to(self.model.device, self.model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }
        answers = self.model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            synced_gpus=dist.get_world_size() > 1,
        )
        return answers[:, inputs["input_ids"].shape[1] :].tolist()

    def words(self, ids: Sequence[int]) -> str:
        """An answer as text."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)


class OwnExperiment(Experiment):
    """Photographs and texts for a model of one's own."""

    def questions(self, seed: int, split: str, count: int) -> list[Request]:
        pictures = [Image.fromarray(pixels) for pixels in data.photographs(split)]
        found = []
        for number in range(count):
            if number % 4 == 3:
                found.append(Request(TEXT_QUESTIONS[number // 4 % len(TEXT_QUESTIONS)], None))
            else:
                question = PICTURE_QUESTIONS[number % len(PICTURE_QUESTIONS)]
                found.append(Request(question, pictures[(seed + number) % len(pictures)]))
        return found

    def own_question(self, picture: Path, question: str) -> Request:
        with Image.open(picture) as image:
            return Request(question, image.convert("RGB"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--model", type=Path, help="a checkpoint directory in Hugging Face format")
    parser.add_argument("--dtype", default="auto", help="of --model: auto, float32, bfloat16, ...")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer of --model")
    parser.add_argument("--deepspeed_config", type=Path, default=CONFIG)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    if arguments.model is not None:
        if not (arguments.model / "config.json").is_file():
            parser.error(f"--model: found no config.json in {arguments.model}")
        if arguments.profile == PROFILE:
            arguments.profile = PROFILE.with_name(f"{arguments.model.resolve().name}.profile.safetensors")
    return arguments


def build(arguments: argparse.Namespace, console: Console) -> Experiment:
    """The model in DeepSpeed's engine, with MACS."""
    config = json.loads(arguments.deepspeed_config.read_text())
    config["expert_parallel"]["autoep_size"] = dist.get_world_size()
    if arguments.model is None:
        model, kind = tiny.load_model(arguments.checkpoint), Experiment
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        kind = OwnExperiment
        model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype)
        processor = AutoProcessor.from_pretrained(arguments.model)
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
        {"paper": PAPER, config["macs"].get("preset", "default"): engine.macs.config},
    )


if __name__ == "__main__":
    run(parse_arguments(), start, build, f"DeepSpeed {deepspeed.__version__}, AutoEP")
