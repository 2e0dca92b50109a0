"""Expanded drop's further candidates: the experts on a token's own rank.

Shapes: T tokens, k assignments of a token, E experts, G experts of a rank.
"""

from __future__ import annotations

import torch

from ..tokens import Tokens
from .combine import weight_of_score
from .contracts import Choice, Constants
from .kernels.dispatch import fused


@fused
def add_local_experts(choice: Choice, tokens: Tokens, constants: Constants) -> Choice:
    """The choice and, behind it, the G experts of the token's own rank, each with ``weight_of_score``; -1
    where the token has that expert already, may not be sent there, is padding or exempt."""
    experts, scores = choice.experts, choice.scores
    local = constants.local_experts[tokens.source]
    nowhere = scores.shape[1]
    used = scores.new_zeros(len(scores), nowhere + 1, dtype=torch.bool)
    used = used.scatter_(1, experts.masked_fill(experts < 0, nowhere), True)
    open_ = ~used.gather(1, local) & tokens.valid[:, None] & ~tokens.exempt[:, None]
    added = scores.gather(1, local)
    open_ &= added > 0
    extra = torch.where(open_, local, -1)
    weights = torch.where(open_, weight_of_score(added, choice), 0)
    return Choice(
        torch.cat([experts, extra], 1), torch.cat([choice.weights, weights], 1), scores, choice.top_k
    )
