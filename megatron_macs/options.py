"""MACS on a Megatron command line: ``--moe-macs``, and a flag for every option and setting."""

from __future__ import annotations

import argparse

from macs.adapters import Options, Runtime, add_flags, options_of

PREFIX = "--moe-macs"


def add_macs_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add MACS's flags to a parser, as Megatron's ``extra_args_provider`` does; returns the parser."""
    add_flags(parser, PREFIX)
    return parser


def macs_options(args: argparse.Namespace) -> Options | None:
    """What the flags of ``add_macs_args`` ask for; none without ``--moe-macs``."""
    return options_of(args, PREFIX)


def runtime_from_args(args: argparse.Namespace) -> Runtime | None:
    """The runtime for ``with_macs``; none without ``--moe-macs``, when no other flag may be given."""
    options = macs_options(args)
    return None if options is None else options.runtime()


def tokens_from_args(args: argparse.Namespace) -> dict[str, int]:
    """The token ids given, as arguments of ``attach_modality``."""
    options = macs_options(args)
    return {} if options is None else options.token_ids
