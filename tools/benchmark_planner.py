"""What planning costs: the planner's time beside that of the MoE layer it plans for.

    python tools/benchmark_planner.py

One process, Megatron-Core's real MoE layer (grouped experts of a gated MLP) on the CPU, or on the
GPU if there is one. Stock and MACS layers run in turn, and the planner alone in the same turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional

import macs
from macs import MACSConfig, Runtime
from macs.weighting import distinctness, feature_entropy
from megatron_macs import cpu_engine, with_macs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--virtual-ranks", type=int, default=4, help="expert-parallel ranks planned for")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def build_layer(arguments: argparse.Namespace, runtime: Runtime | None) -> nn.Module:
    """Megatron's MoE layer with random weights, the same for every runtime."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=arguments.hidden,
        num_attention_heads=8,
        moe_ffn_hidden_size=arguments.ffn,
        num_moe_experts=arguments.experts,
        moe_router_topk=arguments.top_k,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        activation_func=functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=arguments.experts, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    mlp = (spec if runtime is None else with_macs(spec, runtime)).submodules.mlp
    groups = get_default_pg_collection()
    torch.manual_seed(0)
    if isinstance(mlp, ModuleSpec):
        layer = build_module(mlp, config=config, pg_collection=groups)
    else:
        layer = mlp(config=config, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(1)
    return layer.eval()


def milliseconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    # Three in four tokens are visual and lean to one direction, so that some experts are hot.
    mask = torch.rand(1, arguments.tokens, generator=generator) < 0.75
    hidden = torch.randn(arguments.tokens, 1, arguments.hidden, generator=generator)
    hidden = hidden + mask.T[..., None] * torch.randn(arguments.hidden, generator=generator) * 0.5
    hidden, mask = hidden.to(device), mask.to(device)

    stock = build_layer(arguments, None).to(device)
    works: dict[str, Callable[[], Any]] = {"stock layer": lambda: stock(hidden)}
    for preset, config in {"paper": MACSConfig.preset("paper"), "default": MACSConfig()}.items():
        runtime = Runtime(config, virtual_ranks=arguments.virtual_ranks)
        layer = build_layer(arguments, runtime).to(device)
        seen: dict[str, tuple] = {}
        inner = runtime.layers[0].plan

        def remember(*inputs: Any, inner: Any = inner, seen: dict = seen) -> Any:
            seen["inputs"] = inputs
            return inner(*inputs)

        runtime.layers[0].plan = remember  # type: ignore[method-assign]
        # As under the engine's hook, one mask object serves every layer of a forward pass: its
        # layout is made once and not charged to each.
        ranks = arguments.virtual_ranks
        sequences = macs.Modality.of(mask.view(ranks, -1))
        batch = hidden.view(ranks, -1, arguments.hidden).transpose(0, 1).contiguous()

        def run(layer: nn.Module = layer, batch: Any = batch, sequences: Any = sequences) -> Any:
            with macs.modality(sequences):
                return layer(batch)

        run()
        planner = runtime.layers[0].planner
        works[f"{preset}: layer"] = run
        works[f"{preset}: planner"] = lambda planner=planner, seen=seen: planner.plan(*seen["inputs"])
    visual, source = mask[0], torch.zeros(len(hidden), dtype=torch.int64, device=device)
    works["entropy of the features"] = lambda: feature_entropy(hidden[:, 0])
    works["distinctness of the features"] = lambda: distinctness(hidden[:, 0], visual, source, 1)

    times: dict[str, list[float]] = {name: [] for name in works}
    with torch.inference_mode():
        for repeat in track(range(arguments.repeats + 2), "measuring", console=console):
            for name, work in works.items():
                elapsed = milliseconds(work)
                if repeat >= 2:
                    times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spreads = {
        name: (statistics.quantiles(values, n=4)[2] - statistics.quantiles(values, n=4)[0])
        for name, values in times.items()
    }
    return {
        "shape": {key: value for key, value in vars(arguments).items() if isinstance(value, int)},
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron": megatron.core.__version__,
        },
        "milliseconds": medians,
        "interquartile": spreads,
        "share_of_stock_layer": {name: value / medians["stock layer"] for name, value in medians.items()},
    }


def main() -> None:
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = Console()
    with (
        nullcontext() if torch.cuda.is_available() else cpu_engine(),
        tempfile.TemporaryDirectory() as folder,
    ):
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.FileStore(f"{folder}/store", 1),
            rank=0,
            world_size=1,
        )
        parallel_state.initialize_model_parallel()
        found = measure(arguments, console)
        dist.destroy_process_group()
    shape = found["shape"]
    table = Table(
        caption=f"T {shape['tokens']}, D {shape['hidden']}, FFN {shape['ffn']} (gated), "
        f"E {shape['experts']}, "
        f"k {shape['top_k']}; {found['device']}; medians of {shape['repeats']}",
        caption_justify="left",
    )
    for title in ("", "ms", "spread", "of the stock layer"):
        table.add_column(title, justify="left" if not title else "right")
    for name, value in found["milliseconds"].items():
        share = found["share_of_stock_layer"][name]
        table.add_row(name, f"{value:.2f}", f"{found['interquartile'][name]:.2f}", f"{share:.1%}")
    console.print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
