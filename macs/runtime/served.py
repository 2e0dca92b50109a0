"""A layer's planner, as the settings in force make it."""

from __future__ import annotations

import torch

from ..config import MACSConfig
from ..planner import Planner, router_similarity
from ..policies import policy_of
from ..records.compensation import SCOPES
from ..records.tuning import tuned_config
from ..steps.compensation import CompensationTables
from ..topology import Topology
from .adapter import LayerAdapter
from .state import RuntimeState


class ServedPlanner:
    """A planner under a runtime's policy, settings and profile; made once the router's weights are loaded.

    profile_row: the layer's row of the profile, if there is one. compensates: whether there are estimates for
    what plans drop.
    """

    def __init__(self, runtime: RuntimeState, adapter: LayerAdapter, topology: Topology) -> None:
        self.runtime = runtime
        self.adapter = adapter
        self.profile_row: int | None = None
        profile, policy = runtime.profile, policy_of(runtime.policy)
        bias, similarity = None, None
        if profile is not None:
            self.profile_row = profile.row_of(adapter.router_weight(), adapter.top_k)
            if policy.reads_modality:
                bias = profile.bias(policy.bias_threshold)[self.profile_row]
        elif policy.modality_strength > 0:
            runtime.warn_once("MACS: no profile; no expert has a modality bias")
        if policy.uses_similarity(runtime.config):
            similarity = router_similarity(adapter.router_weight())
        self.planner = Planner(
            self.config_of(runtime.config),
            topology,
            adapter.top_k,
            runtime.policy,
            modality_bias=bias,
            similarity=similarity,
        )
        self._tables: dict[torch.device, CompensationTables] = {}
        scope = self.planner.config.compensation
        if SCOPES.get(scope) and policy.plans and adapter.adds_estimates():
            # ``Runtime.use`` has refused others.
            assert profile is not None and profile.compensation is not None and self.profile_row is not None
            weight = adapter.router_weight()
            tables = profile.compensation.tables(self.profile_row, scope, weight)
            self._tables[weight.device] = tables.to(weight.device)  # where steps mostly are

    @property
    def compensates(self) -> bool:
        return bool(self._tables)

    def config_of(self, config: MACSConfig) -> MACSConfig:
        """The settings with this layer's ``target_load``, where the profile's tuning splits it."""
        if config.split == "uniform":
            return config
        profile = self.runtime.profile
        assert profile is not None and profile.tuning is not None
        row = profile.row_of(self.adapter.router_weight(), self.adapter.top_k)  # which may be another by now
        return tuned_config(config, profile.tuning, row, self.runtime.warn_once)

    def tables(self, device: torch.device) -> CompensationTables | None:
        """The estimates on a device; none where nothing is compensated."""
        if self._tables and device not in self._tables:
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables.get(device)

    def refresh(self) -> None:
        """Recompute the similarity from the router's current weights, in place."""
        if self.planner.policy.uses_similarity(self.runtime.config):
            self.planner.update_similarity(router_similarity(self.adapter.router_weight()))

    def target_under(self, config: MACSConfig, captured: bool) -> float:
        """The layer's ``target_load`` under other settings; a ``RuntimeError`` where a CUDA graph that has
        captured the layer cannot follow."""
        target = self.config_of(config).target_load
        assert target is not None
        if captured and (target >= 1) != self.planner.shares_bound:
            raise RuntimeError(
                f"use: a CUDA graph has captured a layer with target_load {self.planner.config.target_load}, "
                f"found {target:g}: expected both below 1, where sources share no bound, or neither"
            )
        return target
