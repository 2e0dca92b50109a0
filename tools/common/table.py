"""Tables in the terminal, by rich."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def table(heads: Sequence[str], rows: Iterable[Sequence[str] | None], left: int = 1, **options: Any) -> Table:
    """A table whose first ``left`` columns are text, the others numbers; a row that is none is a line.

    options: of ``rich.table.Table``.
    """
    shown = Table(title_justify="left", caption_justify="left", **options)
    for number, head in enumerate(heads):
        shown.add_column(head, justify="left" if number < left else "right")
    for row in rows:
        if row is None:
            shown.add_section()
        else:
            shown.add_row(*row)
    return shown


def console(**options: Any) -> Console:
    """As wide as the terminal, in a file wide enough for any table."""
    return Console(width=None if sys.stdout.isatty() else 165, **options)
