"""Run a Megatron script that knows nothing of MACS, with MACS in its MoE layers.

    torchrun --nproc-per-node 8 -m megatron_macs.launch SCRIPT [its arguments] --moe-macs \\
        --moe-macs-image-token-id 151655 --moe-macs-capacity-factor 1.0

Adds the flags of ``megatron_macs.arguments`` to the script's own, and swaps the MoE layer of every
transformer layer that is built from a layer spec. Without ``--moe-macs`` the script runs as it is.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import runpy
import sys
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from macs import Runtime, attach_modality

from .arguments import add_macs_args, runtime_from_args, tokens_from_args
from .spec import macs_mlp

MODELS = (
    ("megatron.core.models.gpt", "GPTModel"),
    ("megatron.core.models.mamba", "MambaModel"),
)
"""Language models that are called with ``input_ids``."""


def install(runtime: Runtime, token_ids: dict[str, int] | None = None) -> Callable[[], None]:
    """Build every transformer layer with MACS from now on; returns a function that undoes it.

    ``token_ids``: arguments of ``attach_modality``, for every language model built; none leaves the
    mask to ``macs.modality``.
    """
    undo = [_wrap(TransformerLayer, functools.partial(_build_layer, runtime))]
    token_ids = token_ids or {}
    for module, name in MODELS if token_ids else ():
        try:
            model = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue  # it needs a package that is not here
        undo.append(_wrap(model, functools.partial(_build_model, token_ids)))

    def uninstall() -> None:
        for one in reversed(undo):
            one()

    return uninstall


def _wrap(owner: type, around: Callable[..., None]) -> Callable[[], None]:
    """Put ``around(original, call)`` in the place of a class's constructor; returns how to undo it."""
    original: Callable[..., None] = vars(owner)["__init__"]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        around(original, signature.bind(self, *args, **kwargs))

    owner.__init__ = init  # type: ignore[misc]

    def undo() -> None:
        owner.__init__ = original  # type: ignore[misc]

    return undo


def _build_layer(runtime: Runtime, original: Callable[..., None], call: inspect.BoundArguments) -> None:
    submodules = call.arguments["submodules"]
    mlp = macs_mlp(submodules.mlp, runtime, call.arguments.get("pg_collection"))
    if mlp is not None:
        call.arguments["submodules"] = copy(submodules)
        call.arguments["submodules"].mlp = mlp
    original(*call.args, **call.kwargs)


def _build_model(
    token_ids: dict[str, int], original: Callable[..., None], call: inspect.BoundArguments
) -> None:
    original(*call.args, **call.kwargs)
    attach_modality(call.args[0], **token_ids)


def main(arguments: list[str] | None = None) -> None:
    """Take MACS's flags off the command line, install it, and run the script as ``__main__``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="megatron_macs.launch SCRIPT",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=not arguments or arguments[0].startswith("-"),  # else --help is the script's
    )
    add_macs_args(parser)
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.error("expected a script and its arguments")
    script = arguments[0]
    if not Path(script).is_file():
        parser.error(f"found no script {script!r}")
    own, rest = parser.parse_known_args(arguments[1:])
    try:
        runtime = runtime_from_args(own)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).resolve().parent))
    uninstall = None if runtime is None else install(runtime, tokens_from_args(own))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if uninstall is not None:
            uninstall()
    if runtime is not None and not runtime.layers:
        sys.exit("megatron_macs.launch: --moe-macs was given, but the script built no MoE layer")


if __name__ == "__main__":
    main()
