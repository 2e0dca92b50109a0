"""Run a Megatron script that does not know of MACS, with MACS in its MoE layers.

    torchrun --nproc-per-node 8 -m megatron_macs.launch SCRIPT [its arguments] --moe-macs \\
        --moe-macs-image-token-id 151655 --moe-macs-target-load 1.05

Adds the flags of ``megatron_macs.options`` to the script's own, and replaces the MoE layer of every
transformer layer that is built from a layer spec. Without ``--moe-macs`` the script runs unchanged.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from macs.adapters import (
    CommandParser,
    LayerReport,
    ProcessError,
    Runtime,
    first_process,
    leave,
    run_script,
    summarized,
)

from .options import add_macs_args, macs_options

logger = logging.getLogger("megatron_macs")  # also where this is __main__


def summary(runtime: Runtime, reports: Sequence[LayerReport]) -> str:
    """What MACS did on this rank, in one line."""
    steps = sum(int((report.planned > 0).sum()) for report in reports)
    if not steps:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return (
            "MACS planned nothing: no forward pass in eval() mode had "
            f"min_tokens = {runtime.config.least_tokens(device)} tokens or more"
        )
    kept, rerouted, dropped = (
        sum(float(getattr(report, name).sum()) for report in reports)
        for name in ("kept", "rerouted", "dropped")
    )
    count = max(1.0, kept + rerouted + dropped)
    return (
        f"MACS planned {steps} times in {len(reports)} layers: kept {kept / count:.1%} of the assignments, "
        f"rerouted {rerouted / count:.1%}, dropped {dropped / count:.1%}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Take MACS's flags off the command line, install it, and run the script as ``__main__``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    by_name = arguments[:1] == ["-m"]
    given = arguments[1:] if by_name else arguments
    missing = not given or given[0].startswith("-")
    # With a script, --help is the script's.
    parser = CommandParser("megatron_macs.launch SCRIPT", __doc__, add_help=missing)
    add_macs_args(parser)
    if missing:
        parser.parse_args(given)
        parser.error("expected a script, or -m and a module, and its arguments")
    script = given[0]
    if not by_name and not Path(script).is_file():
        parser.error(f"found no script {script!r}")
    flags, rest = parser.parse_known_args(given[1:])
    for flag in rest[: rest.index("--")] if "--" in rest else rest:
        if flag.startswith("--moe-macs"):
            parser.unknown(flag)
    try:
        options = macs_options(flags)
        runtime = None if options is None else options.runtime()
    except ProcessError as error:
        leave(parser.prog, error)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    from .compat import check_megatron

    check_megatron()
    if options is None or runtime is None:
        plain = run_script(script, rest, by_name)
        sys.exit(plain) if plain is not None else None
        return
    from .installation import install

    layers: list[object] = []  # kept for what is said and written below, when the script has let go of them
    uninstall = install(runtime, options.token_ids, layers)
    code: object = 1
    try:
        code = run_script(script, rest, by_name)
    finally:
        uninstall()
        # A recording of a script that failed is as far as it came; the counts of a calibration are not.
        if options.calibrate is None or code in (None, 0):
            try:
                options.finish(runtime)
            except ValueError as error:
                sys.exit(f"megatron_macs.launch: {error}")
    if options.calibrate is None:
        conclude(runtime)
    if code is not None:
        sys.exit(code)  # type: ignore[arg-type]


def conclude(runtime: Runtime) -> None:
    """Log what was planned; an error if a script with one process built no MoE layer."""
    logging.disable(logging.NOTSET)  # a script that disabled logging has ended
    if runtime.layers:
        if first_process():
            reports = [layer.recorder.read() for layer in runtime.layers if layer.recorder.started]
            # For structured logs: ``METRICS``, means over the layers.
            logger.info("%s", summary(runtime, reports), extra=summarized(reports) if reports else {})
        return
    nothing = "megatron_macs.launch: --moe-macs was given, but the script built no MoE layer"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(nothing)
    logger.warning("%s on this rank", nothing)  # a pipeline stage may have none


if __name__ == "__main__":
    package = logging.getLogger("megatron_macs")
    if not logging.getLogger().handlers and not package.handlers:  # an application's handlers are its own
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)
    main()
