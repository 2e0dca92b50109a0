"""What tokens ask for: loads by source and expert, and in which order assignments are admitted.

Shapes: T tokens, k' assignments of a token, E experts, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import Tokens
from .contracts import Choice, Demand, Sums, Terms
from .fixed_point import PRIORITY_BITS, UNIT, to_fixed
from .kernels.dispatch import fused

EXEMPT_PRIORITY = (1 << PRIORITY_BITS) + 1
"""Above every other."""


@fused
def measure(choice: Choice, tokens: Tokens, weight: Tensor, terms: Terms, sums: Sums) -> Demand:
    """The assignments to be planned, in their order; adds to ``sums`` what is asked of every expert, L_j, the
    costs of the assignments to j, and its totals by source.

    weight int64 [T]: semantic weights. By falling ``priority_of``, exempt tokens first; then by the token's
    position, a token's own k before those a policy adds, then by the expert: ``order_of`` with ``places_of``
    places.
    """
    planned = tokens.valid[:, None] & (choice.experts >= 0)
    _add_loads(choice.experts, planned, tokens, weight, sums)
    own, count = choice.experts.clamp(min=0), choice.scores.shape[1]
    priority = priority_of(choice.scores.gather(1, own), weight, terms.priority)
    priority = priority.masked_fill(tokens.exempt[:, None], EXEMPT_PRIORITY)
    spread, place = count, own
    if own.shape[1] > choice.top_k:
        added = torch.arange(own.shape[1], device=own.device) >= choice.top_k
        spread, place = 2 * count, own + count * added
    order = order_of(priority, tokens.position[:, None] * spread + place, places_of(choice))
    return Demand(choice, tokens, weight, terms, order, planned)


def _add_loads(experts: Tensor, planned: Tensor, tokens: Tokens, weight: Tensor, sums: Sums) -> None:
    sources, count = sums.rows.shape
    cell = experts if sources == 1 else tokens.source[:, None] * count + experts
    cell, one = cell.masked_fill(~planned, 0).flatten(), planned.long()
    sums.rows.view(-1).scatter_add_(0, cell, one.flatten())
    if sums.cost.numel():
        sums.cost.view(-1).scatter_add_(0, cell, (one * weight[:, None]).flatten())
    sums.tokens.scatter_add_(0, tokens.source, tokens.valid.long())
    sums.weight.scatter_add_(0, tokens.source, weight * tokens.valid)
    sums.visual_weight.scatter_add_(0, tokens.source, weight * tokens.visual)


def priority_of(score: Tensor, weight: Tensor, rule: str) -> Tensor:
    """Admission priority by rule "score" or "product" (with the weight).

    score [T, m] in 0..1, weight int64 [T] in fixed point -> int64 [T, m] in 0..2 ** PRIORITY_BITS.
    """
    value = score.double()
    if rule == "product":
        value = (weight.double() / UNIT)[:, None] * value
    return to_fixed(value.clamp(0, 1), 1 << PRIORITY_BITS)


def order_of(priority: Tensor, place: Tensor, places: int) -> Tensor:
    """One number for each assignment that rises as its priority falls, then with its place. int64

    priority in 0..EXEMPT_PRIORITY, place in 0..places-1, of the same shape.
    """
    return ((EXEMPT_PRIORITY - priority) << place_bits(places)) | place


def places_of(choice: Choice) -> int:
    """How many places the assignments of a choice may have."""
    tokens, experts = choice.scores.shape
    return tokens * experts * (2 if choice.experts.shape[1] > choice.top_k else 1)


def place_bits(places: int) -> int:
    """Bits that a place takes."""
    return max(1, (places - 1).bit_length())


def order_bits(places: int, pools: int) -> int:
    """Bits that an order takes; a ``ValueError`` where a sort by pool and order has none left."""
    bits = PRIORITY_BITS + 1 + place_bits(places)
    if (pools + 1).bit_length() + bits > 63:
        raise ValueError(
            f"plan: {pools} pools and {places} places need {(pools + 1).bit_length() + bits}-bit keys, 63 is "
            "the most; plan fewer tokens or sources at once"
        )
    return bits
