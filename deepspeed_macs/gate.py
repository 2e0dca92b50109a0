"""DeepSpeed's top-k gate, planning before anything is sent.

``MOELayer`` sends an [E, C, D] buffer with equal splits, and its experts compute all C rows of it: a step
costs what the fullest expert does. So C is the largest number of rows of an expert in the plans of all ranks.

Shapes: T tokens, D features, E experts, k experts a token by the gate, k' by the plan (k' = k but for
expanded drop), C rows of each expert.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import Tensor
from torch.nn import functional

from macs.adapters import LayerRuntime, candidate_scores, loads_of


class MACSTopKGate(TopKGate):
    """Routes as its base class does, dropless, then keeps, reroutes and drops by the plan.

    In ``train()`` mode or with MACS off it is the base class. Otherwise no token is dropped but by the plan,
    whatever ``drop_tokens`` says; and there is no random token selection, nor, unless ``sampling`` asks for
    it, Gumbel noise in the choice of the second expert of k = 2.
    """

    macs: LayerRuntime | None = None
    sequence_major = False
    sampling = False

    @classmethod
    def adopt(cls, gate: TopKGate, macs: LayerRuntime, *, sequence_major: bool, sampling: bool) -> None:
        """Turn an engine's gate into one of these, in place: weights, hooks and groups stay."""
        gate.__class__ = cls
        gate.macs, gate.sequence_major, gate.sampling = macs, sequence_major, sampling

    def train(self, mode: bool = True) -> MACSTopKGate:
        """As the base class; where serving begins, the router's rows are those of now."""
        super().train(mode)
        if not mode and self.macs is not None:
            self.macs.refresh()
        return self

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple[Any, ...]:
        """input [T, D], used_token (T values, 0: padding) -> what the base class returns.

        With ``sparse_routes`` (l_aux, C, E, experts int32 [k', T], places int32 [k', T], weights
        [k', T], exp_counts [E]), -1 for what is dropped; without it (l_aux, weights [T, E, C], mask
        bool [T, E, C], exp_counts [E]). ``exp_counts`` are the router's, before the plan.
        """
        if self.macs is None:
            return super().forward(input, used_token, sparse_routes, use_tutel)
        with self.macs.entering(len(input), input.device, self.training) as acts:
            if self.training or not self.macs.runtime.on:
                return self._stock(input, used_token, sparse_routes, use_tutel)
            return self._planned(input, used_token, sparse_routes, acts)

    def _stock(
        self, input: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool
    ) -> tuple[Any, ...]:
        """The base class's routes, with C equal on all ranks, as in a planned step.

        So ranks make the same collectives whether MACS is on or off, in train and eval mode. With
        ``drop_tokens=False`` the base class makes C equal by itself.
        """
        found = super().forward(input, used_token, sparse_routes, use_tutel)
        assert self.macs is not None
        if not self.drop_tokens or self.macs.adapter.group is None:
            return found
        if sparse_routes:
            auxiliary, capacity, *rest = found
            return auxiliary, self._agreed(capacity.clone()), *rest
        auxiliary, weights, mask, counts = found
        capacity = torch.tensor(weights.shape[2], device=weights.device)
        more = int(self._agreed(capacity)) - weights.shape[2]
        return auxiliary, functional.pad(weights, (0, more)), functional.pad(mask, (0, more)), counts

    def _planned(
        self, input: Tensor, used_token: Tensor | None, sparse_routes: bool, acts: bool
    ) -> tuple[Any, ...]:
        """The routes that the plan leaves, dropless where the step is too small to plan."""
        assert self.macs is not None
        logits = functional.linear(input.float(), self.wg.weight.float())
        if used_token is not None:
            used_token = used_token.flatten().long()
        auxiliary, experts, weights, counts = self._routes(logits, used_token)
        num_experts = logits.shape[1]
        if acts:
            tokens = self.macs.counted_tokens(len(input), self.sequence_major, input.device)
            if used_token is not None:
                tokens = tokens.only(used_token != 0)
            scores = candidate_scores(logits, experts, "softmax")
            plan = self.macs.plan(input, experts, weights, scores, tokens)
            if plan is not None:
                experts, weights = plan.experts, plan.weights
        capacity = self._rows(experts, num_experts)
        places = places_of(experts, num_experts, route_major=self.k == 2)
        if sparse_routes:
            routes = (experts.t().int(), places.t().int(), weights.t())
            return auxiliary, capacity, num_experts, *(one.contiguous() for one in routes), counts
        combine = dense_routes(experts, places, weights, num_experts, int(capacity))
        return auxiliary, combine, combine.bool(), counts

    def _routes(self, logits: Tensor, used_token: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The engine's own choice for logits [T, E], dropless: auxiliary loss, experts int64 [T, k]
        (-1: none, as for the unused tokens of k = 1), weights [T, k], loads [E].

        Its gating functions are asked for a local capacity; the plan's is agreed on afterwards.
        """
        if self.k == 1:
            # Without a lower bound, for fewer tokens than that are an error there.
            found = sharded_moe.top1gating(
                logits, 1.0, 0, used_token, drop_tokens=False, use_rts=False, sparse_routes=True
            )
        elif self.k == 2:
            sampling = self.sampling and self.top2_2nd_expert_sampling
            own = logits.clone() if sampling else logits  # the noise is added in place
            found = sharded_moe.top2gating(
                own, 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=sampling, sparse_routes=True
            )
        else:
            found = sharded_moe.topkgating(logits, self.k, 1.0, 0, drop_tokens=False, sparse_routes=True)
        auxiliary, _, _, experts, _, weights, counts = found
        return auxiliary, experts.t().long().contiguous(), weights.t().contiguous(), counts

    def _rows(self, experts: Tensor, num_experts: int) -> Tensor:
        """C: the most rows of an expert, over all ranks of the group; int64 []. Every rank calls it in every
        forward pass, also without tokens."""
        capacity = self._agreed(loads_of(experts, num_experts).amax())
        # The layer divides the C rows among tensor-parallel ranks, whose tokens are the same.
        shares = bwc_tensor_model_parallel_world_size(groups.mpu)
        return (capacity + shares - 1) // shares * shares

    def _agreed(self, capacity: Tensor) -> Tensor:
        """The largest capacity of the group's members, in place: int64 []"""
        assert self.macs is not None
        if self.macs.adapter.group is not None:
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.macs.adapter.group)
        return capacity


