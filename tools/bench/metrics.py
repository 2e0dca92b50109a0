"""What live metrics cost: a step of a model's MoE layers with counters and without, and a scrape.

    macs bench metrics                              # 48 layers of 128 experts
    macs bench metrics --layers 4 --experts 16

One process plans as one of several ranks would; both runtimes take turns, over the same tokens.
"""

from __future__ import annotations

import json
import statistics
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import macs
from macs import MACSConfig, Runtime, Topology, serve_metrics
from macs.adapters import LayerAdapter
from macs.files import output_file

from ..common.clock import milliseconds
from ..common.command import Parser, quiet
from ..common.workloads import SHAPES, draw, features


class _Router(LayerAdapter):
    """A layer that is nothing but a router's rows."""

    def __init__(self, rows: Tensor, topology: Topology, top_k: int) -> None:
        super().__init__(topology, top_k)
        self.rows = rows

    def router_weight(self) -> Tensor:
        return self.rows


def main(given: Sequence[str] | None = None) -> None:
    parser = Parser("macs bench metrics", __doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=output_file, help="append the result, one line")
    arguments = parser.parse_args(given)
    if arguments.experts % arguments.ranks:
        parser.error(f"--ranks: found {arguments.ranks}, expected a divisor of {arguments.experts} experts")
    quiet()
    shape = replace(
        SHAPES["qwen3-vl-30b-a3b"], hidden=256, experts=arguments.experts, tokens=arguments.tokens
    )
    batch = draw("image-flood", shape, 0, 0, arguments.ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = [
        one.to(device)
        for one in (features(batch, shape.hidden, 0, 0), batch.experts, batch.weights, batch.scores)
    ]
    rows = torch.randn(shape.experts, shape.hidden)
    topology = Topology(shape.experts, arguments.ranks)
    runtimes = {"off": Runtime(MACSConfig(min_tokens=64)), "on": Runtime(MACSConfig(min_tokens=64))}
    layers = {
        name: [
            runtime.add_layer(_Router(rows.to(device), topology, shape.top_k))
            for _ in range(arguments.layers)
        ]
        for name, runtime in runtimes.items()
    }
    server = serve_metrics(runtimes["on"], 0)

    def step(name: str, count: int) -> None:
        modality = macs.Modality.of(batch.kinds[None, :count].to(device))
        with torch.inference_mode(), macs.modality(modality):
            for layer in layers[name]:
                with layer.forward_pass(count, device, False):
                    if layer.acts_on(count, device):
                        tokens = layer.tokens(1, count, False, device)
                        hidden, experts, weights, scores = (one[:count] for one in inputs)
                        layer.plan(hidden, experts, weights, scores, tokens)

    def scrape() -> bytes:
        with urllib.request.urlopen(f"http://{server.address}:{server.port}/metrics") as answer:
            return answer.read()

    spent: dict[str, list[float]] = {}
    for turn in range(arguments.repeats + 1):
        for kind, count in (("prefill", shape.tokens), ("decode", 8)):
            for name in runtimes:
                took = milliseconds(partial(step, name, count))
                if turn:
                    spent.setdefault(f"{kind} {name}", []).append(took)
        took = milliseconds(scrape)
        if turn:
            spent.setdefault("scrape", []).append(took)
    answer = scrape()
    server.close()
    found: dict[str, Any] = {name: statistics.median(values) for name, values in spent.items()}
    for kind in ("prefill", "decode"):
        found[f"{kind} ratio"] = statistics.median(
            on / off for on, off in zip(spent[f"{kind} on"], spent[f"{kind} off"], strict=True)
        )
    found["bytes"] = len(answer)
    found["series"] = sum(1 for line in answer.splitlines() if not line.startswith(b"#"))
    table = Table(title=f"live metrics of {arguments.layers} layers, {shape.experts} experts")
    for heading in ("", "off, ms", "on, ms", "on / off"):
        table.add_column(heading, justify="right" if heading else "left")
    for kind, what in (("prefill", f"plans of {shape.tokens} tokens"), ("decode", "a step that is bypassed")):
        each = [found[f"{kind} {name}"] for name in ("off", "on")]
        table.add_row(what, *(f"{value:.2f}" for value in each), f"{found[f'{kind} ratio']:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"a scrape: {found['scrape']:.1f} ms of another thread, {found['series']} series, "
        f"{found['bytes'] / 1000:.0f} kB"
    )
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
