"""MACS's metrics beside vLLM's own, on the endpoint of its API server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen


class Relay:
    """A collector for prometheus-client that shows what a worker serves."""

    def __init__(self, port: int, address: str | None = None) -> None:
        host = "127.0.0.1" if address in (None, "", "0.0.0.0", "::", "localhost") else address
        self.url = f"http://{host}:{port}/metrics"

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.parser import text_string_to_metric_families

        try:
            with urlopen(self.url, timeout=1) as answer:
                text = answer.read().decode()
        except OSError:  # the worker has not started, or is gone
            return
        yield from (family for family in text_string_to_metric_families(text) if "macs" in family.name)


_relayed: set[int] = set()


def relay(port: int, address: str | None = None) -> None:
    """Show the worker's metrics on this process's endpoint, once."""
    from prometheus_client import REGISTRY

    # Several API servers share a directory of files, which a collector cannot write to.
    if port in _relayed or os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return
    REGISTRY.register(Relay(port, address))
    _relayed.add(port)
