"""Everything on docs/results.md, by one command: see ``tiny_quality.results``."""

import sys

from tiny_quality.results import main

from macs_tools.common.command import run

if __name__ == "__main__":
    raise SystemExit(run("results.py", main, sys.argv[1:]))
