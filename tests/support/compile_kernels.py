"""Compile every kernel for a GPU that need not be there: ``python compile_kernels.py`` prints, by kernel, its
forms, the most registers that a thread of one needs, the bytes of stack that it spills to, and its code's.

Triton brings the compiler down to the GPU's own code; the interpreter of the other tests forgives what
that does not. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from macs import MACSConfig, Modality, Tokens, Topology
from macs.adapters import routing_from_map
from macs.records.load import LayerRecorder
from macs.steps.compensation import CompensationTables, Dropped, compensate
from macs.steps.kernels.dispatch import kernels
from support.cases import build_policy

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, by what comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"REG:(\d+)", said))), max(map(int, re.findall(r"STACK:(\d+)", said)))


def compile_all() -> dict[str, list[tuple[int, int, int]]]:
    """Every kernel that plans under various settings launch: registers, stack and bytes of its forms."""
    compiled: dict[str, list[tuple[int, int, int]]] = {}
    seen = set()

    def instead(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        given = {**dict(zip(self.arg_names, args, strict=False)), **named}
        constants, signature = {}, {}
        for parameter in self.params:
            value = given[parameter.name]
            # As a launch does it: a number that is 1 is part of the program, unless it says otherwise.
            one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or one:
                constants[parameter.name], kind = value, "constexpr"
            elif isinstance(value, torch.Tensor):
                kind = POINTERS[value.dtype]
            else:
                kind = "fp32" if isinstance(value, float) else "i32"
            signature[parameter.name] = kind
        key = self.__name__, str(signature), str(constants)
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(fn=self, signature=signature, constexprs=constants)
        options = {name: named[name] for name in ("num_warps", "enable_fp_fusion") if name in named}
        cubin = triton.compile(source, target=HOPPER, options=options).asm["cubin"]
        compiled.setdefault(self.__name__, []).append((*usage(cubin), len(cubin)))

    # Nothing is computed: what the launches would have written is zeros, with which plans go on.
    with (
        mock.patch.object(JITFunction, "run", instead),
        mock.patch.object(torch, "empty", torch.zeros),
        kernels("triton"),
    ):
        for policy, settings in (
            ("macs", {}),
            ("paper", {"max_drop": 0.01}),
            ("macs", {"level": "expert"}),
            ("macs", {"weighting": "entropy"}),
            ("macs", {"weighting": "constant", "max_drop": 0.01, "spare_text": True}),
        ):
            _plan(settings, 2048, 128, 8, policy=policy)
        _plan({}, 4096, 512, 22)
        _plan({}, 7168, 256, 8, policy="padded")
        _plan({"target_load": 1.05}, 2880, 32, 4, policy="expanded-drop")
        _plan({}, 100, 6, 3, torch.bfloat16)
        _plan({}, 100, 6, 1, torch.float16)
        _plan({}, 100, 6, 3, sources=(0, 1))
        _plan({}, 2048, 128, 8, ranks=1)
        _plan({}, 2048, 128, 8, sources=tuple(range(8)), ranks=8)
        _plan({"target_load": 1.05}, 2048, 128, 8, sources=tuple(range(8)), policy="token-drop", ranks=8)
        for size, experts, k, rank, tables in (
            (2048, 128, 8, 16, 2),
            (2048, 128, 8, 8, 1),
            (100, 6, 3, 0, 1),
        ):
            _compensate(size, experts, k, rank, tables)
    return compiled


def _plan(
    settings: dict[str, Any],
    size: int,
    experts: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    sources: tuple[int, ...] = (0,),
    policy: str = "macs",
    ranks: int = 2,
) -> None:
    config = MACSConfig.from_dict({"min_tokens": 0, **settings})
    count = 256
    scores = torch.rand(count, experts).to(dtype)
    weights, chosen = scores.topk(k, 1)
    tokens = Modality.of(torch.rand(2, count // 2) < 0.5).tokens(sources=len(sources))
    hidden = torch.randn(count, size).bfloat16()
    planner = build_policy(policy, config, Topology(experts, ranks, sources=sources), k)
    plan = planner.plan(hidden, chosen, weights, scores, tokens)
    routing_from_map(*plan.as_map(experts), k)
    assert plan.statistics is not None
    LayerRecorder(planner.topology, k).record(plan.statistics)


def _compensate(size: int, experts: int, k: int, rank: int, tables: int) -> None:
    count = 64
    hidden, chosen = torch.randn(count, size).bfloat16(), torch.zeros(count, k, dtype=torch.int64)
    dropped = Dropped(hidden, chosen, torch.rand(count, k), chosen, Tokens.all_text(count, "cpu"))
    given = CompensationTables(
        torch.zeros(tables, size, rank).bfloat16(),
        torch.zeros(tables, rank),
        torch.zeros(tables, experts, 1 + rank, size).bfloat16(),
        torch.tensor([0, tables - 1]),
    )
    compensate(hidden, dropped, given)


if __name__ == "__main__":
    for name, forms in sorted(compile_all().items()):
        registers, stack, size = (max(column) for column in zip(*forms, strict=True))
        print(f"{name:24} {len(forms)} forms {registers:4} registers {stack:5} B stack {size:7} B code")
