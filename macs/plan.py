"""What a policy returns: the plan of one MoE layer, and what it did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .steps.combine import map_of
from .steps.contracts import LOADS, SCALARS


def scalar_of(records: Tensor, name: str) -> Tensor:
    """A number of ``SCALARS`` out of records int64 [..., scalars + 3 E]: float64 [...]."""
    return records[..., list(SCALARS).index(name)].double() / SCALARS[name]


def load_of(records: Tensor, name: str) -> Tensor:
    """Loads of ``LOADS`` out of records int64 [..., scalars + 3 E]: int64 [..., E]."""
    loads = records[..., len(SCALARS) :].unflatten(-1, (len(LOADS), -1))
    return loads[..., LOADS.index(name), :]


@dataclass(frozen=True)
class PlanStatistics:
    """What a plan did, on the plan's device; every field adds up over sources and ranks.

    record int64 [scalars + 3 E]: whole numbers, so that sums are exact in any order. Its numbers go by
    name: each of ``SCALARS`` is a float64 scalar, ``planned`` the sources that planned (0: all were left
    alone), masses sums of combine weights; ``load_visual``, ``load_before`` and ``load_after`` are int64
    [E], valid tokens' assignments: what visual ones asked for, what all asked for, what they got.
    """

    record: Tensor

    @classmethod
    def scalar_names(cls) -> tuple[str, ...]:
        return tuple(SCALARS)

    def __getattr__(self, name: str) -> Tensor:
        if name in SCALARS:
            return scalar_of(self.record, name)
        if name in LOADS:
            return load_of(self.record, name)
        raise AttributeError(f"PlanStatistics has no {name!r}; it has {', '.join((*SCALARS, *LOADS))}")


@dataclass(frozen=True)
class Plan:
    """Where every assignment of a layer's tokens goes; statistics only where they were asked for.

    experts  int64 [T, k']  -1: dropped
    weights  [T, k']        combine weights, in the dtype they came in; 0 where dropped
    rerouted bool [T, k']
    k' is k for every policy but expanded drop, which may add the experts local to the token's rank.
    """

    experts: Tensor
    weights: Tensor
    rerouted: Tensor
    statistics: PlanStatistics | None

    def as_map(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """The plan as multi-hot routing_map bool [T, E] and probs [T, E], in the weights' dtype."""
        return map_of(self.experts, self.weights, num_experts)
