"""The "macs" entry of vLLM's additional config."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from macs.adapters import Options

logger = logging.getLogger("vllm.macs")

MACS = "macs"


@dataclass(frozen=True)
class MACSEntry(Options):
    """Every option and setting of ``macs`` but token ids, ``record`` and ``calibrate``.

    vLLM itself says which tokens are visual or padding, and its workers do not run to the end of a script.
    """

    def __post_init__(self) -> None:
        for name in self.token_ids:
            self.refuse(name, "none: vLLM says which tokens are visual")
        for name in ("record", "calibrate"):
            if getattr(self, name) is not None:
                self.refuse(name, "none in vLLM: use macs tune, or record under another engine")
        super().__post_init__()


def entry_of(vllm_config: Any) -> MACSEntry | None:
    """The entry in a ``VllmConfig``; none if there is none."""
    extra = vllm_config.additional_config
    if not isinstance(extra, Mapping) or MACS not in extra:
        return None
    return MACSEntry.of(extra[MACS])


def warn_of_misspelling(vllm_config: Any) -> None:
    """Log a warning for an entry that is called almost as ours; once, where the server is asked."""
    extra = vllm_config.additional_config
    for name in difflib.get_close_matches(MACS, extra if isinstance(extra, Mapping) else (), cutoff=0.8):
        logger.warning("additional_config: found %r, expected 'macs'; MACS is off", name)
