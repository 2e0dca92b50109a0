"""What MACS says while it serves: through ``logging``, as text or as JSON lines.

Nothing is set up unless somebody asks: the loggers ``macs``, ``megatron_macs`` and ``deepspeed_macs`` are an
application's to configure. ``log_as`` is for those who leave it to MACS.
"""

from __future__ import annotations

import logging
import os
import sys

LOGGERS = "macs", "megatron_macs", "deepspeed_macs"
FORMATS = "text", "json"


def log_as(form: str) -> None:
    """Write what MACS logs from level INFO on to stderr, and hand it to nobody else.

    Args:
        form: "text", or "json": one object a line, with time, level, logger, rank and message.

    Raises:
        ValueError: there is no such form.
        ImportError: JSON, and python-json-logger is not installed.
    """
    if form not in FORMATS:
        raise ValueError(f"log format: found {form!r}, expected one of {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    rank = int(os.environ.get("RANK", "0"))
    if form == "json":
        try:
            from pythonjsonlogger.json import JsonFormatter
        except ImportError as error:
            raise ImportError(
                "log format json: needs python-json-logger: pip install 'macs-moe[metrics]', or from a "
                "clone pip install -e '.[metrics]'"
            ) from error
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(
            JsonFormatter(
                "{asctime}{levelname}{name}{message}",
                style="{",
                rename_fields=names,
                static_fields={"rank": rank},
            )
        )
    else:
        handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
