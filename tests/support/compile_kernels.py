"""Compile every kernel for a GPU that need not be there: ``python compile_kernels.py`` prints their names.

Triton brings the compiler down to the GPU's own code; the interpreter of the other tests forgives what
that does not. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

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
    torch.int8: "*i8",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


def compile_all() -> dict[str, int]:
    """Every kernel that plans under various settings launch: the bytes of its compiled forms."""
    compiled: dict[str, int] = {}
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
        binary = triton.compile(ASTSource(fn=self, signature=signature, constexprs=constants), target=HOPPER)
        compiled[self.__name__] = compiled.get(self.__name__, 0) + len(binary.asm["cubin"])

    # Nothing is computed: what the launches would have written is zeros, with which plans go on.
    with (
        mock.patch.object(JITFunction, "run", instead),
        mock.patch.object(torch, "empty", torch.zeros),
        kernels("triton"),
    ):
        for settings in (
            {},
            {"preset": "paper", "normalization": "image", "max_load_factor": 1.2},
            {"level": "expert", "priority": "score"},
            {"weighting": "entropy"},
        ):
            _plan(settings, 2048, 128, 8)
        _plan({}, 100, 6, 3, torch.bfloat16)
        _plan({}, 100, 6, 1, torch.float16)
        _plan({}, 100, 6, 3, sources=(0, 1))
    return compiled


def _plan(
    settings: dict[str, Any],
    size: int,
    experts: int,
    k: int,
    kind: torch.dtype = torch.float32,
    sources: tuple[int, ...] = (0,),
) -> None:
    config = MACSConfig.from_dict({"min_tokens": 0, **settings})
    count = 256
    scores = torch.rand(count, experts).to(kind)
    weights, chosen = scores.topk(k, 1)
    tokens = Tokens.batch_major(Modality.of(torch.rand(2, count // 2) < 0.5), len(sources))
    hidden = torch.randn(count, size).bfloat16()
    planner = Planner(config, Topology(experts, 2, sources=sources), k)
    planner.plan(hidden, chosen, weights, scores, tokens).as_map(experts)


if __name__ == "__main__":
    for name, size in sorted(compile_all().items()):
        print(name, size)
