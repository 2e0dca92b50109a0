"""One MoE layer in a running model: its planner, its records and its tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MACSConfig
from ..planner import Planner
from ..records.counters import Counters
from ..records.load import LayerRecorder
from ..steps.combine import Plan, PlanStatistics
from ..steps.compensation import Dropped, compensate
from ..tokens import Tokens
from ..topology import Topology
from .adapter import LayerAdapter
from .consistency import RankConsistency, RankMismatch, complete
from .modality import layer_modality, misfit, select
from .served import ServedPlanner
from .state import Callback, OutputCallback, PlanEvent, RuntimeState, called_model, capturing


class LayerRuntime:
    """A layer's planner and records, and the logits on their way to the planner.

    A copy of the module that holds it has its own, of the same runtime and process group.
    """

    def __init__(self, runtime: RuntimeState, index: int, adapter: LayerAdapter, topology: Topology) -> None:
        self.runtime = runtime
        self.index = index
        self.adapter = adapter
        self.topology = topology  # the adapter's, or that of virtual ranks
        self.top_k = adapter.top_k
        self._shard = adapter.token_shard()
        self._start()

    def _start(self) -> None:
        self.captured = self.graphed = False  # a CUDA graph has captured its plans; anything of it
        self.acts = False  # in the pass that runs; see ``entering``
        self._callbacks: list[Callback] = []
        self._output_callbacks: list[OutputCallback] = []
        self._planned = threading.local()  # a step, from ``plan`` to ``compensate``
        self.logits: Tensor | None = None  # [T, E], from a router for the dispatcher, which removes them
        self._continues = False
        self._lock = threading.RLock()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("runtime", "index", "adapter", "topology", "top_k", "_shard")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()
        self.runtime.register(self)

    @property
    def consistency(self) -> RankConsistency | None:
        """The comparison of settings with the group's members; none for a process by itself."""
        return self.runtime.consistency_of(self.adapter.group)

    def reset(self) -> None:
        """Drop the planner and the records."""
        self._served: ServedPlanner | None = None
        self.recorder = LayerRecorder(self.topology, self.top_k)

    def refresh(self) -> None:
        """Fetch the router's rows anew where an engine keeps them elsewhere, and recompute the similarity in
        place; on all ranks together, outside a forward pass."""
        self.adapter.refetch()
        if self._served is not None:
            self._served.refresh()

    def on_plan(self, callback: Callback) -> Callable[[], None]:
        """Call ``callback`` with a ``PlanEvent`` after every step that is planned or calibrated.

        Returns:
            A function that removes it.
        """
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def on_output(self, callback: OutputCallback) -> Callable[[], None]:
        """As ``on_plan``, with the step's routed output [T, D], not compensated."""
        self._output_callbacks.append(callback)
        return lambda: self._output_callbacks.remove(callback)

    # A forward pass.

    @contextmanager
    def entering(
        self, count: int, device: torch.device, training: bool, continues: bool = False
    ) -> Iterator[bool]:
        """Around what a layer does with ``count`` tokens before its collectives; ``done`` comes after them.
        Yields ``acts``: whether MACS plans or calibrates in this pass. If not, the layer runs as the engine's
        own.

        Settings that changed are compared among the group's members first. An error within leaves the others
        alone in the pass, and every later pass of this process is refused. continues: this is a further part
        of tokens that the engine has divided, which is no step of its own.
        """
        # One thread at a time: what is kept between router and dispatch is of one call.
        with self.runtime.forward_pass(), self._lock:
            self._continues, self._planned.step = continues, None
            captured = capturing(device)
            self.graphed |= captured
            consistency = None if captured else self.consistency
            try:
                if consistency is not None:
                    consistency.refuse_broken()
                    consistency.check(self.runtime.settings(training))
                self.acts = self._begins(count, device, training)
                yield self.acts
            except RankMismatch:
                raise  # as in ``model_call``
            except BaseException as error:
                if consistency is not None:
                    consistency.break_off(error)
                raise
            finally:
                self.acts = False

    def done(self) -> None:
        """The layer has made its last collective."""
        complete(self)

    @contextmanager
    def forward_pass(
        self, count: int, device: torch.device, training: bool, continues: bool = False
    ) -> Iterator[bool]:
        """``entering`` and ``done``, around all that a layer does."""
        with self.entering(count, device, training, continues) as acts:
            yield acts
        self.done()

    def plan(
        self, hidden: Tensor, experts: Tensor, weights: Tensor, scores: Tensor, tokens: Tokens
    ) -> Plan | None:
        """``Planner.plan``; none while MACS is off or calibrates."""
        runtime = self.runtime
        if not runtime.on:
            return None
        plan = None
        if not runtime.calibrating:
            self.captured |= capturing(hidden.device)
            recorded, add_up = runtime.recording or runtime.counters is not None, self.adapter.sum_over_group
            plan = self.planner.plan(
                hidden, experts, weights, scores, tokens, statistics=recorded, sum_over_group=add_up
            )
            if plan.statistics is not None:
                self._record(plan.statistics, hidden.device)
        event = PlanEvent(self, hidden, experts, weights, scores, tokens, plan)
        for callback in (*self._callbacks, *runtime.callbacks):
            callback(event)
        if self._output_callbacks or (plan is not None and self.served.compensates):
            self._planned.step = event._replace(layer=None)  # a cycle would outlive a model that failed
        return plan

    def compensate(self, output: Tensor) -> Tensor:
        """Add the estimates of what the step's plan dropped, where the settings ask for it.

        Called on the tokens' own process once all experts' outputs are combined, before shared experts.

        Args:
            output: [..., D], the routed output of the tokens that ``plan`` had.

        Returns:
            The same shape and dtype; the output itself in a step that was not planned.
        """
        step = getattr(self._planned, "step", None)
        if step is None:
            return output
        self._planned.step = None
        rows, plan = output.reshape(-1, output.shape[-1]), step.plan
        for callback in self._output_callbacks:
            callback(step._replace(layer=self), rows)
        tables = None if plan is None else self.served.tables(rows.device)
        if plan is None or tables is None:
            return output
        dropped = Dropped(step.hidden, step.experts, step.weights, plan.experts, step.tokens)
        return compensate(rows, dropped, tables).view(output.shape)

    def _record(self, statistics: PlanStatistics, device: torch.device) -> None:
        """Add a plan's statistics to the recorder and, in the same launch, to the counters."""
        counters = _counters_of(self, device)
        self.recorder.record(statistics, None if counters is None else counters.row(self))
        if counters is not None:
            counters.publish(self, statistics.record if self._continues else None)

    def _begins(self, count: int, device: torch.device, training: bool) -> bool:
        """``acts``, of a pass that begins. A step that is too small to plan is counted, in a captured graph,
        too, and takes part where other members of the group may plan."""
        if training or not (self.runtime.on and self.adapter.plans_now()):
            return False
        if self.runtime.calibrating or not self.planner.bypasses(count, device):
            return True
        counters, add_up = _counters_of(self, device), self.adapter.sum_over_group
        if counters is not None and not self._continues:
            counters.bypassed(self)
        if self.planner.shares_bound and add_up is not None:
            add_up(self.planner.no_rows(device))
        return False

    def prepare(self, device: torch.device) -> None:
        """Allocate what the first forward pass would, before a CUDA graph captures the layer."""
        self.planner.constants(device)
        self.served.tables(device)
        self.recorder.prepare(device)
        _counters_of(self, device)

    # The planner.

    @property
    def served(self) -> ServedPlanner:
        """The planner under the settings in force, and what belongs to it; made on first use, when the
        router's weights are loaded."""
        if self._served is None:
            self._served = ServedPlanner(self.runtime, self.adapter, self.topology)
        return self._served

    @property
    def planner(self) -> Planner:
        return self.served.planner

    @property
    def profile_row(self) -> int | None:
        """The layer's row of the runtime's profile; none before it has planned."""
        return None if self._served is None else self._served.profile_row

    def target_under(self, config: MACSConfig) -> float | None:
        """The layer's ``target_load`` under other settings; none where it has no planner yet."""
        captured = self.captured or self.graphed
        return None if self._served is None else self._served.target_under(config, captured)

    def retarget(self, target: float | None) -> None:
        """Apply a ``target_load`` in place, and drop the records."""
        if self._served is not None and target is not None:
            self._served.planner.update_target(target)
        self.recorder.clear()

    def tokens(
        self,
        batch: int,
        length: int,
        sequence_major: bool,
        device: torch.device,
        first: int = 0,
        chunks: int = 1,
    ) -> Tokens:
        """The layer's tokens, B x S = batch x length, from the modality around the call.

        Where an engine divides the tokens of a process into ``chunks``, this call has those from token
        ``first`` of every sequence on. A mask of another shape or device is an error with a way out; without
        a mask every token is text.
        """
        shard = self.adapter.token_shard()
        if shard != self._shard:  # divided in another way since: the policy may be impossible now
            self.runtime.check_adapter(self.adapter, self.runtime.policy, self.runtime.config)
            self._shard = shard
        modality = layer_modality(batch, length * shard.parts, device, self.runtime)
        part = select(modality, batch, length, (shard.index, shard.parts), (first, chunks))
        return part.tokens(sequence_major, len(self.topology.sources))

    def counted_tokens(self, count: int, sequence_major: bool, device: torch.device) -> Tokens:
        """As ``tokens``, for an engine that only passes the number of tokens, B S = count."""
        modality = layer_modality(1, count, device, self.runtime)
        if modality.ids.numel() != count:
            raise ValueError(misfit(modality, None, count))
        return modality.tokens(sequence_major, len(self.topology.sources))


def _counters_of(layer: LayerRuntime, device: torch.device) -> Counters | None:
    """The runtime's counters, with a row for the layer; none where nothing is counted."""
    counters = layer.runtime.counters
    if counters is None:
        return None
    counters.check_process()
    if layer not in counters:
        # A runtime may have several models, whose passes are counted apart.
        together = layers_of(called_model.get()) or layer.runtime.layers
        layers = {
            one: (one.topology, one.top_k)
            for one in (together if layer in together else [layer])
            # A model may lie on several GPUs: each has memory of its own.
            if one is layer or device.type == "cpu" or one.adapter.router_weight().device == device
        }
        counters.prepare(layers, device)
    return counters


def layers_of(model: nn.Module | None) -> list[LayerRuntime]:
    """The MACS layers of a model."""
    layers = (getattr(module, "macs", None) for module in ([] if model is None else model.modules()))
    return list({id(layer): layer for layer in layers if isinstance(layer, LayerRuntime)}.values())
