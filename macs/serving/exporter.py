"""An endpoint for Prometheus: what MACS does in this process, while it does it.

A process counts the tokens that it sends itself; no scrape makes ranks talk to one another. The busiest rank
is therefore that of this process's own rows. Where several processes' tokens meet, their rows add up: the
mean of their stragglers is what the group's cannot exceed.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..records.totals import LayerTotals, Totals
from ..records.tuning import target_of
from ..version import __version__
from .runtime import Runtime

LOCALHOST = "127.0.0.1"
WINDOW = 60.0
"""Seconds that a gauge looks back, at least; to the start, while that is nearer."""

QUANTILES = 0.5, 0.95, 0.99
STAGES = "before", "after"
MODALITIES = "text", "visual"


@dataclass(frozen=True)
class Gauge:
    """A figure of a layer, over the recent steps: what it says, where it comes from (by the stage, "before"
    or "after" planning), and of which stages it is; none: of the state after, without a label."""

    said: str
    of: Callable[[LayerTotals, str], float]
    stages: tuple[str, ...] = STAGES


GAUGES = {
    "macs_rank_straggler": Gauge(
        "Busiest rank's rows over the mean of the router's choice", LayerTotals.straggler
    ),
    "macs_expert_imbalance": Gauge("Busiest expert's rows over the mean expert's", LayerTotals.imbalance),
    "macs_balancedness": Gauge(
        "Mean rank's rows over the busiest one's, after planning", lambda layer, _: layer.balancedness, ()
    ),
}
"""Another one is a row here, and its figure in ``LayerTotals``."""


def check_port(name: str, port: Any) -> None:
    """Raise a ``ValueError`` that names what is no port."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise ValueError(f"{name}: found {port!r}, expected a number from 0 to 65535")


def serve_metrics(
    runtime: Runtime, port: int, *, address: str | None = None, per_expert: bool = False
) -> MetricsServer:
    """Count every step of the runtime from now on, and serve the counters to Prometheus over HTTP.

    Args:
        runtime: what the model's layers share; before CUDA graphs capture them.
        port: the first process's on this machine; others add their ``LOCAL_RANK``. 0: any that is free.
        address: what to listen on; nobody but this machine, if it is not given.
        per_expert: also the assignments of every expert, 2 E series a layer.

    Returns:
        The server, which goes on until it is closed or the process ends.

    Raises:
        ImportError: prometheus-client is not installed.
        ValueError: the port is none, or cannot be had.
        RuntimeError: CUDA graphs have captured layers that do not count.
    """
    check_port("metrics port", port)
    address = LOCALHOST if address is None else address
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ImportError(
            "serve_metrics: needs prometheus-client: pip install 'macs-moe[metrics]', or from a "
            "clone pip install -e '.[metrics]'"
        ) from error
    own = port + int(os.environ.get("LOCAL_RANK", "0")) if port else 0
    before = runtime.counters
    registry = CollectorRegistry()
    registry.register(Collector(runtime, per_expert))
    try:
        server, thread = start_http_server(own, addr=address, registry=registry)
    except (OSError, OverflowError) as error:
        runtime.counters = before
        raise ValueError(
            f"metrics port: cannot listen on {address}, port {own} ({port} + LOCAL_RANK): {error}; give "
            "another port, with those after it free for the other processes, or an address of this machine"
        ) from error
    return MetricsServer(server, thread, address)


