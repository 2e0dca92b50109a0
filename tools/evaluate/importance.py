"""How well what a planner can see predicts what an assignment is worth.

    macs importance --batches 4 --trials 12

The worth of an assignment is the KL, at the first token of the answer, between the model as it is and
the model without that one assignment. For assignments of visual tokens drawn at random, one of every
question in a pass: the rank correlation (Spearman) of that worth, within the question and layer by
layer, with everything training-free that could serve as a semantic weight or a priority.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import spearmanr
from tiny_vlm import CHECKPOINT, data
from tiny_vlm import model as tiny
from torch import Tensor
from torch.nn import functional

from macs import MACSConfig, Plan
from macs.files import output_file
from macs.steps.weighting import feature_entropy

from ..common.answers import read
from ..common.command import Parser
from .intervals import bootstrap
from .model import Bench, measuring, planning

EVERYTHING = MACSConfig(capacity_factor=1e6)
"""Room for all: the plan is the router's choice."""

FIRST = len(data.PICTURE_PREFIX) - 1 - data.IMAGE_TOKENS
"""Where a prompt's image tokens begin."""


@dataclass(frozen=True)
class Seen:
    """What one layer saw of a batch: hidden [S, B, D], experts int64 [S, B, k], scores [S, B, E]."""

    hidden: Tensor
    experts: Tensor
    scores: Tensor


def first_tokens(bench: Bench, batch: list[data.Sample]) -> Tensor:
    """Log-probabilities of every answer's first token, [B, V]."""
    return read(bench.model, bench.runtime, tiny.sample_inputs(batch)).logits.double().log_softmax(-1)


def observe(bench: Bench, batch: list[data.Sample]) -> tuple[Tensor, list[Seen]]:
    """The answers of the model as it is, and what every layer saw."""
    seen: list[Seen] = []
    size = len(batch)

    def keep(
        inner: Any, hidden: Tensor, experts: Tensor, weights: Tensor, scores: Tensor, tokens: Any
    ) -> Plan:
        seen.append(
            Seen(*(value.unflatten(0, (size, -1)).transpose(0, 1) for value in (hidden, experts, scores)))
        )
        return inner(hidden, experts, weights, scores, tokens)

    with planning(bench.runtime.layers, keep):
        return first_tokens(bench, batch), seen


def predictors(layer: int, seen: Sequence[Seen]) -> dict[str, Tensor]:
    """What could tell an assignment's worth, by name: [I, B, k] over the I image tokens."""
    image = slice(FIRST, FIRST + data.IMAGE_TOKENS)
    now = seen[layer]
    hidden, scores, experts = now.hidden[image], now.scores[image], now.experts[image]
    own = scores.gather(-1, experts)
    side = round(data.IMAGE_TOKENS**0.5)
    grid = functional.normalize(hidden, dim=-1).unflatten(0, (side, side))  # [side, side, B, D]
    alike = torch.zeros(grid.shape[:-1])
    count = torch.zeros(side, side, 1)
    for axis in (0, 1):
        near = (grid.narrow(axis, 1, side - 1) * grid.narrow(axis, 0, side - 1)).sum(-1)
        for start in (0, 1):
            alike.narrow(axis, start, side - 1).add_(near)
            count.narrow(axis, start, side - 1).add_(1)
    neighbours = (alike / count).flatten(0, 1)
    mean = functional.normalize(hidden.mean(0, keepdim=True), dim=-1)
    ordered = scores.sort(-1, descending=True).values
    by_token = {
        "entropy of the features, low": -feature_entropy(
            hidden.flatten(0, 1), torch.arange(hidden.shape[0] * hidden.shape[1])
        ).view(hidden.shape[:2]),
        "norm of the features": hidden.norm(dim=-1),
        "unlike its neighbours": -neighbours,
        "unlike the picture's mean": -(functional.normalize(hidden, dim=-1) * mean).sum(-1),
        "router's best score": ordered[..., 0],
        "router's margin": ordered[..., 0] - ordered[..., 1],
        "router's entropy, low": (scores * scores.clamp(min=1e-30).log()).sum(-1),
    }
    if layer > 0:
        before = seen[layer - 1].hidden[image]
        by_token["changed by the layer before"] = -functional.cosine_similarity(hidden, before, dim=-1)
    found = {"router's score": own}
    for name, value in by_token.items():
        found[name] = value[..., None].expand_as(own)
    for name in list(found)[1:]:
        value = found[name]
        spread = (value - value.mean()) / value.std().clamp(min=1e-9)
        found[f"score x {name}"] = own * spread.sigmoid()
    return found


