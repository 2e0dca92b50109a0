"""A pool of worker processes for multi-process tests, started once and used by all of them.

Importing an engine takes seconds a process; the pool pays that once. ``Pool.run`` calls a function on every
rank of a fresh gloo process group.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

# How long ranks wait for one another to have imported the job's module, and then in a collective: on
# two busy cores, four processes take a minute to import an engine.
START = timedelta(minutes=5)
COLLECTIVE = timedelta(minutes=2)


class RankFailed(Exception):
    """A job raised on some rank; ``errors`` has (type name, message, traceback) or none by rank."""

    def __init__(self, errors: list[tuple[str, str, str] | None]) -> None:
        self.errors = errors
        shown = [f"rank {rank}: {error[2]}" for rank, error in enumerate(errors) if error]
        super().__init__("\n".join(shown))


class Hung(Exception):
    """Some rank did not answer in time."""


class Reply(NamedTuple):
    """What a worker sends back: whether its group started, whether the job ended, and what with."""

    started: bool
    done: bool
    value: Any


def _serve(connection: Any, path: list[str]) -> None:
    sys.path[:] = path
    # Processes on CPUs, also where there are GPUs; and so are the kernels that engines define on import.
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        task = connection.recv()
        if task is None:
            return
        job, arguments, rank, world, file, patience = task
        started = False
        try:
            function = _found(*job)
            store = dist.FileStore(file, world)
            store.set(f"ready/{rank}", "")
            store.wait([f"ready/{other}" for other in range(world)], START)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
            started = True
            connection.send(Reply(started, True, function(**arguments)))
        except BaseException as error:
            found = (type(error).__name__, str(error), traceback.format_exc())
            connection.send(Reply(started, False, found))
        finally:
            # A rank that failed leaves the group at once, as its process would by ending, so that no
            # other waits for it. Connections close when nothing refers to the groups any more.
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()


def _found(file: str, name: str) -> Callable[..., Any]:
    """A function of a file; of a test, its body (``on_ranks``)."""
    module = sys.modules.get(file)
    if module is None:
        spec = importlib.util.spec_from_file_location(file, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function = getattr(module, name)
    return getattr(function, "__wrapped__", function)


class Pool:
    """Workers on this machine; more are started as jobs need them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Any]] = []

    def run(
        self,
        job: Callable[..., Any],
        world: int,
        arguments: Mapping[str, Any] | None = None,
        timeout: float = 300.0,
        patience: timedelta = COLLECTIVE,
    ) -> list[Any]:
        """Call ``job``, a function at the top of its file, on ``world`` ranks; its results by rank.

        ``RankFailed`` if it raises anywhere, ``Hung`` if a rank does not answer in ``timeout`` s.
        ``patience`` is how long a collective waits for the other ranks.
        """
        found = inspect.getfile(inspect.unwrap(job)), job.__name__
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
            process.start()
            theirs.close()  # so that a worker's end is heard
            self._workers.append((process, ours))
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world):
                store = os.path.join(folder, "store")
                task = found, dict(arguments or {}), rank, world, store, patience
                self._workers[rank][1].send(task)
            replies: list[Reply] = []
            for rank in range(world):
                if not self._workers[rank][1].poll(timeout):
                    self.close()
                    raise Hung(f"{job.__name__}: rank {rank} of {world} did not answer in {timeout:g} s")
                replies.append(self._workers[rank][1].recv())
        if not all(reply.started for reply in replies):
            # torch names a process group by how many the process has made, and one that fails to start
            # still counts: these workers no longer agree on the name of the next.
            self.close()
        if not all(reply.done for reply in replies):
            raise RankFailed([None if reply.done else reply.value for reply in replies])
        return [reply.value for reply in replies]

    def close(self, patience: float = 0.0) -> None:
        """End every worker; those that are idle end by themselves within ``patience`` seconds, and what they
        ran is counted as covered."""
        for _, connection in self._workers if patience else ():
            with contextlib.suppress(OSError):
                connection.send(None)
        for process, _ in self._workers:
            process.join(patience)
            process.kill()
            process.join()
        self._workers.clear()


def free_port(count: int = 1) -> int:
    """A TCP port of this machine that nobody uses now, as nobody does the next ones of ``count``."""
    while True:
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(count)]
            probes[0].bind(("127.0.0.1", 0))
            first = probes[0].getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for number, probe in enumerate(probes[1:], 1):
                    probe.bind(("127.0.0.1", first + number))
                return first
