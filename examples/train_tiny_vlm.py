"""Train the tiny Qwen3-VL-MoE of the examples: ``python examples/train_tiny_vlm.py``.

About an hour on one CPU core. The result is a Hugging Face checkpoint folder (safetensors, config, tokenizer,
image processor) with the log of the run in ``training_log.jsonl`` beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from tiny_vlm import data, easy_vqa
from tiny_vlm import model as tiny
from tiny_vlm.evaluate import accuracy_by_task, rank_imbalance
from tiny_vlm.training import TrainingBatch, draw_training_batch
from tiny_vlm.vocabulary import FILLER, VOCABULARY, build_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

RECIPES: dict[str, dict[str, int]] = {
    "digits": {"pictures": 8, "small": 2, "read": 3, "pairs": 2, "texts": 9},
    "easy-vqa": {"easy-vqa": 16},
}
"""Rows of a batch, by kind."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP, EVALUATE_EVERY = 200, 500
"""Steps."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--recipe", choices=RECIPES, default="digits", help="what a batch is made of")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak of the cosine")
    parser.add_argument("--balance", type=float, default=0.002, help="weight of the balancing loss")
    parser.add_argument(
        "--flood",
        type=float,
        default=1.0,
        help="visual tokens are held this uneven (E x sum of share x probability; 1 is even)",
    )
    parser.add_argument("--start", type=Path, help="a checkpoint to start from, of no more words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=tiny.CHECKPOINT)
    return parser.parse_args()


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < WARM_UP:
        return arguments.learning_rate * (step + 1) / WARM_UP
    share = (step - WARM_UP) / max(1, arguments.steps - WARM_UP)
    return arguments.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def unevenness(logits: Tensor, chosen: Tensor, config: Any) -> Tensor:
    """The model's own balancing loss of a layer over the chosen tokens, 1 where they are spread evenly."""
    loss = load_balancing_loss_func(
        (logits,), config.num_experts, config.num_experts_per_tok, attention_mask=chosen
    )
    return loss / config.num_experts_per_tok


def training_loss(model: torch.nn.Module, batch: TrainingBatch, flood: float) -> Tensor:
    """Cross entropy of the answers and of what image tokens show, plus the balancing loss.

    An image token should say what it shows twice: where it enters the language model, in the words'
    own embeddings, and where it leaves it. That is what teaches so small a model to read in minutes.
    Text is balanced; visual tokens are held as uneven as ``flood``, so that they crowd on some experts as
    they do in models whose router was balanced on text.
    """
    ids, labels, positions, attends, patches = (
        torch.from_numpy(array).to(DEVICE)
        for array in (batch.ids, batch.labels, batch.positions, batch.attends, batch.patches)
    )
    pictures = {name: tensor.to(DEVICE) for name, tensor in tiny.picture_inputs(batch.pixels).items()}
    words = model.model.language_model.embed_tokens
    features = model.model.visual(pictures["pixel_values"], grid_thw=pictures["image_grid_thw"]).pooler_output
    image = ids == model.config.image_token_id
    # The inner model: the outer one cannot balance under a four-dimensional attention mask.
    outputs = model.model(
        inputs_embeds=words(ids).masked_scatter(image[..., None], features),
        position_ids=positions.expand(3, *positions.shape),
        attention_mask=attends[:, None],
        output_router_logits=True,
    )
    logits = model.lm_head(outputs.last_hidden_state)
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=data.IGNORE
    )
    if (patches >= 0).any():
        entering = functional.linear(functional.rms_norm(features, features.shape[-1:]), words.weight)
        loss = loss + functional.cross_entropy(entering, patches[image])
        loss = loss + functional.cross_entropy(logits[image], patches[image])
    config = model.config.text_config
    text = ~image & (ids != VOCABULARY[FILLER])
    balance = sum(
        unevenness(layer, text, config) + (unevenness(layer, image, config) - flood).abs()
        for layer in outputs.router_logits
    )
    scale = config.router_aux_loss_coef * config.num_experts_per_tok / config.num_hidden_layers
    return loss + scale * balance


def samples_of(arguments: argparse.Namespace, split: str, count: int) -> dict[str, list[data.Sample]]:
    """So many samples of every task the recipe teaches; prompts of one length are together."""
    kinds: dict[str, tuple[str, ...]] = {"easy-vqa": easy_vqa.TASKS}
    if arguments.recipe == "digits":
        kinds = {"mixed": data.TASKS, **{task: (task,) for task in data.HARD_TASKS}}
    return {
        kind: data.draw_samples(arguments.seed, split, tasks, count * len(tasks))
        for kind, tasks in kinds.items()
    }


def measure(model: torch.nn.Module, samples: dict[str, list[data.Sample]]) -> dict[str, object]:
    """Accuracy by task, and the load over 4 and 2 ranks in the first kind of batch."""
    accuracy: dict[str, float] = {}
    for group in samples.values():
        accuracy |= accuracy_by_task(model, group)
    first = next(iter(samples.values()))
    return {
        "accuracy": accuracy,
        "imbalance": rank_imbalance(model, first, ranks=4),
        "imbalance of 2": rank_imbalance(model, first, ranks=2),
    }


@torch.no_grad()
def start_from(model: torch.nn.Module, folder: Path) -> None:
    """A trained model's weights; words that it has not are left as they are."""
    weights = tiny.load_model(folder).state_dict()
    for name, own in model.state_dict().items():
        own[: len(weights[name])].copy_(weights[name])


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log_file = arguments.out / "training_log.jsonl"

    def log(record: dict[str, object], mode: str = "a") -> None:
        with log_file.open(mode) as file:
            file.write(json.dumps(record) + "\n")

    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "start")}
    settings |= {"rows": RECIPES[arguments.recipe], "start": str(arguments.start)}
    log({"settings": settings, "torch": torch.__version__}, "w")
    model = tiny.build_model(arguments.seed, arguments.balance).to(DEVICE)
    if arguments.start is not None:
        start_from(model, arguments.start)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    validation = samples_of(arguments, "validation", 70)
    started, smooth = time.time(), float("nan")
    model.train()
    with Progress() as progress:
        bar = progress.add_task("training", total=arguments.steps)
        for step in range(arguments.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments)
            rng = np.random.default_rng([arguments.seed, 3, step])
            batch = draw_training_batch(rng, RECIPES[arguments.recipe])
            loss = training_loss(model, batch, arguments.flood)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value = loss.item()
            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            progress.update(bar, completed=step + 1, description=f"training, loss {smooth:.3f}")
            if (step + 1) % EVALUATE_EVERY == 0:
                model.eval()
                hours = round((time.time() - started) / 3600, 3)
                log(
                    {"step": step + 1, "loss": round(smooth, 4), **measure(model, validation), "hours": hours}
                )
                model.train()

    model.eval()
    # Half the file: the weights are rounded, and what is measured is what is kept.
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    tiny.build_image_processor().save_pretrained(arguments.out)
    result = {"test": measure(tiny.load_model(arguments.out), samples_of(arguments, "test", 300))}
    log(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
