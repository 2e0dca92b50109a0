"""Requests of one's own, from a folder or a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


DEFAULT_QUESTION = "Describe this picture."


@dataclass(frozen=True)
class Request:
    """A text, perhaps about a picture."""

    text: str
    picture: Path | None = None


def read_requests(path: Path) -> list[Request]:
    """The requests of a folder or of a file of JSON lines; a bad one is a ``ValueError`` with its place."""
    if path.is_dir():
        pictures = sorted(one for one in path.rglob("*") if one.suffix.lower() in PICTURES)
        questions = {one.with_suffix("") for one in pictures}
        texts = [one for one in sorted(path.rglob("*.txt")) if one.with_suffix("") not in questions]
        found = [Request(_question_beside(one), one) for one in pictures]
        found += [Request(one.read_text()) for one in texts]
    else:
        found = [
            _request(line, f"{path}, line {number}", path.parent)
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if line.strip()
        ]
    if not found:
        raise ValueError(f"--data: found no pictures and no texts in {path}")
    return found


def _question_beside(picture: Path) -> str:
    beside = picture.with_suffix(".txt")
    return beside.read_text() if beside.is_file() else DEFAULT_QUESTION


def _request(line: str, place: str, folder: Path) -> Request:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(values, dict) or not values or not set(values) <= {"text", "image"}:
        raise ValueError(
            f"{place}: found {line.strip()[:80]}, expected fields text and image, or one of them"
        )
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{place}: field {name}: found {value!r}, expected a string")
    picture = None if "image" not in values else folder / values["image"]
    if picture is not None and not picture.is_file():
        raise ValueError(f"{place}: field image: found no file {picture}")
    return Request(values.get("text", DEFAULT_QUESTION), picture)


def opened(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a reader makes of a picture; an error names the file."""
    try:
        return reader(path)
    except OSError as error:
        raise ValueError(f"--data: {path}: not a picture: {error}") from error
