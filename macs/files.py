"""Files: results checked before a run and written whole or not at all; settings read with care."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def check_output(path: str | os.PathLike[str], name: str) -> Path:
    """The path, made absolute, if a file can be written there; to be asked before a run whose result it is.

    Raises a ``ValueError`` that names the argument: no such folder, a folder in its place, no permission.
    """
    found = Path(path).expanduser().resolve()
    if found.is_dir():
        raise ValueError(f"{name}: found the folder {found}, expected a file's path")
    if not found.parent.is_dir():
        raise ValueError(f"{name}: found no folder {found.parent}")
    if not os.access(found.parent, os.W_OK | os.X_OK) or (found.exists() and not os.access(found, os.W_OK)):
        raise ValueError(f"{name}: found no permission to write {found}")
    return found


def output_file(text: str) -> Path:
    """A path to write to, as the ``type`` of a command line's argument; its folder is made if it is
    missing."""
    path = Path(text).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_output(path, "output")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def output_folder(text: str) -> Path:
    """A folder to write to, likewise."""
    path = Path(text).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_output(path / "any", "output")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]
) -> None:
    """Write a safetensors file in the place of ``path``, or leave what was there as it was.

    It is written beside it under another name first: whatever fails, a run that is stopped included, leaves
    the former file, and nothing else.
    """
    from safetensors.torch import save_file

    path = Path(path)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(dict(tensors), aside, metadata=metadata)
        _as_new_file(aside)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _as_new_file(path: str) -> None:
    """The permissions of any new file; those of a temporary one are its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


LARGEST_SETTINGS = 1 << 16
"""Bytes of a file with settings: they take hundreds."""

DEEPEST = 32
"""Levels of a file with settings: they take two."""


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping that a ``.json``, ``.yaml`` or ``.yml`` file holds; an empty file is an empty one.

    Anything else in it is a ``ValueError`` that names the file: a list, a key twice, keys that are no
    strings, numbers no float can hold, YAML's aliases (a few lines of them can stand for gigabytes), a
    file of more than 64 kB.
    """
    path = Path(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"config {path}: expected a .json, .yaml or .yml file")
    size = path.stat().st_size
    if size > LARGEST_SETTINGS:
        raise ValueError(f"config {path}: found {size} bytes, expected settings, at most {LARGEST_SETTINGS}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path}: not UTF-8 text: {error}") from error
    try:
        values = _read_json(text) if path.suffix == ".json" else _read_yaml(text, path)
        _check_plain(values)
    except RecursionError:
        raise ValueError(
            f"config {path}: found more than {DEEPEST} levels, expected settings by name"
        ) from None
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(
            f"config {path}: found {type(values).__name__} at the top, expected settings by name"
        )
    return values


def _read_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"found the key {name!r} twice, expected it once")
            found[name] = value
        return found

    if not text.strip():
        return None
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error


def _read_yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"config {path}: YAML needs pyyaml: pip install pyyaml") from error

    class Once(yaml.SafeLoader):
        """Safe, without aliases, and every key once."""

        level = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise ValueError(f"found the alias *{self.peek_event().anchor}, expected values written out")
            self.level += 1
            if self.level > DEEPEST:
                raise RecursionError
            node = super().compose_node(parent, index)
            self.level -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str):
                    raise ValueError(f"found the key {name!r}, expected a name")
                if name in seen:
                    raise ValueError(f"found the key {name!r} twice, expected it once")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Once)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error


def _check_plain(value: Any, level: int = 0) -> None:
    """Raise unless a value is made of what settings are made of."""
    if level > DEEPEST:
        raise ValueError(f"found more than {DEEPEST} levels, expected settings by name")
    if isinstance(value, dict):
        for name, one in value.items():
            if not isinstance(name, str):
                raise ValueError(f"found the key {name!r}, expected a name")
            _check_plain(one, level + 1)
    elif isinstance(value, list):
        for one in value:
            _check_plain(one, level + 1)
    elif isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise ValueError(
            f"found a number of {value.bit_length()} bits, expected none beyond {LARGEST_NUMBER:g}"
        )


LARGEST_NUMBER = 2**63
"""Settings are far smaller; a longer integer is a mistake, or made to keep us busy."""
