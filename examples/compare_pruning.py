"""MACS beside visual-token pruning and expert balancing: see ``tiny_quality.rivals``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_quality.rivals import main

if __name__ == "__main__":
    main()