def places_of(experts: Tensor, num_experts: int, route_major: bool) -> Tensor:
    """The place of every assignment among its expert's rows: int64 [T, k'] -> int64 [T, k'], 0 for -1.

    In the order of the tokens; with ``route_major`` all first choices come before all second ones.
    The engine's gates fill their buffers in these orders, and a matrix product may round the same
    row differently in another place.
    """
    listed = experts.t() if route_major else experts
    flat = torch.where(listed < 0, num_experts, listed).flatten()
    order = torch.argsort(flat, stable=True)
    start = functional.pad(loads_of(listed, num_experts).cumsum(0), (1, 0))
    rank = torch.empty_like(flat).scatter_(0, order, torch.arange(len(flat), device=flat.device))
    place = torch.where(flat < num_experts, rank - start[flat], 0).view(listed.shape)
    return place.t() if route_major else place


def dense_routes(experts: Tensor, places: Tensor, weights: Tensor, num_experts: int, rows: int) -> Tensor:
    """Routes [T, k'] as one tensor of weights [T, E, C], C = rows."""
    tokens = len(experts)
    slot = torch.where(experts < 0, num_experts * rows, experts * rows + places)
    dense = weights.new_zeros(tokens, num_experts * rows + 1).scatter_(1, slot, weights)
    return dense[:, :-1].reshape(tokens, num_experts, rows)
