"""``macs bench generate``: prompts through Megatron's static inference engine, stock and planned.

A model of random weights, two layers of the shape; its routers choose as the workload says while they read
prompts, and by themselves while they answer. Image tokens are one input id, found by ``attach_modality``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from rich.console import Console
from rich.table import Table
from torch import Tensor

from macs import TEXT, Runtime
from megatron_macs import attach_modality, with_macs

from ..common.command import quiet
from ..common.layers import Asked, device, engine, force, join, settings_of, together
from ..common.static_engine import answer, static_engine
from ..common.workloads import NOTHING_OVER, VANILLA, Batch, Contender, Shape, draw
from .arguments import running

LAYERS, PROMPTS, NEW_TOKENS, VOCABULARY, IMAGE_ID = 2, 8, 8, 512, 3


class _Numbers:
    """A tokenizer for which a word is a number."""

    bos, eod, vocab_size = None, 0, VOCABULARY

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(int(one)) for one in ids)


def build(
    shape: Shape, runtime: Runtime | None, asked: Asked, experts_of: GPTModel | None = None
) -> GPTModel:
    """A GPT model of random weights, the same for every runtime, routed by ``asked``."""
    config = settings_of(
        shape,
        dist.get_world_size(),
        num_layers=LAYERS,
        num_attention_heads=max(1, shape.hidden // 64),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        attention_backend=AttnBackend.local,
        pipeline_dtype=torch.float32,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=shape.experts, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    torch.manual_seed(0)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec if runtime is None else with_macs(spec, runtime),
        vocab_size=VOCABULARY,
        max_sequence_length=shape.tokens,
        position_embedding_type="rope",
    )
    for index, layer in enumerate(model.decoder.layers):
        force(layer.mlp, asked)
        if experts_of is not None:
            layer.mlp.experts = experts_of.decoder.layers[index].mlp.experts
    return model.eval().to(device())


class Prompted:
    """A model in the engine."""

    def __init__(self, model: GPTModel, length: int) -> None:
        self.engine = static_engine(model, _Numbers(), PROMPTS, length + NEW_TOKENS)

    def __call__(self, prompts: Tensor, tokens: int) -> list[list[int]]:
        return answer(self.engine, prompts.tolist(), tokens)


def prompts_of(batch: Batch, length: int) -> tuple[Tensor, Tensor]:
    """Input ids [B, S], and logits [S B, E] in Megatron's order, of a batch of sequences end to end."""
    ids = torch.randint(IMAGE_ID + 1, VOCABULARY, batch.ids.shape, generator=torch.Generator().manual_seed(0))
    ids = torch.where(batch.ids != TEXT, IMAGE_ID, ids).view(-1, length)
    logits = batch.logits.view(len(ids), length, -1).transpose(0, 1)
    return ids, logits.flatten(0, 1).to(device())


def measure(
    shape: Shape, chosen: dict[str, Contender], arguments: argparse.Namespace, rank: int
) -> dict[str, Any]:
    """Rows of the table, on every rank alike: of a workload's first step, which every turn repeats.

    No policy is timed unless the planned model, planning nothing, answers as the stock one does.
    """
    length = shape.tokens // PROMPTS
    asked = Asked(own_otherwise=True)
    runtime = Runtime()
    rng = random.Random(0)
    stock = build(shape, None, asked)
    planned = build(shape, runtime, asked, stock)
    attach_modality(planned, image_token_id=IMAGE_ID)
    engines = {title: Prompted(planned, length) for title in chosen}
    planned_engine = next((engines[title] for title in chosen if title != VANILLA), Prompted(planned, length))
    engines[VANILLA] = Prompted(stock, length)
    rows = []
    for workload in arguments.workloads:
        ids, asked.logits = prompts_of(
            draw(workload, shape, 0, rank, arguments.ranks, arguments.seed), length
        )
        times: dict[str, list[tuple[float, float]]] = {title: [] for title in chosen}
        loads: dict[str, float] = {}
        answers: dict[str, Any] = {}
        for turn in range(arguments.repeats + 1):
            for title, contender in rng.sample(list(chosen.items()), len(chosen)):
                runtime.use(contender.policy, contender.config.updated(min_tokens=64))
                for layer in runtime.layers:
                    layer.prepare(device())
                engine = engines[title]
                spent = together(partial(engine, ids, 1)), together(partial(engine, ids, NEW_TOKENS))
                if turn:
                    times[title].append(spent)
                    continue
                answers[title] = engine(ids, NEW_TOKENS)
                if title == VANILLA:
                    runtime.use(VANILLA)
                    counted = planned_engine(ids, NEW_TOKENS)
                    if counted != answers[title]:
                        raise RuntimeError(
                            f"generate: stock answers {answers[title]}, counted ones {counted}"
                        )
                if title != VANILLA:
                    reports = runtime.reports(parallel_state.get_expert_model_parallel_group())
                    loads[title] = float(reports[0].load("after").mean())
                    loads[VANILLA] = float(reports[0].load("before").mean())
        for title in chosen:
            if len(answers[title]) != PROMPTS or any(len(one) != NEW_TOKENS for one in answers[title]):
                raise RuntimeError(f"{title}: found {answers[title]}, expected {NEW_TOKENS} tokens a prompt")
            same = answers[title] == answers[VANILLA]
            if title == NOTHING_OVER and not same:
                raise RuntimeError(f"{title}: found {answers[title]}, expected vanilla's {answers[VANILLA]}")
            rows.append({"workload": workload, "policy": title, "load": loads.get(title)})
            for index, name in ((0, "prompt_"), (1, "")):
                own = [one[index] for one in times[title]]
                ratios = [one / base[index] for one, base in zip(own, times[VANILLA], strict=True)]
                rows[-1] |= {f"{name}ms": statistics.median(own), f"{name}ratio": statistics.median(ratios)}
    return {
        "rows": rows,
        "layers": LAYERS,
        "prompts": PROMPTS,
        "prompt_tokens": length,
        "new_tokens": NEW_TOKENS,
    }


def generate_rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    quiet(arguments.threads)
    with engine():
        join(rank, arguments.ranks, folder)
        found = measure(arguments.shape, running(arguments), arguments, rank)
        if rank == 0:
            (Path(folder) / "found.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()


def run_generate(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(generate_rank, (arguments, folder), nprocs=arguments.ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    table = Table(
        caption=f"Megatron's static engine, {arguments.ranks} processes of {arguments.threads} thread(s); "
        f"{found['layers']} layers, {found['prompts']} prompts of {found['prompt_tokens']} tokens a rank, "
        f"{found['new_tokens']} new ones; {arguments.repeats} turns",
        caption_justify="left",
    )
    for title in (
        "workload",
        "policy",
        "prompt, ms",
        "/ vanilla",
        "with answers, ms",
        "/ vanilla",
        "load",
    ):
        table.add_column(title, justify="left" if title in ("workload", "policy") else "right")
    for row in found["rows"]:
        table.add_row(
            row["workload"],
            row["policy"],
            f"{row['prompt_ms']:.0f}",
            f"{row['prompt_ratio']:.3f}",
            f"{row['ms']:.0f}",
            f"{row['ratio']:.3f}",
            "" if row["load"] is None else f"{row['load']:.3f}",
        )
    console.print(table)
    return found
