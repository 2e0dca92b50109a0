"""Expert parallelism of vLLM's experts on a CPU, which MACS needs there.

Stock ones ignore ``expert_map`` and -1 in ``topk_ids``, and read beyond their weights
(vllm-project/vllm#57837). Here every assignment to an expert of this process becomes a row of its own.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from macs.adapters import Patch

rows: deque[int] = deque(maxlen=1 << 16)
"""Rows that the experts of this process computed, by call, the latest."""


def _replacements() -> list[tuple[Any, str, Any]]:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts as Experts

    stock = Experts.apply

    def apply(
        self: Any,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        **rest: Any,
    ) -> None:
        ids = topk_ids.long()
        here = ids if expert_map is None else torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)].long())
        token, slot = (here >= 0).nonzero(as_tuple=True)
        rows.append(len(token))
        output.zero_()
        if not len(token):
            return
        found = torch.empty(len(token), output.shape[-1], dtype=output.dtype)
        stock(
            self,
            output=found,
            hidden_states=hidden_states[token].contiguous(),
            w1=w1,
            w2=w2,
            topk_weights=topk_weights[token, slot][:, None].float().contiguous(),
            topk_ids=here[token, slot][:, None].to(topk_ids.dtype).contiguous(),
            activation=activation,
            global_num_experts=w1.shape[0],
            expert_map=None,
            **rest,
        )
        output.index_add_(0, token, found)

    return [(Experts, "apply", apply)]


_patch: Patch[str] = Patch(_replacements)


def install() -> None:
    """Let CPU experts skip what is dropped and what other ranks have; once a process."""
    if _patch.current is None:
        _patch.add("installed")
