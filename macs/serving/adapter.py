"""The contract between an engine and MACS: what an adapter hands over of a MoE layer, and what it gets.

An adapter derives a ``Seam`` for its engine, gives one of each MoE layer to ``Runtime.add_layer``, and gets
the layer's ``LayerRuntime``, whose ``tokens`` and ``plan`` it calls between routing and dispatch. It
compares no names of policies: what its engine cannot do it says in ``Limits``, and the core refuses what
needs it.
docs/adapters.md goes through both adapters, and through what a third one would write.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..config import MACSConfig
from ..policies import policy_of
from ..topology import Topology


@dataclass(frozen=True)
class Share:
    """Which tokens a process has, of those that meet in a layer's experts.

    index, parts: under sequence parallelism this process has the index-th part of every sequence, while
    masks cover whole ones. place: where the process stands among those whose tokens meet, 0, 1, 2 and so
    on, the same for processes with the same tokens; none: as its expert-parallel rank says.
    """

    index: int = 0
    parts: int = 1
    place: int | None = None


def place_among(ranks: list[int], own: int, replicas: int) -> int:
    """Where a rank's tokens stand among those of a group.

    Args:
        ranks: the group's global ranks.
        own: one of them.
        replicas: so many neighbours each hold the same tokens, as tensor-parallel ranks do.

    Returns:
        ``Share.place``, 0 for the first.
    """
    return sorted({rank // replicas for rank in ranks}).index(own // replicas)


@dataclass(frozen=True)
class Limits:
    """What an engine cannot do at a layer as it is set up, each with the reason; none: it can.

    added_assignments: give a token more than k experts. modality: tell visual tokens from text.
    """

    added_assignments: str | None = None
    modality: str | None = None

    def check(self, policy: str) -> None:
        """Raise a ``ValueError`` for a policy that needs what the engine cannot do."""
        asked = policy_of(policy)
        for needed, reason in (
            (asked.adds_assignments, self.added_assignments),
            (asked.reads_modality, self.modality),
        ):
            if needed and reason is not None:
                raise ValueError(f"policy {policy}: {reason}")


class Seam:
    """One MoE layer of an engine, as MACS sees it; adapters override what their engine does otherwise.

    topology: where the layer's experts are, and whose tokens these are. top_k: k. group: the processes whose
    tokens meet in its experts; none: this one alone. A seam belongs to the engine's module, so that a copy
    of the module has its own.
    """

    def __init__(self, topology: Topology, top_k: int, group: dist.ProcessGroup | None = None) -> None:
        self.topology = topology
        self.top_k = top_k
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Seam:
        made = object.__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            setattr(made, name, value if name == "group" else copy.deepcopy(value, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "group": None}  # process groups are not saved

    def router_weight(self) -> Tensor:
        """The router's rows [E, D]; asked for once weights are loaded."""
        raise NotImplementedError

    def refetch(self) -> None:
        """Bring rows up to date that the engine keeps elsewhere; on all ranks together."""

    def share(self) -> Share:
        """Which tokens this process has; an engine may change its mind about that."""
        return Share()

    def limits(self) -> Limits:
        """What the engine cannot do here, as it is set up now."""
        return Limits()

    def advice(self, policy: str, config: MACSConfig) -> list[str]:
        """What to tell who asks for this policy and these settings, once for all layers: of settings that
        work, and are of no use here."""
        return []
