"""A rank that is late is not a rank that disagrees: ``python tests/soak_late.py --minutes 30``.

Two processes over gloo, layers with MACS, the same changes of settings on both (policy, target, MACS off and
on, calibration, training), and each time one of them late at random. A refusal or a hang fails it.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # tests/ has a folder macs, too

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.small_layer import HIDDEN, Layer  # noqa: E402
from torch import multiprocessing, nn  # noqa: E402

from macs import MACSConfig, Runtime  # noqa: E402
from macs.adapters import CallReader, ModalityHook  # noqa: E402

TOKENS, LAYERS = 80, 3


class Model(nn.Module):
    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(runtime) for _ in range(LAYERS)))
        ModalityHook(self, CallReader(text_only=True))
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.randn(input_ids.numel(), HIDDEN))


def changes(runtime: Runtime, model: Model, chosen: random.Random) -> dict[str, Any]:
    """Changes of settings by name, with values that every rank draws alike."""
    policy, target = (
        chosen.choice(["macs", "token-drop", "vanilla"]),
        chosen.choice([0.7, 0.9, 1.0, 1.05, 1.3]),
    )
    return {
        "use": lambda: runtime.use(policy, MACSConfig(target_load=target, min_tokens=8)),
        "target": lambda: runtime.use(runtime.policy, runtime.config.updated(target_load=target)),
        "off": lambda: setattr(runtime, "enabled", False),
        "on": lambda: setattr(runtime, "enabled", True),
        "calibrate": runtime.start_calibration,
        "calibrated": runtime.stop_calibration,
        "train": model.train,
        "eval": model.eval,
    }


def serve(rank: int, port: int, minutes: float, late: float) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=5))
    torch.set_num_threads(1)
    chosen, own = random.Random(0), random.Random(rank)
    runtime = Runtime(MACSConfig(min_tokens=8))
    model = Model(runtime)
    passes, made, waited, started = 0, 0, 0.0, time.monotonic()
    while True:
        ends = torch.tensor(int(time.monotonic() - started > 60 * minutes))
        dist.all_reduce(ends)
        if int(ends):
            break
        all_changes = changes(runtime, model, chosen)
        all_changes[chosen.choice(list(all_changes))]()
        made += 1
        slow, seconds = chosen.randrange(2), chosen.uniform(0, late)
        if rank == slow:
            waited += seconds
            time.sleep(seconds)
        for _ in range(3):
            # A step may be too small to plan on one rank alone.
            model(torch.ones(1, own.choice([4, TOKENS, TOKENS]), dtype=torch.int64))
            passes += 1
    print(f"rank {rank}: {made} changes, {passes} passes, {waited:.0f} s late, no refusal", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--late", type=float, default=40, help="seconds that a rank is late, at most")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(serve, (port, arguments.minutes, arguments.late), nprocs=2)


if __name__ == "__main__":
    main()
