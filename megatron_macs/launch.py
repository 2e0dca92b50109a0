"""Run a Megatron script that knows nothing of MACS, with MACS in its MoE layers.

    torchrun --nproc-per-node 8 -m megatron_macs.launch SCRIPT [its arguments] --moe-macs \\
        --moe-macs-image-token-id 151655 --moe-macs-capacity-factor 1.0

Adds the flags of ``megatron_macs.arguments`` to the script's own, and swaps the MoE layer of every
transformer layer that is built from a layer spec. Without ``--moe-macs`` the script runs as it is.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from macs import CommandParser, LayerReport, Profile, Runtime, log_as, run_script, summarized
from macs.files import check_output
from macs.records.traffic import rank_path

from .arguments import add_macs_args, runtime_from_args, tokens_from_args

logger = logging.getLogger(__name__)


def summary(runtime: Runtime, reports: Sequence[LayerReport]) -> str:
    """What MACS did on this rank, in a line."""
    steps = sum(int((report.planned > 0).sum()) for report in reports)
    if not steps:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        return (
            "MACS planned nothing: no forward pass in eval() mode had "
            f"min_tokens = {runtime.config.least_tokens(kind)} tokens or more"
        )
    kept, rerouted, dropped = (
        sum(float(getattr(report, name).sum()) for report in reports)
        for name in ("kept", "rerouted", "dropped")
    )
    count = max(1.0, kept + rerouted + dropped)
    return (
        f"MACS planned {steps} steps of {len(reports)} layers: kept {kept / count:.1%} of the assignments, "
        f"rerouted {rerouted / count:.1%}, dropped {dropped / count:.1%}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Take MACS's flags off the command line, install it, and run the script as ``__main__``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    by_name = arguments[:1] == ["-m"]
    given = arguments[1:] if by_name else arguments
    missing = not given or given[0].startswith("-")
    # Where there is a script, --help is the script's.
    parser = CommandParser("megatron_macs.launch SCRIPT", __doc__, add_help=missing)
    add_macs_args(parser)
    parser.add_argument(
        "--moe-macs-calibrate",
        metavar="FILE",
        type=Path,
        help="plan nothing, count tokens per expert and modality, and write a profile when the script ends",
    )
    parser.add_argument(
        "--moe-macs-record",
        metavar="FILE",
        type=Path,
        help="write what the routers chose to a file, for macs bench and macs simulate",
    )
    if missing:
        parser.parse_args(given)
        parser.error("expected a script, or -m and a module, and its arguments")
    script = given[0]
    if not by_name and not Path(script).is_file():
        parser.error(f"found no script {script!r}")
    own, rest = parser.parse_known_args(given[1:])
    flags = rest[: rest.index("--")] if "--" in rest else rest
    for flag in flags:
        if flag.startswith("--moe-macs"):
            parser.unknown(flag)
    try:
        # Made absolute now: the script may go to another folder.
        calibrate, record = (
            None if path is None else check_output(path, flag)
            for flag, path in (
                ("--moe-macs-calibrate", own.moe_macs_calibrate),
                ("--moe-macs-record", own.moe_macs_record),
            )
        )
        runtime = runtime_from_args(own)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    if calibrate is not None:
        if own.moe_macs_policy is not None or own.moe_macs_profile is not None:
            parser.error("found --moe-macs-calibrate with a policy or a profile; nothing is planned with it")
        if record is not None:
            parser.error("found --moe-macs-calibrate with --moe-macs-record; expected one of them")
    from .compat import check_megatron

    check_megatron()
    from .swap import install

    uninstall = None if runtime is None else install(runtime, tokens_from_args(own))
    try:
        if runtime is not None and calibrate is not None:
            runtime.start_calibration()
        if runtime is not None and record is not None:
            runtime.start_routing()
        code = run_script(script, rest, by_name)
    finally:
        if uninstall is not None:
            uninstall()
        if runtime is not None and record is not None:
            runtime.save_routing(record)  # also of a script that failed: what is there is as it was
    if runtime is not None and calibrate is not None:
        if code in (None, 0):  # of a script that failed the counts are not all there
            save_profile(runtime, calibrate)
    elif runtime is not None:
        conclude(runtime)
    if code is not None:
        sys.exit(code)


def save_profile(runtime: Runtime, path: Path) -> None:
    """Write what all ranks counted to one file; where the script has closed its process group, what this
    rank counted, to a file of its own."""
    try:
        mine: Profile | None = runtime.measured_profile()
    except ValueError as error:
        logger.warning("rank %s: %s", os.environ.get("RANK", 0), error)
        mine = None
    parts, rank = [mine], int(os.environ.get("RANK", 0))
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        rank = dist.get_rank()
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        path, rank = rank_path(path), 0
    counted = [one for one in parts if one is not None]
    if not counted and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1):
        sys.exit("megatron_macs.launch: --moe-macs-calibrate was given, but no MoE layer saw a token")
    if counted and rank == 0:
        profile = Profile.merged(counted)
        profile.save(path)
        print(f"MACS: profile of {profile.num_layers} layers in {path}", file=sys.stderr)


def conclude(runtime: Runtime) -> None:
    """Say what was planned; end with an error if a script alone on its machine built nothing to plan."""
    logging.disable(logging.NOTSET)  # the script has ended, and what it wanted silent with it
    if runtime.layers:
        own = logging.getLogger("megatron_macs")
        if not own.handlers:
            log_as("text")
        if int(os.environ.get("RANK", 0)) == 0:
            reports = [layer.recorder.read() for layer in runtime.layers if layer.recorder.started]
            # For who reads the log by machine: ``METRICS``, means over the layers.
            own.info("%s", summary(runtime, reports), extra=summarized(reports) if reports else {})
        return
    nothing = "megatron_macs.launch: --moe-macs was given, but the script built no MoE layer"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(nothing)
    logger.warning("%s on this rank", nothing)  # a stage of a pipeline may have none


if __name__ == "__main__":
    main()
