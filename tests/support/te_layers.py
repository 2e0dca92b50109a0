"""Build Megatron's MoE layer from its transformer-engine spec with MACS, without a GPU; a program of its own.

transformer-engine's Python is imported as it is; its compiled extension is a stub, for nothing is computed.
Run by ``python -O``, which leaves out the assertions that compare the two. The argument is a folder to
import transformer-engine from, or nothing where it is installed. Prints a JSON line for each layer.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
OPTIONAL = ("onnxscript", "onnx", "onnx_ir", "nvdlfw_inspect", "flash_attn", "flash_attn_3")
CASES: list[dict[str, Any]] = [
    {},
    {"moe_router_fusion": True},
    {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 24},
    {"moe_router_dtype": "fp64"},
    {"fp8": "hybrid"},
]


class Anything(type):
    """A class that has whatever it is asked for, and may be called, as a decorator too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls._made(name)

    def _made(cls, name: str) -> Any:
        made = Anything(name, (), {})
        setattr(cls, name, made)
        return made

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 3 and isinstance(args[1], tuple):  # makes a class
            return type.__call__(cls, *args)
        decorated = len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType)
        return args[0] if decorated else Anything("made", (), {})

    def __iter__(cls) -> Any:
        return iter(())

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __int__(cls) -> int:
        return 0

    def __or__(cls, other: Any) -> Any:
        return cls

    def __ror__(cls, other: Any) -> Any:
        return cls


class Stub(types.ModuleType):
    """A module likewise."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = Anything(name, (), {})
        setattr(self, name, made)
        return made


class Finder:
    """Stubs for what transformer-engine imports if it is there, or takes for granted."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        wanted = name.split(".")[0] in OPTIONAL
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: Any) -> Any:
        return Stub(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__ = []


def stub_extension() -> None:
    """In the place of transformer-engine's compiled extension."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own word for: load no library
    folder = Path(importlib.util.find_spec("transformer_engine").submodule_search_locations[0])
    stub = Stub("transformer_engine_torch")
    source = (folder / "pytorch" / "constants.py").read_text()
    body = re.search(r"class DType\(.*?\n\n\n", source, re.S).group()
    names = re.findall(r"^    (k\w+)", body, re.M)
    stub.DType = enum.IntEnum("DType", {name: value for value, name in enumerate(names)})
    sys.modules["transformer_engine_torch"] = stub
    sys.meta_path.append(Finder())
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None


def main(folder: str | None) -> None:
    if folder:
        sys.path.insert(0, folder)
    stub_extension()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    import macs
    from megatron_macs import cpu_engine, with_macs
    from support.megatron_ranks import layer_config

    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with cpu_engine():
        parallel_state.initialize_model_parallel()
        # Asked for when a layer is built; nothing is put there.
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_capability = lambda *_: (9, 0)
        torch.cuda.current_device = lambda: 0
        for changes in CASES:
            config = layer_config("alltoall", 4, 2, moe_grouped_gemm=True, **changes)
            stock = get_gpt_layer_with_transformer_engine_spec(num_experts=4, moe_grouped_gemm=True)
            mlp = with_macs(stock, macs.Runtime()).submodules.mlp
            layer = mlp(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False)
            parts = layer, layer.experts, layer.token_dispatcher, layer.router, layer.shared_experts
            found = {"changes": changes, "parts": [type(part).__name__ for part in parts]}
            print("LAYER " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