class MetricsServer:
    """A running endpoint: its address and port, and ``close``."""

    def __init__(self, server: Any, thread: threading.Thread, address: str) -> None:
        self._server, self._thread = server, thread
        self.address = address
        self.port: int = server.server_port

    def close(self) -> None:
        """Stop serving; the runtime goes on counting."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Collector:
    """What a scrape gets. Series, for L layers: at most 13 L + 14, and with ``per_expert`` 2 E L more.

    Counters are since the start. Gauges are of the tokens since the reading that is at least ``WINDOW``
    seconds old, each step weighing as many as it has; where there were none, they are left out.
    """

    def __init__(self, runtime: Runtime, per_expert: bool = False) -> None:
        self.runtime = runtime
        self.per_expert = per_expert
        self._counters = runtime.start_counting()
        self._readings: deque[tuple[float, Totals]] = deque()
        self._lock = threading.Lock()

    def describe(self) -> list[Any]:
        """Nothing: a registry would otherwise read all counters when it is told of them."""
        return []

    def collect(self) -> Iterator[Any]:
        """Every family of metrics, as prometheus-client takes them."""
        now = self._counters.read()
        yield from self._counts(now)
        yield from self._gauges(self._recent(now))
        yield self._info()

    def _recent(self, now: Totals) -> Totals:
        """What was added within the window."""
        at = time.monotonic()
        with self._lock:
            if self._readings and self._readings[-1][1].blocks != now.blocks:
                self._readings.clear()  # layers joined, or are gone
            while len(self._readings) > 1 and self._readings[1][0] <= at - WINDOW:
                self._readings.popleft()
            then = self._readings[0][1] if self._readings and self._readings[0][0] <= at - WINDOW else None
            if not self._readings or self._readings[-1][0] <= at - WINDOW / 12:
                self._readings.append((at, now))
        return now if then is None else now.since(then)

    def _counts(self, now: Totals) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        assignments = CounterMetricFamily(
            "macs_assignments",
            "Token-expert pairs, by what became of them",
            labels=("layer", "modality", "action"),
        )
        unmet = CounterMetricFamily(
            "macs_guard_unmet", "Plans of a layer, by source, in which a guard could not be met"
        )
        experts = CounterMetricFamily(
            "macs_expert_assignments", "Token-expert pairs of an expert", labels=("layer", "expert", "stage")
        )
        for number, layer in enumerate(now.layers):
            for modality, counts in actions_of(layer).items():
                for action, count in counts.items():
                    assignments.add_metric((str(number), modality, action), count)
            if self.per_expert:
                for stage in STAGES:
                    for expert, count in enumerate(layer.loads(stage).tolist()):
                        experts.add_metric((str(number), str(expert), stage), count)
        yield assignments
        if self.per_expert:
            yield experts
        unmet.add_metric((), sum(layer.scalar("unmet") for layer in now.layers))
        yield unmet
        tokens = CounterMetricFamily(
            "macs_tokens",
            "Valid tokens of the steps that were not bypassed by their size",
            labels=("modality",),
        )
        nonfinite = CounterMetricFamily(
            "macs_nonfinite_tokens",
            "Tokens with inf or NaN among their features, in planned steps, once for each layer",
        )
        visual = sum(layer.scalar("visual") for layer in now.leaders)
        tokens.add_metric(("text",), sum(layer.scalar("tokens") for layer in now.leaders) - visual)
        tokens.add_metric(("visual",), visual)
        nonfinite.add_metric((), sum(layer.scalar("nonfinite") for layer in now.layers))
        steps = CounterMetricFamily("macs_steps", "Forward passes, by what was decided", labels=("decision",))
        steps.add_metric(("planned",), now.planned_steps)
        steps.add_metric(("bypassed",), now.bypassed_steps)
        yield from (tokens, nonfinite, steps)

    def _gauges(self, recent: Totals) -> Iterator[Any]:
        import numpy as np
        from prometheus_client.core import GaugeMetricFamily

        seen = [(number, one) for number, one in enumerate(recent.layers) if one.scalar("tokens") > 0]
        for name, gauge in GAUGES.items():
            labels = ("layer", "stage") if gauge.stages else ("layer",)
            family = GaugeMetricFamily(name, gauge.said, labels=labels)
            for number, layer in seen:
                for stage in gauge.stages or ("after",):
                    own = (str(number), stage) if gauge.stages else (str(number),)
                    family.add_metric(own, gauge.of(layer, stage))
            yield family
        spread = GaugeMetricFamily(
            "macs_rank_straggler_of_layers",
            "Quantile over layers of macs_rank_straggler",
            labels=("stage", "quantile"),
        )
        ratio = GaugeMetricFamily("macs_visual_ratio", "Visual share of the semantic weight, R_v")
        if seen:
            for stage in STAGES:
                found = np.quantile([layer.straggler(stage) for _, layer in seen], QUANTILES)
                for quantile, value in zip(QUANTILES, found, strict=True):
                    spread.add_metric((stage, str(quantile)), float(value))
            weight = sum(layer.scalar("weight") for _, layer in seen)
            if weight > 0:
                ratio.add_metric((), sum(layer.scalar("visual_weight") for _, layer in seen) / weight)
        yield from (spread, ratio)
        yield from self._drift(recent)

    def _drift(self, recent: Totals) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        profile, layers = self.runtime.profile, self._counters.layers()
        if profile is None or len(layers) != len(recent.layers):  # one joined just now
            return
        drift = GaugeMetricFamily(
            "macs_drift",
            "Share of assignments at other experts than in the profile",
            labels=("layer", "modality"),
        )
        for number, (layer, total) in enumerate(zip(layers, recent.layers, strict=True)):
            visual = total.loads("visual")
            row = None if layer is None else layer.profile_row
            if row is not None and total.scalar("tokens") > 0:
                found = profile.drift(row, visual, total.loads("before") - visual)
                for modality, value in zip(("visual", "text"), found, strict=True):
                    drift.add_metric((str(number), modality), value)
        yield drift

    def _info(self) -> Any:
        from prometheus_client.core import InfoMetricFamily

        runtime = self.runtime
        config, profile = runtime.config, runtime.profile
        tuning = None if profile is None else profile.tuning
        target = target_of(config, tuning)
        kl = None
        if tuning is not None and target is not None and config.split == "tuned" and runtime.enabled:
            measured_for = tuning.policy, {tuning.ranks}
            if measured_for == (runtime.policy, {layer.topology.num_ranks for layer in runtime.layers}):
                kl = tuning.damage_at(target)
        said = {
            "version": __version__,
            "policy": runtime.policy if runtime.enabled else "off",
            "target_load": "" if target is None else f"{target:g}",
            "split": config.split,
            "verified_kl": "" if kl is None else f"{kl:.3g}",
        }
        return InfoMetricFamily("macs", "What is in force", value=said)


def actions_of(layer: LayerTotals) -> dict[str, dict[str, float]]:
    """Assignments of a layer by modality and by what became of them."""
    every = {action: layer.scalar(action) for action in ("kept", "rerouted", "dropped")}
    visual = {action: layer.scalar(f"visual_{action}") for action in ("kept", "rerouted")}
    visual["dropped"] = float(layer.loads("visual").sum()) - sum(visual.values())
    return {"text": {action: every[action] - visual[action] for action in every}, "visual": visual}
