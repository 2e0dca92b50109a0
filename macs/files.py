"""Files that a run leaves behind: checked before it, written whole or not at all."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

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
