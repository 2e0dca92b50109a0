"""The contract between an engine and MACS.

An adapter package derives ``LayerAdapter`` for its engine, passes one for each MoE layer to
``Runtime.add_layer``, and calls ``tokens`` and ``plan`` of the ``LayerRuntime`` it gets between routing and
dispatch. It compares no names of policies: ``refusal`` says why its engine cannot do what a policy needs.
docs/adapters.md walks through the adapters.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..config import MACSConfig
from ..planner import SumOverGroup
from ..policies import Policy
from ..topology import Topology


@dataclass(frozen=True)
class TokenShard:
    """Which tokens a process has, of those that share a layer's experts.

    Under sequence parallelism it has part ``index`` of ``parts`` of every sequence, while masks cover whole
    ones.
    """

    index: int = 0
    parts: int = 1


class _Group:
    """A process group, which copies of a model share and a saved model does not keep."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"group": None}


class Owner:
    """The engine's module that owns an adapter, held weakly: a cycle would keep the process groups of a model
    that failed until the next garbage collection. A copy of the module has one that refers to that copy."""

    def __init__(self, module: Any) -> None:
        self._reference = weakref.ref(module)

    def __call__(self) -> Any:
        module = self._reference()
        assert module is not None  # it owns the adapter that asks
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        module = self()
        return Owner(memo.get(id(module), module))

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reference = weakref.ref(state["module"])


class LayerAdapter:
    """One MoE layer of an engine, as MACS sees it; adapters override what their engine does otherwise.

    topology: where the layer's experts are, and the source of its tokens. top_k: k. group: the processes that
    share its experts; none: this one alone. exchanges: whether these may add up a tensor between router and
    dispatch, in one order with the engine's own collectives. It belongs to the engine's module: a copy of the
    module has a copy of it.
    """

    def __init__(self, topology: Topology, top_k: int, group: dist.ProcessGroup | None = None) -> None:
        self.topology = topology
        self.top_k = top_k
        self.exchanges = True
        self._group = _Group(group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self._group.group

    @property
    def sum_over_group(self) -> SumOverGroup | None:
        """The all-reduce of the group's members; none for a process by itself."""
        group = self.group
        if not isinstance(group, dist.ProcessGroup) or group.size() == 1 or not self.exchanges:
            return None
        return lambda rows: dist.all_reduce(rows, group=group)

    def plans_now(self) -> bool:
        """Whether the engine can apply a plan in the current pass; alike on every member of the group."""
        return True

    def router_weight(self) -> Tensor:
        """The router's rows [E, D]; called once weights are loaded."""
        raise NotImplementedError

    def refetch(self) -> None:
        """Update rows that the engine keeps elsewhere. Called on all ranks together."""

    def token_shard(self) -> TokenShard:
        """Which tokens this process has; an engine may change it between passes."""
        return TokenShard()

    def refusal(self, policy: Policy) -> str | None:
        """Why the engine, as it is set up now, cannot do what a policy needs; none: it can."""
        return None

    def adds_estimates(self) -> bool:
        """Whether compensation is added here, and not to another process's part of the routed output."""
        return True

    def mixes_outputs(self) -> str | None:
        """Why the routed output cannot be read by itself, as a fit of compensation needs; none: it can."""
        return None

    def advice(self, policy: str, config: MACSConfig) -> list[str]:
        """Warnings for this policy and these settings, logged once for all layers."""
        return []
