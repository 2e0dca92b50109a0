"""MACS in the MoE blocks of a Hugging Face model: one process, no engine.

    runtime = macs.Runtime(virtual_ranks=8)        # plan as so many expert-parallel ranks would
    macs.attach_plain(model, runtime)
    macs.attach_modality(model)

Every expert is computed here, so nothing gets faster: it shows on one device what MACS does to a model's
answers and loads. It is also the smallest adapter. It hooks the block's ``gate``, which returns logits
[T, E], combine weights [T, k] and experts [T, k].
"""

from __future__ import annotations

import threading
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
    "Qwen3OmniMoeThinkerTextTopKRouter": Gate("softmax"),
    "DeepseekV3TopkRouter": Gate("sigmoid", "e_score_correction_bias", ("num_group", "topk_group")),
}
"""Known gates by the names of their classes; InternVL has Qwen3-MoE's, Kimi-VL DeepSeek-V3's."""


EAGER_SKIPS_SINCE = 5, 24
"""The version of transformers whose eager experts take index E for none; its grouped_mm always has."""


def attach_plain(model: nn.Module, runtime: Runtime) -> Callable[[], None]:
    """Let a runtime plan every MoE block of a Hugging Face model.

    Args:
        model: has blocks, which are modules with ``experts`` and a ``gate``.
        runtime: with ``virtual_ranks``, the expert-parallel ranks to plan for.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: there is no block; a gate is not in ``GATES``: its outputs may mean something else; or the
            experts are divided among processes, or computed in a way that does not skip what is dropped.
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
        gate, known = gate_of(block)
        if known is None:
            raise ValueError(
                f"attach_plain: found a gate of {type(gate).__name__} in {name or type(block).__name__}, "
                "expected one of " + ", ".join(GATES)
            )
        if getattr(model, "has_ep", False) or _held(unwrapped(block.experts)) != len(gate.weight):
            raise ValueError(
                f"attach_plain: found experts of {name} divided among processes, as in transformers' expert "
                "parallelism, which computes the rows that a plan drops; expected one process, or AutoEP "
                "(deepspeed_macs.initialize)"
            )
        check_skips(unwrapped(block.experts))
        if getattr(block, "macs", None) is not None:
            raise ValueError(f"attach_plain: {name} has MACS already; undo that first")
    attached = [_Block(block, runtime) for block in blocks.values()]

    def undo() -> None:
        for block in attached:
            block.remove()

    return undo


def _held(experts: Any) -> int:
    """Experts that this process has weights of."""
    weight = getattr(experts, "down_proj", None)
    return len(experts) if weight is None else weight.shape[0]


def check_skips(experts: Any) -> None:
    """Raise a ``ValueError`` where an assignment to index E, none of the experts, would be computed."""
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"
    if implementation == "grouped_mm":
        return
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if implementation != "eager" or version < EAGER_SKIPS_SINCE:
        raise ValueError(
            f"attach_plain: found experts_implementation {implementation!r} of transformers "
            f"{transformers.__version__}, which would compute dropped assignments; expected 'grouped_mm' "
            '(model.set_experts_implementation("grouped_mm"))'
        )


def unwrapped(module: Any) -> Any:
    """The module inside PEFT's wrappers."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def gate_of(block: Any) -> tuple[Any, Gate | None]:
    """The gate inside wrappers, and its row of ``GATES``, by its class or one it derives from, as FSDP's do;
    none if it has none."""
    gate = unwrapped(getattr(block, "gate", None))
    names = [one.__name__ for one in type(gate).__mro__ if one.__name__ in GATES]
    return gate, GATES[names[0]] if names else None


class GateAdapter(LayerAdapter):
    """``LayerAdapter`` of the gate of a block."""

    def __init__(self, block: Any) -> None:
        gate, _ = gate_of(block)
        super().__init__(Topology(len(gate.weight)), gate.top_k)
        self.block = block
        # FSDP2 keeps a part of the rows on each process: they are put together now, on all of them.
        self._rows = gate.weight.full_tensor() if hasattr(gate.weight, "full_tensor") else None

    def router_weight(self) -> Tensor:
        """The rows that route: fetched as accelerate does where it keeps weights elsewhere between two calls,
        with what PEFT adds to them."""
        if self._rows is not None:
            return self._rows
        weight, wrapper = _loaded(gate_of(self.block)[0]), self.block.gate
        while isinstance(getattr(wrapper, "base_layer", None), nn.Module):
            if not (wrapper.disable_adapters or wrapper.merged):
                for name in wrapper.active_adapters:
                    if name in wrapper.lora_A:
                        weight = weight + wrapper.get_delta_weight(name).detach()
            wrapper = wrapper.base_layer
        return weight

    def refetch(self) -> None:
        """Put the rows together anew where FSDP2 keeps them in parts."""
        if self._rows is not None:
            self._rows = gate_of(self.block)[0].weight.full_tensor()


def _loaded(gate: Any) -> Tensor:
    """The weight of a gate, also where accelerate keeps it elsewhere."""
    if not gate.weight.is_meta:
        weight: Tensor = gate.weight
        return weight
    hook = getattr(gate, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            return kept["weight"]
    raise ValueError(
        f"router weights: found those of {type(gate).__name__} on the meta device, and no hook of accelerate "
        "that fetches them; expected weights that are loaded"
    )


class _Block:
    """The hooks of one block: on the block, which knows B and S, its gate, which routes, and its experts."""

    def __init__(self, block: Any, runtime: Runtime) -> None:
        self.block = block
        inner, known = gate_of(block)
        assert known is not None  # ``attach_plain`` has refused others
        self.gate = known
        self.layer: LayerRuntime = runtime.add_layer(GateAdapter(block))
        self.experts = unwrapped(block.experts)
        self.skips = getattr(self.experts, "_is_expert_parallel", None)
        if self.skips is not None:  # transformers 5.24 takes index E for none only where this is set
            self.experts._is_expert_parallel = True
        self.shapes: dict[int, tuple[int, int]] = {}  # by thread: several may be between block and gate
        block.macs = self.layer  # where attach_modality looks for layers that plan
        self._hooks = (
            block.register_forward_pre_hook(self.enter, with_kwargs=True),
            inner.register_forward_hook(self.route),  # which stays when a wrapper is taken off
            self.experts.register_forward_hook(self.combine),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.skips is not None:
            self.experts._is_expert_parallel = self.skips
        self.block.macs = None

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the shape of hidden_states [B, S, D], which the gate gets flattened."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.shapes[threading.get_ident()] = hidden.shape[0], hidden.shape[1]

    def combine(self, experts: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The experts' output with the estimates of what was dropped."""
        return self.layer.compensate(output)

    def route(
        self, gate: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The gate's logits, and the planned weights and experts in place of its own."""
        shape = self.shapes.pop(threading.get_ident())
        logits, weights, experts = output
        count, device = shape[0] * shape[1], logits.device
        with self.layer.forward_pass(count, device, gate.training) as acts:
            if not acts:
                return None
            bias = None if self.gate.bias is None else getattr(gate, self.gate.bias)
            groups = () if self.gate.groups is None else (getattr(gate, name) for name in self.gate.groups)
            scores = candidate_scores(logits, experts, self.gate.score_function, bias, *groups)
            tokens = self.layer.tokens(*shape, False, device)
            plan = self.layer.plan(args[0].reshape(count, -1), experts, weights, scores, tokens)
        if plan is None:
            return None
        check_skips(self.experts)  # generate may have changed it
        return (
            logits,
            plan.weights,
            torch.where(plan.experts < 0, self.layer.topology.num_experts, plan.experts),
        )
