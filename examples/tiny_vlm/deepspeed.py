"""The tiny model under DeepSpeed: as AutoEP makes it, or built from ``deepspeed.moe.layer.MoE``."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read on import

import deepspeed
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLMoeForConditionalGeneration

from .experiment import VANILLA, Experiment


@contextmanager
def joined() -> Iterator[None]:
    """In the process group."""
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    yield


class SwiGLU(nn.Module):
    """An expert: hidden states [..., D] through D -> 2 F -> D."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


class MoEBlock(nn.Module):
    """DeepSpeed's MoE layer where a decoder layer has its MLP: it returns hidden states alone."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, S, D] -> the same."""
        return self.moe(hidden_states)[0]


@torch.no_grad()
def with_moe_layers(
    model: Qwen3VLMoeForConditionalGeneration, rank: int, ranks: int
) -> Qwen3VLMoeForConditionalGeneration:
    """The model with every MoE block built from ``deepspeed.moe.layer.MoE``, the weights its own.

    Its gate drops nothing and draws no lots, as the model was trained.
    """
    text = model.config.text_config
    local = text.num_experts // ranks
    for layer in model.model.language_model.layers:
        source = layer.mlp
        moe = MoE(
            hidden_size=text.hidden_size,
            expert=SwiGLU(text.hidden_size, text.moe_intermediate_size),
            num_experts=text.num_experts,
            ep_size=ranks,
            k=text.num_experts_per_tok,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        moe.deepspeed_moe.gate.wg.weight.copy_(source.gate.weight)
        for number, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts, rank * local):
            expert.gate_up.weight.copy_(source.experts.gate_up_proj[number])
            expert.down.weight.copy_(source.experts.down_proj[number])
        layer.mlp = MoEBlock(moe)
    return model.eval()


class MoEExperiment(Experiment):
    """Also counts the rows that experts compute: in this layer every expert computes as many as the
    fullest one, so these, not the loads, are what a step costs."""

    def watch(self, model: nn.Module) -> None:
        self.rows: dict[str, list[int]] = {}
        self.counted: list[int] = []
        for module in model.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(self._count)

    def _count(self, module: Experts, args: tuple[Tensor]) -> None:
        self.counted.append(args[0].numel() // args[0].shape[-1])

    def answers(self, batches: list, progress: object, title: str) -> list[list[int]]:
        self.counted.clear()
        found = super().answers(batches, progress, title)
        largest = max(self.counted)
        self.rows[title] = [rows for rows in self.counted if rows * 4 > largest]  # prompts, not decoding
        return found

    def further_columns(self, titles: list[str]) -> dict[str, list[str]]:
        means = {title: statistics.mean(self.rows[title]) for title in titles}
        return {"rows": [f"{means[title] / means[VANILLA]:.2f}" for title in titles]}
