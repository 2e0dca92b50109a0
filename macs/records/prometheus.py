"""An endpoint for Prometheus: what MACS does in this process, while it serves.

A process counts the tokens that it sends; a scrape makes no rank communicate. The load is therefore that of
this process's rows. Where the tokens of several processes meet, their rows add up, and the mean of their
loads is an upper bound of the group's.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..version import __version__
from .counters import LayerTotals, Reading
from .tuning import target_of

if TYPE_CHECKING:
    from ..runtime.runtime import Runtime

LOCALHOST = "127.0.0.1"
WINDOW = 60.0
"""Seconds that a gauge looks back, at least, or to the start."""

QUANTILES = 0.5, 0.95, 0.99
STAGES = "before", "after"

GAUGES: dict[str, tuple[str, Callable[[LayerTotals, str], float]]] = {
    "macs_rank_load": ("Largest rank's rows over the mean of the router's choice", LayerTotals.load),
    "macs_expert_imbalance": ("Largest expert's rows over the mean expert's", LayerTotals.imbalance),
}
"""By name, the help text and the function of a gauge for each layer and stage, before or after planning."""


def check_port(name: str, port: Any) -> None:
    """Raise a ``ValueError`` that names the argument unless it is a port."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise ValueError(f"{name}: found {port!r}, expected a number from 0 to 65535")


