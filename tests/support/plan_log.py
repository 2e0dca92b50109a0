"""What the layers of a runtime planned."""

from __future__ import annotations

from macs import Plan, Runtime


class PlanLog:
    """Keeps the plans of every layer of a runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.plans: list[Plan] = []
        runtime.on_plan(lambda event: event.plan is not None and self.plans.append(event.plan))
