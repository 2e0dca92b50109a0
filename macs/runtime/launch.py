"""What launchers and commands share: errors in one line, from one process; running a script unchanged."""

from __future__ import annotations

import argparse
import difflib
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..files import rank_and_world

MISTAKE, INTERRUPTED = 2, 130
"""Exit codes: the command line cannot be honoured; Ctrl-C."""


class ProcessError(ValueError):
    """An error of this process, which the others may not have: each that has it prints it."""


def first_process() -> bool:
    """Whether this process prints for all that a launcher started."""
    return rank_and_world()[0] == 0


def leave(name: str, error: str | BaseException, code: int = MISTAKE) -> NoReturn:
    """Exit with one line on stderr: from the first process alone, or of a ``ProcessError`` with the rank."""
    own = isinstance(error, ProcessError)
    rank = f", rank {rank_and_world()[0]}" if own else ""
    line = f"{name}{rank}: {' '.join(str(error).split())}"
    if own or first_process():
        sys.stderr.write(f"{line}\n")
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows that of who leaves first
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        try:
            raise RuntimeError(line)
        except RuntimeError as recorded:
            handler.record_exception(recorded)
    if not (own or first_process()):
        time.sleep(1.0)  # a launcher ends the others when one leaves: the first process is to print before
    raise SystemExit(code)


def exit_on_sigterm() -> None:
    """End on SIGTERM, which SLURM and Kubernetes send, as on Ctrl-C: what was recorded is written. A handler
    of the application's stays."""
    unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if unhandled and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class CommandParser(argparse.ArgumentParser):
    """A parser with errors in one line, from the first process, that name the nearest flag."""

    def __init__(self, name: str, description: str | None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(
            prog=name, description=(description or "").replace("``", ""), allow_abbrev=False, **options
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.unknown(unknown[0])
        return arguments

    def unknown(self, flag: str) -> NoReturn:
        """Exit because of an unknown flag."""
        hint = nearest(flag.split("=")[0], self._option_string_actions)
        self.error(f"found {flag}, which is not a flag of this command{hint}")

    def error(self, message: str) -> NoReturn:
        leave(self.prog, f"{message} (--help lists the flags)")


def run_script(script: str, arguments: Sequence[str], by_name: bool = False) -> Any:
    """Run a script, or with ``by_name`` a module, as ``__main__`` with these arguments.

    Returns:
        The argument of its ``sys.exit``, or none; other exceptions propagate.
    """
    sys.argv = [script, *arguments]
    try:
        if by_name:
            sys.path.insert(0, "")
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code
    return None
