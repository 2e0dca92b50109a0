"""Policies and settings on the tiny model's held-out questions; see ``tiny_quality.run``."""

import sys

from tiny_quality.run import main

from macs_tools.common.command import run

if __name__ == "__main__":
    raise SystemExit(run("evaluate_tiny_vlm.py", main, sys.argv[1:]))
