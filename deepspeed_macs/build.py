"""DeepSpeed's first run on a CPU, which compiles an extension: said, and never waited for in vain.

``deepspeed.comm`` compiles ``deepspeed_shm_comm`` when it is first initialised on a machine, for a minute or
more. Processes that come second wait for a lock file to go away; a run that is killed meanwhile leaves
the file, and everybody after it would wait for ever.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger(__name__)

EXTENSION = "deepspeed_shm_comm"
PATIENCE = 900.0
"""Seconds for which a lock may be somebody's whom this process cannot see, on another machine or of
another user."""

SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "ceph", "fuse", "9p", "wekafs"}
"""File systems that several machines write to."""


def watch_builds() -> None:
    """From now on DeepSpeed says that it compiles, and refuses to wait for a builder that is gone."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    if not hasattr(backend.build_shm_op, "watched"):
        backend.build_shm_op = _watched(backend.build_shm_op)


def _watched(build: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(build)
    def run() -> Any:
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() == "cpu":
            await_build(build_folder())
        return build()

    run.watched = True  # type: ignore[attr-defined]
    return run


def build_folder() -> Path:
    """Where torch builds the extension."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        kind = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
        version = "".join(map(str, sys.version_info[:2]))
        root = os.path.join(get_default_build_root(), f"py{version}{getattr(sys, 'abiflags', '')}_{kind}")
    return Path(root) / EXTENSION


def await_build(folder: Path, pause: float = 0.2) -> None:
    """Return when nobody builds in the folder; a ``RuntimeError`` names a lock whose owner is gone."""
    if not (folder / f"{EXTENSION}.so").exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        logger.warning(
            "MACS: DeepSpeed compiles %s, once, which takes a minute or more: %s", EXTENSION, folder
        )
    lock, began, told = folder / "lock", time.monotonic(), False
    while (held := holder(lock)) is not None:
        if not held:
            raise RuntimeError(
                f"DeepSpeed: found the lock {lock}, and no process that builds {EXTENSION} in that "
                f"folder; a run that was killed has left it, and this one would wait for ever. "
                f"Remove it: rm {lock}"
            )
        if not told and time.monotonic() - began > 30:
            told = True
            logger.warning("MACS: waiting for the process that compiles %s; it holds %s", EXTENSION, lock)
        time.sleep(pause)


def holder(lock: Path) -> bool | None:
    """Whether somebody holds a lock file; none if there is no such file.

    A builder keeps it open. One of another user, or on another machine, cannot be seen: such a lock is
    taken for held until it is older than ``PATIENCE``.
    """
    for _ in range(3):  # a builder opens and removes it as we look
        try:
            status = lock.stat()
        except FileNotFoundError:
            return None
        if _open_somewhere(lock):
            return True
        time.sleep(0.05)
    visible = status.st_uid == os.getuid() and not on_shared_storage(lock)
    return not visible and time.time() - status.st_mtime < PATIENCE


def _open_somewhere(path: Path) -> bool:
    """Whether a process of ours has the file open (Linux)."""
    wanted = str(path.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(one) == wanted for one in (process / "fd").iterdir()):
                return True
        except OSError:
            continue  # gone, or somebody else's
    return False


def on_shared_storage(path: Path) -> bool:
    """Whether other machines may write where this path is."""
    found, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return True
    for line in mounts:
        _, place, fstype, *_ = line.split()
        inside = str(path.resolve()).startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(found):
            found, kind = place, fstype
    return kind.split(".")[0] in SHARED
