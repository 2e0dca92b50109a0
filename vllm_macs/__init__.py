"""MACS for vLLM: a general plugin that plans the MoE layers of a model served with expert parallelism.

    vllm serve MODEL --tensor-parallel-size 8 --enable-expert-parallel \\
        --additional-config '{"macs": {"target_load": 0.6, "split": "tuned", "profile": "FILE"}}'

Without a "macs" entry in the additional config, vLLM runs as it is.
"""

from __future__ import annotations


def register() -> None:
    """The entry point of ``vllm.general_plugins``; vLLM calls it in each of its processes.

    vLLM logs an error at import and goes on, so that nothing is imported before this runs.
    """
    from .plugin import install

    install()


__all__ = ["register"]
