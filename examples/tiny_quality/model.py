"""The tiny model with the plain adapter, planned as several expert-parallel ranks would."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from tiny_vlm.kinds import draw_batches

from macs_tools.common.command import quiet
from macs_tools.tune import Scorer
from macs_tools.tune.sources import opened

SHARED = "checkpoint", "ranks", "batch", "seed", "split"


@contextlib.contextmanager
def scoring(run: Any, kind: str) -> Iterator[Scorer]:
    """A scorer of the questions of a kind, with a profile of training questions of the run's first kind,
    which nothing is measured on. run: a ``Run``, or a comparison's command line with the same fields."""
    quiet()
    asked = {"batches": [kind], "requests": run.questions} | {name: getattr(run, name) for name in SHARED}
    fixed: dict[str, Any] = {
        "engine": "plain",
        "model": None,
        "policy": "macs",
        "settings": {},
        "groups": None,
    }
    with torch.inference_mode(), opened(Namespace(**asked, **fixed)) as scorer:
        with scorer.runtime.calibration():
            for batch in draw_batches(run.batches[0], "train", 1, 4, run.batch):
                scorer.said(batch, [[0]] * len(batch))
        scorer.modality = scorer.runtime.measured_profile()
        yield scorer
