"""A MoE model from Megatron's own command line, with MACS's flags among its flags (0.18 and later).

    bash examples/launch/flags_on_a_laptop.sh

What a script of one's own has to do: ``add_macs_args`` as ``extra_args_provider``, ``runtime_from_args``,
``with_macs`` and ``attach_modality``. The weights are random: it is the plan that is shown. A script
that is not to change goes through ``python -m megatron_macs.launch`` instead.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from rich.console import Console
from rich.table import Table
from torch import Tensor

from macs import METRICS, Runtime
from megatron_macs import (
    add_macs_args,
    attach_modality,
    cpu_engine,
    runtime_from_args,
    tokens_from_args,
    with_macs,
)


def build(arguments: argparse.Namespace, runtime: Runtime | None) -> GPTModel:
    """The GPT model that Megatron's flags describe, its MoE layers planned where ``--moe-macs`` is given."""
    spec = get_gpt_layer_local_spec(
        num_experts=arguments.num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=arguments.qk_layernorm,
        normalization=arguments.normalization,
    )
    model = GPTModel(
        core_transformer_config_from_args(arguments),
        spec if runtime is None else with_macs(spec, runtime),
        vocab_size=arguments.vocab_size,
        max_sequence_length=arguments.max_position_embeddings,
        position_embedding_type=arguments.position_embedding_type,
        rotary_base=arguments.rotary_base,
        parallel_output=False,
    )
    if runtime is not None:
        attach_modality(model, **tokens_from_args(arguments))
    return (model.cuda() if torch.cuda.is_available() else model).eval()


def prompts(arguments: argparse.Namespace, image_token: int, count: int) -> Tensor:
    """Random prompts [B, S] of this rank, three quarters of each a picture."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, arguments.vocab_size, (count, arguments.seq_length), generator=generator)
    ids[:, 4 : 4 + arguments.seq_length * 3 // 4] = image_token
    return ids.cuda() if torch.cuda.is_available() else ids


def report(runtime: Runtime, console: Console) -> None:
    """What every layer planned, over all ranks."""
    found = [one.summary() for one in runtime.reports(parallel_state.get_expert_model_parallel_group())]
    table = Table("", *(f"layer {number}" for number in range(len(found))))
    for name, metric in METRICS.items():
        table.add_row(metric.title, *(format(one[name], metric.form) for one in found))
    console.print(table)


def main(arguments: argparse.Namespace) -> None:
    """Build the model, run a batch of prompts, say what was planned."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    parallel_state.initialize_model_parallel(
        arguments.tensor_model_parallel_size, expert_model_parallel_size=arguments.expert_model_parallel_size
    )
    torch.manual_seed(arguments.seed)
    console = Console(quiet=dist.get_rank() != 0)
    runtime = runtime_from_args(arguments)
    model = build(arguments, runtime)
    ids = prompts(arguments, tokens_from_args(arguments).get("image_token_id", 0), 4)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.inference_mode():
        logits = model(ids, positions, None)
    console.print(f"logits of {tuple(logits.shape)}, {'stock' if runtime is None else runtime.policy}")
    if runtime is not None:
        report(runtime, console)
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    arguments = parse_args(extra_args_provider=add_macs_args)
    with nullcontext() if torch.cuda.is_available() else cpu_engine():
        validate_args(arguments)
        main(arguments)
