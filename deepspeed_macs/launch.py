"""Run a script that does not know of MACS, with MACS in DeepSpeed.

    python -m deepspeed_macs.launch [--macs FILE] script.py [its arguments]      # or -m a.module
    torchrun --nproc-per-node 2 -m deepspeed_macs.launch script.py ...
    deepspeed --num_gpus 2 --module deepspeed_macs.launch script.py ...

The script's own DeepSpeed config holds the "macs" block; ``--macs`` names a JSON or YAML file with one
for scripts whose config has none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from macs.adapters import CommandParser, run_script

from .inference import install


def main(arguments: list[str] | None = None) -> None:
    """Install MACS, then run the script as ``__main__`` with its own ``sys.argv``."""
    parser = CommandParser("deepspeed_macs.launch", __doc__)
    parser.add_argument("--macs", type=Path, help="a file with the block")
    # The deepspeed launcher puts this before the script; it is the script's.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("-m", dest="by_name", action="store_true", help="the script is a module's name")
    parser.add_argument("script", help="the script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    found = parser.parse_args(arguments)
    if not found.by_name and not Path(found.script).is_file():
        parser.error(f"found no script {found.script!r}")
    own = [] if found.local_rank is None else [f"--local_rank={found.local_rank}"]
    uninstall = install(found.macs)
    try:
        code = run_script(found.script, [*own, *found.arguments], found.by_name)
    finally:
        uninstall()
    if code is not None:
        sys.exit(code)


if __name__ == "__main__":
    main()
