"""One MoE layer of vLLM: its adapter, its plan and its estimates.

With tensor and expert parallelism every rank has all tokens and the same routing: it makes the same plan as
the others without exchanging anything, and computes its own experts' part.

Shapes: T tokens, k experts a token.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from macs.adapters import (
    LayerAdapter,
    LayerRuntime,
    Owner,
    Policy,
    Runtime,
    Topology,
    candidate_scores,
    current_modality,
)

from .router import reserve
from .step import is_planned


class MoELayerAdapter(LayerAdapter):
    """Of a ``MoERunner`` of vLLM."""

    def __init__(self, runner: Any, adds_estimates: bool) -> None:
        config = runner.moe_config
        ranks, experts = config.ep_size, config.num_logical_experts
        round_robin = ranks > 1 and runner.expert_map_manager.placement_strategy == "round_robin"
        homes = tuple(expert % ranks for expert in range(experts)) if round_robin else ()
        super().__init__(Topology(experts, ranks, homes), runner.router.top_k)
        self._partial = config.tp_size > 1 or ranks > 1
        self._runner, self._adds = Owner(runner), adds_estimates

    def router_weight(self) -> Tensor:
        runner = self._runner()
        weight: Tensor = runner.gate.weight
        return weight

    def plans_now(self) -> bool:
        return is_planned() and current_modality() is not None

    def refusal(self, policy: Policy) -> str | None:
        return "vLLM's workspaces are sized for k experts a token" if policy.adds_assignments else None

    def adds_estimates(self) -> bool:
        return self._adds

    def mixes_outputs(self) -> str | None:
        return "each rank has a part of every token's sum" if self._partial else None


class PlannedLayer:
    """Between the router and the experts of one layer."""

    def __init__(self, runner: Any, runtime: Runtime, adds_estimates: bool) -> None:
        self.macs: LayerRuntime = runtime.add_layer(MoELayerAdapter(runner, adds_estimates))
        self.name, self._compared = runner.layer_name, False
        self._router = runner.router
        runner.macs = self.macs
        reserve(runner.router)
        runner.router.macs_layer = self
        self._forward = runner._forward_impl
        runner._forward_impl = self._compensated

    def route(self, hidden: Tensor, logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of a router's choice: weights float [T, k] and logical experts [T, k], -1 for none."""
        count, device, router = len(hidden), hidden.device, self._router
        with self.macs.forward_pass(count, device, False) as acts:
            if not acts:
                return weights, ids
            experts = ids.long()
            grouped = getattr(router, "num_expert_group", None) and getattr(router, "use_grouped_topk", True)
            scores = candidate_scores(
                logits,
                experts,
                getattr(router, "scoring_func", "softmax"),
                getattr(router, "e_score_correction_bias", None),
                *((router.num_expert_group, router.topk_group) if grouped else ()),
            )
            tokens = self.macs.tokens(1, count, False, device)
            plan = self.macs.plan(hidden, experts, weights, scores, tokens)
        if plan is None:
            return weights, ids
        if not self._compared:
            same_on_all_ranks(self.name, plan.experts, self.macs.runtime.settings(False))
            self._compared = True
        return plan.weights.to(weights.dtype).contiguous(), plan.experts.to(ids.dtype).contiguous()

    def _compensated(self, *given: Any, **named: Any) -> Any:
        """The layer's output, before ranks add up their parts; one rank's gets the estimates."""
        output = self._forward(*given, **named)
        shared, routed = output if isinstance(output, tuple) else (None, output)
        if not isinstance(routed, Tensor):
            raise ValueError(f"MACS: found {type(routed).__name__} from {self.name}, expected its output")
        routed = self.macs.compensate(routed)
        return (shared, routed) if isinstance(output, tuple) else routed


def same_on_all_ranks(name: str, experts: Tensor, settings: dict[str, Any]) -> None:
    """Raise a ``RuntimeError`` unless all tensor-parallel ranks made one plan under the same settings, policy
    and profile. Called in a layer's first planned step; compares over the host."""
    import torch.distributed as dist
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return
    mine = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    mine.update(experts.to("cpu", torch.int64).numpy().tobytes())
    digests = [""] * group.world_size
    dist.all_gather_object(digests, mine.hexdigest(), group=group.cpu_group)
    if len(set(digests)) > 1:
        raise RuntimeError(
            f"MACS: {name} was planned differently on the {group.world_size} tensor-parallel ranks: found "
            "other routing, settings or profiles, expected the same on each"
        )
