"""MACS in the MoE blocks of a Hugging Face model: one process, no engine.

    runtime = macs.Runtime(virtual_ranks=8)        # plan as so many expert-parallel ranks would
    macs.attach_plain(model, runtime)
    macs.attach_modality(model)

Every expert is computed here, so nothing gets faster: it shows on one device what MACS does to a model's
answers and loads. It is also the smallest adapter. It hooks the block's ``gate``, which returns logits
[T, E], combine weights [T, k] and experts [T, k].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .runtime.adapter import LayerAdapter
from .runtime.layer import LayerRuntime
from .runtime.runtime import Runtime
from .steps.scoring import candidate_scores
from .topology import Topology


@dataclass(frozen=True)
class Gate:
    """A class of gates: its score function; the attributes of its correction bias, of the number of its
    groups and of how many of them a token uses, if it has any."""

    score_function: str
    bias: str | None = None
    groups: tuple[str, str] | None = None


GATES = {
    "MixtralTopKRouter": Gate("softmax"),
    "Qwen3MoeTopKRouter": Gate("softmax"),
    "Qwen3VLMoeTextTopKRouter": Gate("softmax"),
    "DeepseekV3TopkRouter": Gate("sigmoid", "e_score_correction_bias", ("num_group", "topk_group")),
}
"""Known gates by the names of their classes; InternVL has Qwen3-MoE's, Kimi-VL DeepSeek-V3's."""


def attach_plain(model: nn.Module, runtime: Runtime) -> Callable[[], None]:
    """Let a runtime plan every MoE block of a Hugging Face model.

    Args:
        model: has blocks, which are modules with ``experts`` and a ``gate``.
        runtime: with ``virtual_ranks``, the expert-parallel ranks to plan for.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: there is no block, or a gate is not in ``GATES``: its outputs may mean something else.
    """
    blocks = {
        name: block
        for name, block in model.named_modules()
        if isinstance(getattr(block, "experts", None), nn.Module)
    }
    if not blocks:
        raise ValueError(
            f"attach_plain: found no MoE block in {type(model).__name__}, expected modules with experts"
        )
    for name, block in blocks.items():
        gate = type(getattr(block, "gate", None)).__name__
        if gate not in GATES:
            raise ValueError(
                f"attach_plain: found a gate of {gate} in {name or type(block).__name__}, expected one of "
                + ", ".join(GATES)
            )
        if getattr(block, "macs", None) is not None:
            raise ValueError(f"attach_plain: {name} has MACS already; undo that first")
    attached = [_Block(block, runtime) for block in blocks.values()]

    def undo() -> None:
        for block in attached:
            block.remove()

    return undo


class GateAdapter(LayerAdapter):
    """``LayerAdapter`` of a Hugging Face gate."""

    def __init__(self, gate: Any) -> None:
        super().__init__(Topology(len(gate.weight)), gate.top_k)
        self.gate = gate

    def router_weight(self) -> Tensor:
        return self.gate.weight


class _Block:
    """The hooks of one block: on the block, which knows B and S, and on its gate, which routes."""

    def __init__(self, block: Any, runtime: Runtime) -> None:
        self.block = block
        self.gate = GATES[type(block.gate).__name__]
        self.layer: LayerRuntime = runtime.add_layer(GateAdapter(block.gate))
        self.shape: tuple[int, int] | None = None
        block.macs = self.layer  # where attach_modality looks for layers that plan
        self._hooks = (
            block.register_forward_pre_hook(self.enter, with_kwargs=True),
            block.gate.register_forward_hook(self.route),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.block.macs = None

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the shape of hidden_states [B, S, D], which the gate gets flattened."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.shape = hidden.shape[0], hidden.shape[1]

    def route(
        self, gate: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The gate's logits, and the planned weights and experts in place of its own."""
        assert self.shape is not None
        logits, weights, experts = output
        count, device = self.shape[0] * self.shape[1], logits.device
        with self.layer.forward_pass(count, device, gate.training):
            if gate.training or not self.layer.acts_on(count, device):
                return None
            bias = None if self.gate.bias is None else getattr(gate, self.gate.bias)
            groups = () if self.gate.groups is None else (getattr(gate, name) for name in self.gate.groups)
            scores = candidate_scores(logits, experts, self.gate.score_function, bias, *groups)
            tokens = self.layer.tokens(*self.shape, False, device)
            plan = self.layer.plan(args[0].reshape(count, -1), experts, weights, scores, tokens)
        if plan is None:
            return None
        # Not every expert implementation takes an index for none: a dropped assignment goes to the first
        # expert with weight 0.
        return logits, plan.weights, torch.where(plan.experts < 0, 0, plan.experts)
