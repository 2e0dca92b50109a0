"""MACS over the MoE blocks of a Hugging Face model as it is: one process, no engine.

    runtime = macs.Runtime(virtual_ranks=8)        # plan as if there were so many expert-parallel ranks
    macs.attach_plain(model, runtime)
    macs.attach_modality(model)

Every expert is computed here, so nothing gets faster: it shows on one device what MACS would do to a model's
answers and loads. It is also the smallest adapter there is. Its seam is the block's ``gate``, which returns
logits [T, E], combine weights [T, k] and experts [T, k].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..steps.scoring import full_scores, within_groups, without_outcasts
from ..topology import Topology
from .adapter import Seam
from .layer import LayerRuntime
from .runtime import Runtime


@dataclass(frozen=True)
class Gate:
    """What a class of gates makes of its logits: the score function; the names of its correction bias and of
    the number of its groups, and of how many of them a token uses, if it has any."""

    score_function: str
    bias: str | None = None
    groups: tuple[str, str] | None = None


GATES = {
    "MixtralTopKRouter": Gate("softmax"),
    "Qwen3MoeTopKRouter": Gate("softmax"),
    "Qwen3VLMoeTextTopKRouter": Gate("softmax"),
    "DeepseekV3TopkRouter": Gate("sigmoid", "e_score_correction_bias", ("num_group", "topk_group")),
}
"""The gates that are known, by the names of their classes; InternVL has Qwen3-MoE's, Kimi-VL
DeepSeek-V3's."""


def attach_plain(model: nn.Module, runtime: Runtime) -> Callable[[], None]:
    """Let a runtime plan every MoE block of a Hugging Face model.

    Args:
        model: has blocks, which are modules with ``experts`` and a ``gate``.
        runtime: with ``virtual_ranks``, the expert-parallel ranks to plan for.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: there is no block, or one whose gate is not among ``GATES``, for what another gate
            returns may mean something else.
    """
    blocks = {name: block for name, block in model.named_modules() if hasattr(block, "experts")}
    blocks = {name: block for name, block in blocks.items() if isinstance(block.experts, nn.Module)}
    if not blocks:
        raise ValueError(
            f"attach_plain: found no MoE block in {type(model).__name__}, expected modules with experts"
        )
    for name, block in blocks.items():
        found = type(getattr(block, "gate", None)).__name__
        if found not in GATES:
            raise ValueError(
                f"attach_plain: found a gate of {found} in {name or type(block).__name__}, expected one of "
                + ", ".join(GATES)
            )
        if getattr(block, "macs", None) is not None:
            raise ValueError(f"attach_plain: {name} has MACS already; undo that first")
    attached = [_PlainBlock(block, runtime) for block in blocks.values()]

    def undo() -> None:
        for one in attached:
            one.remove()

    return undo


class PlainSeam(Seam):
    """Of a Hugging Face block."""

    def __init__(self, gate: Any) -> None:
        super().__init__(Topology(len(gate.weight)), gate.top_k)
        self.gate = gate

    def router_weight(self) -> Tensor:
        return self.gate.weight


class _PlainBlock:
    """The hooks of one block: on the block, which knows B and S, and on its gate, which chooses."""

    def __init__(self, block: Any, runtime: Runtime) -> None:
        self.block = block
        self.gate = GATES[type(block.gate).__name__]
        self.layer: LayerRuntime = runtime.add_layer(PlainSeam(block.gate))
        self.shape: tuple[int, int] | None = None
        block.macs = self.layer  # where attach_modality looks for layers that plan
        self._hooks = (
            block.register_forward_pre_hook(self.enter, with_kwargs=True),
            block.gate.register_forward_hook(self.choose),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.block.macs = None

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """hidden_states [B, S, D] of the block, which the gate gets flattened."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.shape = hidden.shape[0], hidden.shape[1]

    def choose(
        self, module: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The gate's logits, and the planned weights and experts in the place of its own."""
        assert self.shape is not None
        count, device = self.shape[0] * self.shape[1], output[0].device
        with self.layer.forward_pass(count, device, module.training):
            if module.training or not self.layer.acts_on(count, device):
                return None
            return self._planned(module, args[0].reshape(count, -1), output)

    def _planned(
        self, module: Any, hidden: Tensor, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """``choose`` for hidden [T, D]; none while calibrating."""
        logits, weights, experts = output
        assert self.shape is not None
        scores = full_scores(logits, self.gate.score_function)
        groups = (None, None)
        if self.gate.groups is not None:
            groups = tuple(getattr(module, name) for name in self.gate.groups)
        if self.gate.bias is not None:
            scores = without_outcasts(scores, getattr(module, self.gate.bias), self.layer.top_k, *groups)
        scores = within_groups(scores, experts, groups[0])
        tokens = self.layer.tokens(*self.shape, False, logits.device)
        plan = self.layer.plan(hidden, experts, weights, scores, tokens)
        if plan is None:
            return None
        # Not every way of computing experts takes an index for none: what is dropped is computed by the first
        # expert, and weighs nothing.
        return logits, plan.weights, torch.where(plan.experts < 0, 0, plan.experts)
