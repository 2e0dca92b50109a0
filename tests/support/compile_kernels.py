"""Compile every kernel for a GPU that need not be there: ``python compile_kernels.py`` prints their names.

Triton brings the compiler down to the GPU's own code; the interpreter of the other tests forgives what
that does not. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from macs import MACSConfig, Modality, Planner, Tokens, Topology
from macs.ops import kernels

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bool: "*i1",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
}


def compile_all() -> dict[str, int]:
    """Every kernel that plans under various settings launch: the bytes of its compiled forms."""
    compiled: dict[str, int] = {}
    seen = set()

    def instead(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        given = {**dict(zip(self.arg_names, args, strict=False)), **named}
        constants = {p.name: given[p.name] for p in self.params if p.is_constexpr}
        signature = {}
        for name in self.arg_names:
            value = given[name]
            if name in constants:
                signature[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        key = self.__name__, str(signature), str(constants)
        if key in seen:
            return
        seen.add(key)
        binary = triton.compile(ASTSource(fn=self, signature=signature, constexprs=constants), target=HOPPER)
        compiled[self.__name__] = compiled.get(self.__name__, 0) + len(binary.asm["cubin"])

    real = JITFunction.run
    JITFunction.run = instead
    try:
        with kernels("triton"):
            for settings in (
                {},
                {"preset": "paper", "normalization": "image", "max_load_factor": 1.2},
                {"level": "expert", "priority": "score"},
                {"priority": "weight", "weighting": "entropy"},
            ):
                _plan(settings, 2048, 128, 8)
            _plan({}, 100, 6, 3)
    finally:
        JITFunction.run = real
    return compiled


def _plan(settings: dict[str, Any], size: int, experts: int, k: int) -> None:
    config = MACSConfig.from_dict({"min_tokens": 0, **settings})
    count = 256
    weights, chosen = torch.rand(count, experts).topk(k, 1)
    tokens = Tokens.batch_major(Modality.of(torch.rand(1, count) < 0.5))
    hidden = torch.randn(count, size).bfloat16()
    planner = Planner(config, Topology(experts, 2, sources=(0,)), k)
    # Nothing was computed: what the launches would have written is not there to go on with.
    with suppress(IndexError, RuntimeError):
        planner.plan(hidden, chosen, weights, torch.rand(count, experts), tokens)


if __name__ == "__main__":
    for name, size in sorted(compile_all().items()):
        print(name, size)
