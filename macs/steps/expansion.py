"""Expanded drop's further candidates: the experts on a token's own rank.

Shapes: T tokens, k assignments of a token, E experts, G experts of a rank.
"""

from __future__ import annotations

import torch

from ..tokens import Tokens
from .combine import weight_of_score
from .contracts import LayerConstants, Routing
from .kernels.dispatch import kernels_enabled


def add_local_experts(routing: Routing, tokens: Tokens, constants: LayerConstants) -> Routing:
    """Append the G experts of the token's own rank, each with ``weight_of_score``; -1 where the token has
    that expert already, may not be sent there, is padding or is exempt."""
    if kernels_enabled(routing.device):
        from .kernels import expansion as kernels

        return kernels.add_local_experts(routing, tokens, constants)
    experts, scores = routing.experts, routing.scores
    local, num_experts = constants.local_experts[tokens.source], scores.shape[1]
    used = scores.new_zeros(len(scores), num_experts + 1, dtype=torch.bool)
    used = used.scatter_(1, experts.masked_fill(experts < 0, num_experts), True)
    score = scores.gather(1, local)
    open_ = ~used.gather(1, local) & (tokens.valid & ~tokens.exempt)[:, None] & (score > 0)
    added = torch.where(open_, local, -1)
    weights = torch.where(open_, weight_of_score(score, routing), 0)
    return Routing(
        torch.cat([experts, added], 1), torch.cat([routing.weights, weights], 1), scores, routing.top_k
    )
