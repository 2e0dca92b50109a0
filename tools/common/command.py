"""What every command of ``macs`` has in common: its parser, and how it ends when something is wrong.

A mistake is one line, from the first process alone, with the way out; ``MACS_TRACEBACK=1`` shows where an
error came from.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm; what we run has bars of its own

MISTAKE, INTERRUPTED = 2, 130
"""Exit codes: what the command line asks for cannot be done; Ctrl-C."""


def first_process() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def leave(name: str, message: str, code: int = MISTAKE) -> NoReturn:
    """End with one line on stderr, once over all processes."""
    if first_process():
        sys.stderr.write(f"{name}: {' '.join(message.split())}\n")
    raise SystemExit(code)


def nearest(found: str, known: Iterable[str]) -> str:
    """A hint at what was probably meant, or nothing."""
    close = difflib.get_close_matches(found, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _formatter() -> type[argparse.HelpFormatter]:
    """Help in colours where rich-argparse is installed."""
    try:
        from rich_argparse import RawDescriptionRichHelpFormatter
    except ImportError:
        return argparse.RawDescriptionHelpFormatter

    class Coloured(RawDescriptionRichHelpFormatter):
        group_name_formatter = str
        highlights = RawDescriptionRichHelpFormatter.highlights[:1]  # no markup is read out of descriptions

    return Coloured


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line that names the nearest flag."""

    def __init__(self, name: str, description: str | None, **options: Any) -> None:
        super().__init__(
            prog=name,
            description=(description or "").replace("``", ""),
            formatter_class=_formatter(),
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hint = nearest(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"found {unknown[0]}, which is not a flag of this command{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        leave(self.prog, f"{message} (--help lists what there is)")


@contextlib.contextmanager
def one_line(name: str) -> Iterator[None]:
    """Errors that name what was found, and Ctrl-C, end the command in one line."""
    try:
        yield
    except KeyboardInterrupt:
        leave(name, "interrupted", INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MACS_TRACEBACK") == "1":
            raise
        leave(name, f"{error} (MACS_TRACEBACK=1 shows where)")


def quiet(threads: int | None = None) -> None:
    """No warnings of third parties before the result; so many threads for torch."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of processes that are started from here
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def run(name: str, main: Callable[[Sequence[str]], int | None], given: Sequence[str]) -> int:
    """The exit code of a command."""
    with one_line(name):
        return main(given) or 0
