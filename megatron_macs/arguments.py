"""MACS on a Megatron command line: ``--moe-macs``, and a flag for every setting."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from macs import (
    POLICIES,
    PRESETS,
    TOKEN_IDS,
    MACSConfig,
    Profile,
    Runtime,
    log_as,
    serve_metrics,
    token_ids_in,
)
from macs.config import RENAMED
from macs.files import read_mapping
from macs.serving.logs import FORMATS


def add_macs_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add MACS's flags to a parser, as Megatron's ``extra_args_provider`` does; returns the parser.

    Flags that are not given leave a setting to ``--moe-macs-config``, then to the preset, then to
    ``MACSConfig``'s default.
    """
    group = parser.add_argument_group("macs", "modality-aware capacity scaling of MoE layers at inference")
    group.add_argument("--moe-macs", action="store_true", help="plan every MoE layer with MACS")
    group.add_argument("--moe-macs-config", metavar="FILE", help="settings, a .json or .yaml file")
    group.add_argument("--moe-macs-preset", choices=tuple(PRESETS), help="a named set of settings")
    group.add_argument("--moe-macs-policy", choices=POLICIES, help="macs (default) or a baseline")
    group.add_argument("--moe-macs-profile", metavar="FILE", help="a calibration profile")
    group.add_argument(
        "--moe-macs-metrics-port",
        type=int,
        metavar="PORT",
        help="serve Prometheus metrics on this port and, in other processes, on it + LOCAL_RANK",
    )
    group.add_argument(
        "--moe-macs-metrics-address", metavar="ADDRESS", help="where to listen (default: this machine alone)"
    )
    group.add_argument(
        "--moe-macs-log-format", choices=FORMATS, help="write MACS's log to stderr, as text or JSON lines"
    )
    for name in TOKEN_IDS:
        kind = name.removesuffix("_token_id")
        group.add_argument(_flag(name), type=int, metavar="ID", help=f"input id of {kind} tokens")
    for setting in fields(MACSConfig):
        metadata, default = setting.metadata, setting.default
        options: dict[str, Any] = {"help": f"{metadata['help']} (default: {default})", "default": None}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif metadata["choices"]:
            options["choices"] = metadata["choices"]
        else:
            options["type"] = int if metadata["whole"] else float
        group.add_argument(_flag(setting.name), **options)
    for former in RENAMED:
        group.add_argument(_flag(former), type=float, default=None, help=argparse.SUPPRESS)
    return parser


def config_from_args(args: argparse.Namespace) -> MACSConfig:
    """The settings that the flags of ``add_macs_args`` ask for; a bad one is a ``ValueError``."""
    values = {} if args.moe_macs_config is None else dict(read_mapping(args.moe_macs_config))
    if args.moe_macs_preset is not None:
        values["preset"] = args.moe_macs_preset
    names = [*(setting.name for setting in fields(MACSConfig)), *RENAMED]
    flags = {name: getattr(args, f"moe_macs_{name}") for name in names}
    given = {name: value for name, value in flags.items() if value is not None}
    return MACSConfig.from_dict(values).updated(**given)


def runtime_from_args(args: argparse.Namespace) -> Runtime | None:
    """The runtime for ``with_macs``; none without ``--moe-macs``, when no other flag may be given."""
    if not args.moe_macs:
        given = vars(args).items()
        others = [name for name, value in given if name.startswith("moe_macs_") and value is not None]
        if others:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise ValueError(f"found {flags} without --moe-macs, which is what turns MACS on")
        return None
    path, port, address = args.moe_macs_profile, args.moe_macs_metrics_port, args.moe_macs_metrics_address
    if port is None and address is not None:
        raise ValueError("found --moe-macs-metrics-address without --moe-macs-metrics-port")
    if args.moe_macs_log_format is not None:
        log_as(args.moe_macs_log_format)
    runtime = Runtime(
        config_from_args(args),
        policy=args.moe_macs_policy or "macs",
        profile=None if path is None else Profile.load(path),
    )
    if port is not None:
        serve_metrics(runtime, port, address=address)
    return runtime


def tokens_from_args(args: argparse.Namespace) -> dict[str, int]:
    """The token ids given, as ``attach_modality`` takes them."""
    return token_ids_in(args, "moe_macs_")


def _flag(name: str) -> str:
    return f"--moe-macs-{name.replace('_', '-')}"
