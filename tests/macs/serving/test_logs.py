"""What MACS says while it serves, as text and as JSON."""

import json
import logging

import pytest

from macs import log_as
from macs.serving.logs import LOGGERS


@pytest.fixture(autouse=True)
def as_they_were():
    before = [(one, one.handlers, one.propagate, one.level) for one in map(logging.getLogger, LOGGERS)]
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)  # a command may have run in this process
    yield
    logging.disable(disabled)
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_json_lines_have_what_a_machine_looks_for(capsys, monkeypatch):
    pytest.importorskip("pythonjsonlogger", reason="python-json-logger is not installed")
    monkeypatch.setenv("RANK", "3")
    log_as("json")
    logging.getLogger("macs.serving.runtime").warning("MACS: %s", "drifted", extra={"drift": 0.2})
    logging.getLogger("other").warning("not ours")
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "MACS" in one]
    found = json.loads(line)
    assert found.pop("time") and found == {
        "level": "WARNING",
        "logger": "macs.serving.runtime",
        "message": "MACS: drifted",
        "rank": 3,
        "drift": 0.2,
    }


def test_text_is_one_line(capsys):
    log_as("text")
    logging.getLogger("megatron_macs").info("planned %d steps", 2)
    assert capsys.readouterr().err == "rank 0: planned 2 steps\n"


def test_another_form_is_refused():
    with pytest.raises(ValueError, match="log format: found 'xml', expected one of text, json"):
        log_as("xml")
