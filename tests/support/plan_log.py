"""What the layers of a runtime planned."""

from __future__ import annotations

from typing import Any

from macs import Runtime


class PlanLog:
    """Keeps the plans of every layer of a runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.plans: list[Any] = []
        for layer in runtime.layers:
            inner = layer.plan

            def plan(*arguments: Any, inner: Any = inner) -> Any:
                self.plans.append(inner(*arguments))
                return self.plans[-1]

            layer.plan = plan
