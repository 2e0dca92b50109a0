"""What every command of ``macs`` has in common: its parser, and how it ends when something is wrong.

A mistake is one line, from the first process alone, with the way out; ``MACS_TRACEBACK=1`` shows where an
error came from.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from macs.files import check_output
from macs.runtime.launch import INTERRUPTED, CommandParser, leave


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


class Parser(CommandParser):
    """The parser of a command, whose help is in colours where rich-argparse is installed."""

    def __init__(self, name: str, description: str | None, **options: Any) -> None:
        super().__init__(name, description, formatter_class=_formatter(), **options)

    def positive(self, arguments: argparse.Namespace, *names: str) -> None:
        """End unless these arguments, or all numbers of one that is a list, are above 0, where given."""
        for name in names:
            value = getattr(arguments, name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not 0 < one < float("inf"):
                    self.error(f"--{name.replace('_', '-')}: found {one}, expected more than 0")

    def there(self, arguments: argparse.Namespace, *names: str) -> None:
        """End unless these paths exist, where given."""
        for name in names:
            path = getattr(arguments, name)
            if path is not None and not path.exists():
                self.error(f"--{name.replace('_', '-')}: found nothing at {path}")


@contextlib.contextmanager
def one_line(name: str) -> Iterator[None]:
    """Errors that name what was found, and Ctrl-C, end the command in one line."""
    try:
        yield
    except KeyboardInterrupt:
        leave(name, "interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if os.environ.get("MACS_TRACEBACK") == "1":
            raise
        leave(name, f"found no package {error.name}: pip install 'macs-moe[all]', or what of it you need")
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


def output_file(text: str) -> Path:
    """A path to write to, as the ``type`` of an argument; its folder is made if it is missing."""
    path = Path(text).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_output(path, "output")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path
