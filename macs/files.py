"""Files: outputs checked before a run and written whole or not at all; settings."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor


def check_output(path: str | os.PathLike[str], name: str) -> Path:
    """The absolute path, if a file can be written there; to be called before the run that writes it.

    Raises:
        ValueError: no such folder, a folder in its place, or no permission; it names the argument.
    """
    resolved = Path(path).expanduser().resolve()
    if resolved.is_dir():
        raise ValueError(f"{name}: found the folder {resolved}, expected a file's path")
    if not resolved.parent.is_dir():
        raise ValueError(f"{name}: found no folder {resolved.parent}")
    writable = os.access(resolved.parent, os.W_OK | os.X_OK)
    if not writable or (resolved.exists() and not os.access(resolved, os.W_OK)):
        raise ValueError(f"{name}: found no permission to write {resolved}")
    return resolved


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]
) -> None:
    """Replace ``path`` with a safetensors file; if writing fails, the former file stays."""
    from safetensors.torch import save_file

    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # any new file's; safetensors makes files that their owner alone reads
        save_file(dict(tensors), aside, metadata=metadata)
        aside.chmod(mode)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


_place: list[tuple[int, int]] = []


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes: those of ``torch.distributed``, also when its group is
    closed again; before that, the launcher's."""
    if dist.is_available() and dist.is_initialized():
        _place[:] = [(dist.get_rank(), dist.get_world_size())]
    return _place[0] if _place else (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a ``.json``, ``.yaml`` or ``.yml`` file; an empty file is an empty mapping.

    Raises:
        ValueError: another kind of file, or something else than a mapping of names.
    """
    path = Path(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"config {path}: expected a .json, .yaml or .yml file")
    try:
        text = path.read_text(encoding="utf-8")
        values = _parsed(text, path.suffix) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path}: not valid {path.suffix[1:]}: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"config {path}: found {str(values)[:80]!r}, expected settings by name")
    return values


def _parsed(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