def serve_metrics(
    runtime: Runtime, port: int, *, address: str | None = None, per_expert: bool = False
) -> MetricsServer:
    """Count every step of the runtime from now on, and serve the counters to Prometheus over HTTP.

    Args:
        runtime: the model's, before CUDA graphs capture its layers.
        port: of the first process on this machine; others add their ``LOCAL_RANK``. 0: any free port.
        address: to listen on; none: localhost.
        per_expert: also the assignments of every expert, 2 E series a layer.

    Returns:
        The server, which runs until it is closed or the process ends.

    Raises:
        ImportError: prometheus-client is not installed.
        ValueError: the port is invalid or taken.
        RuntimeError: CUDA graphs have captured layers, which do not count.
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
    local_port = port + int(os.environ.get("LOCAL_RANK", "0")) if port else 0
    before = runtime.counters
    registry = CollectorRegistry()
    registry.register(Collector(runtime, per_expert))
    try:
        server, thread = start_http_server(local_port, addr=address, registry=registry)
    except (OSError, OverflowError) as error:
        runtime.counters = before
        raise ValueError(
            f"metrics port: cannot listen on {address}, port {local_port} ({port} + LOCAL_RANK): {error}; "
            "give another port, with those after it free for other processes, or an address of this machine"
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
    """The response to a scrape, at most 12 L + 14 series for L layers, and 2 E L more with ``per_expert``.

    Counters are since the start. Gauges cover the tokens since the reading that is at least ``WINDOW``
    seconds old; layers without tokens are left out.
    """

    def __init__(self, runtime: Runtime, per_expert: bool = False) -> None:
        self.runtime = runtime
        self.per_expert = per_expert
        self._counters = runtime.start_counting()
        self._readings: deque[tuple[float, Reading]] = deque()
        self._lock = threading.Lock()

    def describe(self) -> list[Any]:
        """Nothing: a registry would otherwise read all counters on registration."""
        return []

    def collect(self) -> Iterator[Any]:
        """Every family of metrics, for prometheus-client."""
        now = self._counters.read()
        yield from self._counts(now)
        yield from self._gauges(self._recent(now))
        yield self._info()

    def _recent(self, now: Reading) -> Reading:
        """What was added within the window."""
        at = time.monotonic()
        with self._lock:
            readings = self._readings
            if readings and readings[-1][1].blocks != now.blocks:
                readings.clear()  # layers were added or removed
            while len(readings) > 1 and readings[1][0] <= at - WINDOW:
                readings.popleft()
            then = readings[0][1] if readings and readings[0][0] <= at - WINDOW else None
            if not readings or readings[-1][0] <= at - WINDOW / 12:
                readings.append((at, now))
        return now if then is None else now.since(then)

    def _counts(self, now: Reading) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily as Counter

        assignments = Counter(
            "macs_assignments", "Token-expert pairs", labels=("layer", "modality", "action")
        )
        experts = Counter("macs_expert_assignments", "Of an expert", labels=("layer", "expert", "stage"))
        for number, layer in enumerate(now.layers):
            for modality, actions in layer.actions().items():
                for action, count in actions.items():
                    assignments.add_metric((str(number), modality, action), count)
            for stage in STAGES if self.per_expert else ():
                for expert, count in enumerate(layer.rows_of_experts(stage).tolist()):
                    experts.add_metric((str(number), str(expert), stage), count)
        yield assignments
        if self.per_expert:
            yield experts
        tokens = Counter("macs_tokens", "Valid tokens of steps large enough to plan", labels=("modality",))
        visual = sum(layer.scalar("visual") for layer in now.leaders)
        tokens.add_metric(("text",), sum(layer.scalar("tokens") for layer in now.leaders) - visual)
        tokens.add_metric(("visual",), visual)
        yield tokens
        for name, scalar, text in (
            ("macs_guard_unmet", "unmet", "Plans of a layer and source that exceed target_load"),
            ("macs_nonfinite_tokens", "nonfinite", "Tokens with inf or NaN features, once for each layer"),
        ):
            total = Counter(name, text)
            total.add_metric((), sum(layer.scalar(scalar) for layer in now.layers))
            yield total
        steps = Counter("macs_steps", "Forward passes", labels=("decision",))
        steps.add_metric(("planned",), now.planned_steps)
        steps.add_metric(("bypassed",), now.bypassed_steps)
        yield steps

    def _gauges(self, recent: Reading) -> Iterator[Any]:
        import numpy as np
        from prometheus_client.core import GaugeMetricFamily as Gauge

        seen = [(number, one) for number, one in enumerate(recent.layers) if one.scalar("tokens") > 0]
        for name, (text, value_of) in GAUGES.items():
            family = Gauge(name, text, labels=("layer", "stage"))
            for number, layer in seen:
                for stage in STAGES:
                    family.add_metric((str(number), stage), value_of(layer, stage))
            yield family
        quantiles = Gauge(
            "macs_rank_load_of_layers", "Quantile over layers of macs_rank_load", labels=("stage", "quantile")
        )
        ratio = Gauge("macs_visual_ratio", "Visual share of the semantic weight, R_v")
        if seen:
            for stage in STAGES:
                values = np.quantile([layer.load(stage) for _, layer in seen], QUANTILES)
                for quantile, value in zip(QUANTILES, values, strict=True):
                    quantiles.add_metric((stage, str(quantile)), float(value))
            weight = sum(layer.scalar("weight") for _, layer in seen)
            if weight > 0:
                ratio.add_metric((), sum(layer.scalar("visual_weight") for _, layer in seen) / weight)
        yield from (quantiles, ratio)
        yield from self._drift(recent)

    def _drift(self, recent: Reading) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        profile, layers = self.runtime.profile, self._counters.layers()
        if profile is None or len(layers) != len(recent.layers):  # a layer was added just now
            return
        drift = Gauge(
            "macs_drift", "Share of assignments at other experts than profiled", labels=("layer", "modality")
        )
        for number, (layer, totals) in enumerate(zip(layers, recent.layers, strict=True)):
            row = None if layer is None else layer.profile_row
            if row is not None and totals.scalar("tokens") > 0:
                visual = totals.rows_of_experts("visual")
                moved = profile.drift(row, visual, totals.rows_of_experts("before") - visual)
                for modality, value in zip(("visual", "text"), moved, strict=True):
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
            ranks = {layer.topology.num_ranks for layer in runtime.layers}
            if not tuning.differences(runtime.policy, config, ranks):
                kl = tuning.kl_at(target)
        values = {
            "version": __version__,
            "policy": runtime.policy if runtime.enabled else "off",
            "target_load": "" if target is None else f"{target:g}",
            "split": config.split,
            "verified_kl": "" if kl is None else f"{kl:.3g}",
        }
        return InfoMetricFamily("macs", "Policy and settings in use", value=values)
