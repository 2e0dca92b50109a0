"""What a clone has and a wheel has not: the tiny model and its pictures, in ``examples``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def examples(*names: str) -> None:
    """Make modules of ``examples`` importable by their names, from this clone.

    Raises:
        ImportError: these tools were installed from a wheel.
    """
    for name in names:
        if name in sys.modules:
            continue
        package, module = EXAMPLES / name / "__init__.py", EXAMPLES / f"{name}.py"
        path = package if package.is_file() else module
        if not path.is_file():
            raise ImportError(
                f"{name}: needs a clone of the repository, found tools installed at {ROOT}; in a clone, "
                "pip install -e '.[all]'"
            )
        spec = importlib.util.spec_from_file_location(
            name, path, submodule_search_locations=[str(package.parent)] if path == package else None
        )
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        spec.loader.exec_module(loaded)
