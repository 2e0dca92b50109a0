"""What a clone has and a wheel has not: the tiny model and its pictures, in ``examples``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def examples() -> None:
    """Make ``tiny_vlm`` importable, from this clone.

    Raises:
        ImportError: these tools were installed from a wheel.
    """
    folder = ROOT / "examples"
    if not (folder / "tiny_vlm").is_dir():
        raise ImportError(
            f"tiny_vlm: needs a clone of the repository, found tools installed at {ROOT}; in a clone, "
            "pip install -e '.[all]'"
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
