"""Demand: rows by source and expert, and the order in which assignments are admitted.

Shapes: T tokens, k' assignments of a token, E experts, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import Tokens
from .contracts import PRIORITY_BITS, UNIT, AdmissionRule, Counts, Demand, Routing, to_fixed
from .kernels.dispatch import kernels_enabled

EXEMPT_PRIORITY = (1 << PRIORITY_BITS) + 1
"""Above every other priority."""


def measure_demand(
    routing: Routing, tokens: Tokens, weight: Tensor, rule: AdmissionRule, counts: Counts
) -> Demand:
    """Order the assignments and add the load of every expert, L_j = sum of w_t, to ``counts``.

    Exempt tokens come first, then assignments by falling ``priority_of``; ties go to the token's position,
    to the router's own columns before those that a policy appends, then to the lower expert.

    Args:
        routing: the router's output.
        tokens: modality, position and source of each token.
        weight: semantic weights, int64 [T].
        rule: what priority and cost are.
        counts: its tokens, weights, rows and cost are added to.

    Returns:
        The demand; padding is not planned.
    """
    if kernels_enabled(routing.experts.device):
        from .kernels import demand as kernels

        return kernels.measure_demand(routing, tokens, weight, rule, counts)
    planned = tokens.valid[:, None] & (routing.experts >= 0)
    expert, (sources, num_experts) = routing.experts.clamp(min=0), counts.rows.shape
    cell = expert if sources == 1 else torch.add(expert, tokens.source[:, None], alpha=num_experts)
    counts.rows.view(-1).scatter_add_(0, cell.flatten(), planned.flatten().long())
    if counts.cost.numel():
        counts.cost.view(-1).scatter_add_(0, cell.flatten(), (planned * weight[:, None]).flatten())
    by_token = torch.stack([tokens.valid, weight * tokens.valid, weight * tokens.visual])
    counts.by_source.index_add_(1, tokens.source, by_token)

    priority = priority_of(routing.scores.gather(1, expert), weight, rule.priority)
    priority = priority.masked_fill(tokens.exempt[:, None], EXEMPT_PRIORITY)
    stride, tie = num_experts, expert
    if expert.shape[1] > routing.top_k:
        added = torch.arange(expert.shape[1], device=expert.device) >= routing.top_k
        stride, tie = 2 * num_experts, torch.add(expert, added, alpha=num_experts)
    tie = torch.add(tie, tokens.position[:, None], alpha=stride)
    return Demand(routing, tokens, weight, rule, admission_key(priority, tie, tie_count(routing)), planned)


def priority_of(score: Tensor, weight: Tensor, rule: str) -> Tensor:
    """Admission priority: the score, or its product with the weight.

    score [T, m] in 0..1, weight int64 [T] in fixed point -> int64 [T, m] in 0..2 ** PRIORITY_BITS.
    """
    value = score.double()
    if rule == "product":
        value = value * weight[:, None] / UNIT
    return to_fixed(value.clamp(0, 1), 1 << PRIORITY_BITS)


def admission_key(priority: Tensor, tie: Tensor, ties: int) -> Tensor:
    """int64 that rises as the priority falls, then with ``tie`` in 0..ties-1; all of one shape."""
    return torch.add(tie, EXEMPT_PRIORITY - priority, alpha=1 << tie_bits(ties))


def tie_count(routing: Routing) -> int:
    """Number of different tie-breaks of a routing's assignments."""
    tokens, experts = routing.scores.shape
    return tokens * experts * (2 if routing.experts.shape[1] > routing.top_k else 1)


def tie_bits(ties: int) -> int:
    return max(1, (ties - 1).bit_length())


def key_bits(ties: int, pools: int) -> int:
    """Bits of an admission key; a ``ValueError`` if a key and a pool do not fit int64 together."""
    bits = PRIORITY_BITS + 1 + tie_bits(ties)
    if (pools + 1).bit_length() + bits > 63:
        raise ValueError(
            f"plan: {pools} pools and {ties} tie-breaks need {(pools + 1).bit_length() + bits}-bit keys, "
            "expected at most 63; plan fewer tokens or sources at once"
        )
    return bits
