"""Routing that was recorded, from Megatron's traces to recordings of MACS's own and back.

    macs trace router_trace_rank0.jsonl --to routing.safetensors      # what --moe-routing-trace-path wrote
    macs trace routing.rank0.safetensors --to router_trace_rank0.jsonl

``macs simulate``, ``macs bench`` and ``macs report`` read either; a recording is a tenth the size, and has
modality and weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from macs import TEXT, Recording

from .common.command import Parser, output_file
from .common.traces import is_trace, read_trace, write_trace


def main(given: Sequence[str] | None = None) -> None:
    parser = Parser("macs trace", __doc__)
    parser.add_argument("file", type=Path, help="a trace (.jsonl) or a recording (.safetensors)")
    parser.add_argument("--to", type=output_file, required=True, help="the other one")
    parser.add_argument("--experts", type=int, help="of a layer, where a trace does not say")
    parser.add_argument("--ranks", type=int, default=1, help="expert-parallel ranks of a trace's run")
    arguments = parser.parse_args(given)
    if is_trace(arguments.file) == is_trace(arguments.to):
        parser.error("found two files of one kind, expected a .jsonl and a .safetensors")
    if not arguments.file.is_file():
        parser.error(f"found no file {str(arguments.file)!r}")
    if is_trace(arguments.file):
        recording = read_trace(arguments.file, arguments.experts, arguments.ranks)
        recording.save(arguments.to)
    else:
        recording = Recording.load(arguments.file)
        named = re.search(r"rank(\d+)", arguments.file.name)
        write_trace(recording, arguments.to, int(named[1]) if named else 0)
    tensors = recording.tensors
    print(
        f"{len(tensors['counts'])} records of {int(tensors['layers'].max()) + 1} layers, "
        f"{len(tensors['modality'])} tokens, {float((tensors['modality'] != TEXT).double().mean()):.0%} of "
        f"them visual, {recording.top_k} of {recording.num_experts} experts each: {arguments.to}"
    )


if __name__ == "__main__":
    main()
