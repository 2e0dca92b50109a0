"""A Qwen3-VL-MoE served by vLLM with MACS, offline: pictures and texts in one batch.

    python examples/vllm_qwen3_vl_moe.py --target-load 0.7                  # a tiny random model, on a CPU
    python examples/vllm_qwen3_vl_moe.py --model MODEL --tensor-parallel-size 8 --target-load 0.7

docs/vllm.md has the installation and the same through the server.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).with_name("picture.png")
SMALL_MACHINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Of vLLM on a CPU: GiB of its cache, and no cores of its own for each process."""

SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"


def prompts(picture: Path) -> list[dict[str, Any]]:
    """A question about a picture, one without, and one about two pictures."""
    from PIL import Image

    image = Image.open(picture).convert("RGB")
    asked = [
        (f"{SHOWN}What is this?", [image]),
        ("Hello there, how are you?", []),
        (f"{SHOWN}{SHOWN}Compare them.", [image, image.rotate(90)]),
    ]
    return [
        {
            "prompt": f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
            **({"multi_modal_data": {"image": images}} if images else {}),
        }
        for text, images in asked
    ]


def main(given: Sequence[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", help="a checkpoint; without it a tiny random model is made")
    parser.add_argument("--tensor-parallel-size", type=int, default=2, help="and expert-parallel ranks")
    parser.add_argument("--target-load", type=float, help="of MACS; without it vLLM runs as it is")
    parser.add_argument("--macs", type=json.loads, default={}, help="further options and settings, JSON")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="answers and loads")
    arguments = parser.parse_args(given)

    entry = dict(arguments.macs)
    if arguments.model is None:
        import tiny_random_vlm

        arguments.model = str(tiny_random_vlm.make(Path(tempfile.mkdtemp())))
        arguments.dtype = "float32"
        entry = {"min_tokens": 8, **entry} if entry or arguments.target_load is not None else entry
        for name, value in SMALL_MACHINE.items():
            os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    if arguments.target_load is not None:
        entry["target_load"] = arguments.target_load
    model = LLM(
        model=arguments.model,
        tensor_parallel_size=arguments.tensor_parallel_size,
        enable_expert_parallel=arguments.tensor_parallel_size > 1,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        limit_mm_per_prompt={"image": 2, "video": 0},
        enable_prefix_caching=False,  # with it, only tokens that are not cached are planned
        enforce_eager=True,
        dtype=arguments.dtype,
        worker_extension_cls="vllm_macs.worker.MACSWorker",
        additional_config={"macs": entry} if entry else {},
    )
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    outputs = model.generate(prompts(arguments.picture), sampling)
    answers = [list(one.outputs[0].token_ids) for one in outputs]
    found: dict[str, Any] = {"answers": answers, "tokens": [len(one.prompt_token_ids) for one in outputs]}
    if entry:
        found["workers"] = model.collective_rpc("macs_loads")
        first = found["workers"][0]
        if not first["after"]:
            print("no step was planned: all had fewer than min_tokens tokens")
        for layer, (before, after) in enumerate(zip(first["before"], first["after"], strict=True)):
            print(f"layer {layer}: load {max(before):.2f} before planning, {max(after):.2f} after")
    print("\n".join(f"answer {number}: {ids}" for number, ids in enumerate(answers)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
