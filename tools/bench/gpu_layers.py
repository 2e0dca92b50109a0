"""Layers of the sizes that ``macs bench gpu`` checks, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """A layer as one source rank sees it: T tokens of size D, E experts of inner size F, R ranks."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    ranks: int


QWEN3_VL_30B = Size(8192, 2048, 768, 128, 8, 8)
SIZES = (
    QWEN3_VL_30B,
    Size(131072, 2048, 768, 128, 8, 8),
    Size(8192, 7168, 2048, 256, 8, 32),
    Size(4096, 4096, 1024, 512, 22, 64),
    Size(8192, 2880, 2880, 32, 4, 8),
)
DRY = Size(96, 64, 32, 8, 2, 4)
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "paper": {"policy": "paper"},
    "paper at 1.05": {"policy": "paper", "target_load": 1.05},
    "safe": {"preset": "safe"},
}


def inputs(size: Size, seed: int = 0) -> tuple[Any, ...]:
    """What ``Planner.plan`` takes: an image flood, whose visual tokens crowd the first ranks."""
    import torch

    from macs import Modality

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.rand(1, size.tokens, generator=generator, device=device) < 0.8
    logits = torch.randn(size.tokens, size.experts, generator=generator, device=device)
    crowd = torch.arange(size.experts, device=device) < size.experts // 4
    logits = logits + 1.5 * (mask[0][:, None] & crowd)
    scores = logits.softmax(1)
    weights, experts = scores.topk(size.top_k, 1)
    hidden = torch.randn(size.tokens, size.hidden, generator=generator, device=device) + 0.3
    return hidden.bfloat16(), experts, weights, scores, Modality.of(mask).tokens()


def case_of(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The policy, and the settings beside it."""
    return settings.get("policy", "macs"), {k: v for k, v in settings.items() if k != "policy"}


def planner_of(size: Size, settings: dict[str, Any]) -> Any:
    from macs import MACSConfig, Planner, Topology

    policy, given = case_of(settings)
    config = MACSConfig.from_dict({"min_tokens": 0, **given})
    return Planner(config, Topology(size.experts, size.ranks), size.top_k, policy)


def experts_of(size: Size, rows: Any) -> Callable[[], Any] | None:
    """The experts of one rank on so many rows each, int [G], by grouped GEMM; none where torch has none."""
    import torch
    from torch.nn import functional

    grouped = getattr(functional, "grouped_mm", None)
    if grouped is None or not torch.cuda.is_available():
        return None
    kind: Any = {"device": "cuda", "dtype": torch.bfloat16}
    up = torch.randn(len(rows), size.hidden, 2 * size.ffn, **kind) / 64
    down = torch.randn(len(rows), size.ffn, size.hidden, **kind) / 64
    ends = torch.as_tensor(rows, device="cuda").cumsum(0).to(torch.int32)
    tokens = torch.randn(int(ends[-1]), size.hidden, **kind)

    def work() -> Any:
        gate, value = grouped(tokens, up, offs=ends).chunk(2, -1)
        return grouped(functional.silu(gate) * value, down, offs=ends)

    return work