def worth(
    bench: Bench, batch: list[data.Sample], layer: int, expected: Tensor, token: Tensor, slot: Tensor
) -> Tensor:
    """KL [B] of the answers when question b loses the assignment slot[b] of its image token token[b]."""
    question = torch.arange(len(batch))

    def lose(inner: Any, *inputs: Any) -> Plan:
        plan = inner(*inputs)
        row = question * (len(plan.experts) // len(batch)) + FIRST + token
        chosen, weights = plan.experts.clone(), plan.weights.clone()
        chosen[row, slot], weights[row, slot] = -1, 0
        return replace(plan, experts=chosen, weights=weights)

    with planning([bench.runtime.layers[layer]], lose):
        given = first_tokens(bench, batch)
    return (expected.exp() * (expected - given)).sum(-1)


Correlations = dict[str, list[tuple[int, float, float, float]]]
"""By predictor, for every layer: its number, the mean rank correlation and its 95 % interval."""


def measure(arguments: argparse.Namespace, console: Console) -> Correlations:
    """What every predictor tells of the worth of the split's assignments."""
    bench = Bench(arguments, 1)
    bench.runtime.use("macs", EVERYTHING)
    generator = torch.Generator().manual_seed(arguments.seed)
    # Nothing attends to what image tokens are after the last layer: there they are worth nothing.
    layers = range(len(bench.runtime.layers) - 1)
    # Of every layer, an array [trials, batch] for each batch.
    values: list[list[np.ndarray]] = [[] for _ in layers]
    predicted: list[dict[str, list[np.ndarray]]] = [{} for _ in layers]
    batches = bench.batches("image-flood")
    with Progress(console=console) as progress:
        bar = progress.add_task("leaving one out", total=len(batches) * len(layers) * arguments.trials)
        for batch in batches:
            expected, seen = observe(bench, batch)
            for layer in layers:
                features = predictors(layer, seen)
                slots = seen[layer].experts.shape[-1]
                # Different assignments of every question: [batch, trials].
                drawn = torch.rand(len(batch), data.IMAGE_TOKENS * slots, generator=generator)
                drawn = drawn.argsort(1)[:, : arguments.trials]
                token, slot = (drawn // slots).T, (drawn % slots).T
                kl = []
                for trial in range(arguments.trials):
                    kl.append(worth(bench, batch, layer, expected, token[trial], slot[trial]).numpy())
                    progress.advance(bar)
                values[layer].append(np.stack(kl))
                question = torch.arange(len(batch)).expand_as(token)
                for name, feature in features.items():
                    picked = feature[token, question, slot].numpy()
                    predicted[layer].setdefault(name, []).append(picked)
    found: Correlations = {}
    for layer in layers:
        truth = np.concatenate(values[layer], 1)  # [trials, questions]
        for name, parts in predicted[layer].items():
            of_layer = within_questions(truth, np.concatenate(parts, 1))
            found.setdefault(name, []).append((layer, *of_layer))
    return found


def within_questions(truth: np.ndarray, parts: np.ndarray) -> tuple[float, float, float]:
    """Mean over questions of the rank correlation within each, and its 95 % interval; both [trials, N].

    Questions differ in how sure the model is, and so in what anything is worth.
    """
    ranks = [spearmanr(one, other).statistic for one, other in zip(truth.T, parts.T, strict=True)]
    return bootstrap(np.nan_to_num(np.array(ranks)))


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("macs importance", __doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--batches", dest="count", type=int, default=4, help="of questions")
    parser.add_argument("--batch", type=int, default=56, help="questions asked at once")
    parser.add_argument("--trials", type=int, default=12, help="passes for each batch and layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=output_file, help="where to write the correlations")
    arguments = parser.parse_args(given)
    arguments.questions = arguments.count * arguments.batch
    arguments.batches, arguments.tuning = ["image-flood"], []
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and show what was measured."""
    arguments, console = parse_arguments(given), Console()
    with measuring():
        found = measure(arguments, console)
    layers = max(entry[0] for entries in found.values() for entry in entries) + 1
    table = Table(
        title="what predicts an assignment's worth: rank correlation by layer, 95 %",
        caption=f"{arguments.questions} questions, {arguments.trials} assignments of visual tokens each in "
        f"every layer but the last, after which nobody sees them; {arguments.split} split; by the mean over "
        "the layers from 1 on",
    )
    for name in ("", *(str(layer) for layer in range(layers))):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def mean(name: str) -> float:
        return float(np.mean([rank for layer, rank, _, _ in found[name] if layer > 0]))

    for name in sorted(found, key=lambda one: -mean(one)):
        cells = {layer: f"{rank:.2f} ({low:.2f} to {high:.2f})" for layer, rank, low, high in found[name]}
        table.add_row(name, *(cells.get(layer, "") for layer in range(layers)))
    console.print(table)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1))
