"""What vLLM's workers tell a script: ``LLM(worker_extension_cls="vllm_macs.worker.MACSWorker", ...)``."""

from __future__ import annotations

from typing import Any


class MACSWorker:
    """Methods for ``LLM.collective_rpc``; each returns a list with one entry a worker."""

    def macs_loads(self) -> dict[str, Any]:
        """Loads by layer and step before and after planning, and on a CPU the rows that this worker's experts
        computed, by call; all since the last time."""
        from . import cpu
        from .plugin import runtimes

        recorded = [one for one in runtimes if any(layer.recorder.started for layer in one.layers)]
        reports = [report for runtime in recorded for report in runtime.reports()]
        found = {when: [one.load(when).tolist() for one in reports] for when in ("before", "after")}
        for runtime in runtimes:
            runtime.clear()
        rows = list(cpu.rows)
        cpu.rows.clear()
        return {**found, "rows": rows}
