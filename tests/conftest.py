"""Fixtures shared by all tests, hypothesis profiles, and the tiers of the suite.

    pytest              everything that this machine can run
    pytest -m fast      what needs no engine, no kernel and no program of its own: two minutes

A test is ``kernels`` (Triton, in its interpreter where there is no GPU), ``engine`` (worker processes with
a real engine) or ``e2e`` (whole programs: examples, launchers, tools) by the file it is in, or by a mark of
its own; ``fast`` is what is left.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.workers import Pool, free_port

# Speed lives in benchmarks: no test fails because a machine is slow. The number of examples is the
# profile's alone; the continuous integration asks for the full one.
EXAMPLES = {"quick": 25, "full": 120}
for name, count in EXAMPLES.items():
    settings.register_profile(
        name,
        max_examples=count,
        deadline=None,
        print_blob=True,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
settings.load_profile(PROFILE)
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

TIERS = {
    "kernels": (),
    "e2e": ("examples/", "tools/"),
    "engine": ("megatron_macs/", "deepspeed_macs/", "test_both_engines.py"),
}
HERE = Path(__file__).parent
ROOMS = {"megatron_macs": "megatron.core", "deepspeed_macs": "deepspeed"}
"""Folders whose tests need an engine."""


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


LEFT_OUT = {room for room, package in ROOMS.items() if not _installed(package)}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the folders of engines that are not here."""
    inside = HERE in collection_path.parents
    return True if inside and LEFT_OUT & set(collection_path.relative_to(HERE).parts) else None


def pytest_report_header() -> list[str]:
    """Which they are."""
    return [f"tests/{room}: left out, {ROOMS[room]} is not installed" for room in sorted(LEFT_OUT)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its tier."""
    for item in items:
        own = {mark.name for mark in item.iter_markers()} & set(TIERS)
        if not own:
            place = item.path.relative_to(HERE).as_posix()
            own = {tier for tier, paths in TIERS.items() if place.startswith(paths)}
        for tier in own or {"fast"}:
            item.add_marker(tier)


@pytest.fixture(autouse=True)
def logging_on():
    """A command silences warnings for its whole process."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes, started once for the whole session."""
    workers = Pool()
    yield workers
    workers.close(patience=10.0)


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python, or another program, with these words in a folder, as a user would, and asserts its exit
    status (none: any)."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    rooms = os.pathsep.join(map(str, (HERE.parent, HERE, HERE.parent / "examples")))
    given = {"PYTHONPATH": rooms, "PATH": path, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}

    def run(*words: Any, folder: Path = tmp_path, status: int | None = 0, executable: Any = sys.executable,
            **environment: str) -> Any:  # fmt: skip
        done = subprocess.run(
            [executable, *map(str, words)], cwd=folder, env={**os.environ, **given, **environment},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert status is None or done.returncode == status, done.stdout[-4000:] + done.stderr[-4000:]
        return done

    return run


@pytest.fixture
def torchrun(program: Callable[..., Any]) -> Callable[..., Any]:
    """``program`` on two processes."""
    launcher = "-m torch.distributed.run --nproc-per-node 2 --master-port".split()
    return lambda *words, **options: program(*launcher, free_port(), *words, **options)
