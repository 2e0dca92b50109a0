"""What the examples are asked, checked before an engine or transformers is imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from macs import POLICIES, MACSConfig
from macs_tools.common.command import Parser, one_line, output_file, quiet

from . import CHECKPOINT, data
from .vocabulary import FILLER, VOCABULARY, encode

PROFILE = Path("runs") / "tiny_vlm.profile.safetensors"
EXPERTS = 16
"""Of the tiny model: so many processes at most, and a divisor of them."""


def example_parser(script: str, description: str | None) -> Parser:
    """A parser with the arguments that all examples share."""
    parser = Parser(script, description)
    parser.add_argument(
        "--policy",
        action="append",
        choices=[name for name, policy in POLICIES.items() if policy.plans],
        help="a policy to run beside vanilla; may be given several times (default: token-drop, "
        "expanded-drop, and MACS at more than one setting)",
    )
    parser.add_argument("--config", type=Path, help="MACS settings, a .yaml or .json file")
    parser.add_argument(
        "--target-load", type=float, help="most rows of a rank over the mean, for every policy"
    )
    parser.add_argument("--samples", type=int, default=896, help="questions to ask")
    parser.add_argument("--batch", type=int, default=64, help="questions asked at once, over all ranks")
    parser.add_argument("--repeats", type=int, default=9, help="prompts timed for each policy")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument(
        "--profile", type=Path, help=f"made if it is not there (default: a shipped tuning, or {PROFILE})"
    )
    parser.add_argument("--json", type=output_file, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="ask about this picture instead")
    parser.add_argument("--question", help="what to ask about --picture")
    return parser


def example(
    name: str,
    description: str | None,
    build: Callable[[argparse.Namespace, Any], Any],
    engine: str,
    what: str,
    flags: Mapping[str, dict[str, Any]] | None = None,
    **defaults: Any,
) -> None:
    """Run an example: ``build`` makes an ``Experiment`` in an engine, "megatron" or "deepspeed".

    what: said of the engine under the table. flags: further ones; with ``--model`` a model of one's own may
    take the tiny one's place.
    """
    parser = example_parser(name, description)
    for flag, options in (flags or {}).items():
        parser.add_argument(flag, **options)
    parser.set_defaults(**defaults)
    arguments = checked(parser)
    quiet()
    with one_line(name):
        from .experiment import run  # which imports torch

        run(arguments, build, engine, what)


def checked(parser: Parser) -> argparse.Namespace:
    """The arguments, or one line about what is wrong with them, from the first process."""
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(f"run me under torchrun: torchrun --nproc-per-node 2 {sys.argv[0]}")
    own_model = getattr(arguments, "model", None) is not None  # the tiny one's vocabulary does not apply
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not own_model and EXPERTS % processes:
        parser.error(f"found {processes} processes, expected a divisor of the model's {EXPERTS} experts")
    if (arguments.picture is None) != (arguments.question is None):
        parser.error("--picture and --question go together: found one of them")
    parser.positive(arguments, "samples", "batch", "repeats")
    if arguments.samples < max(1, arguments.batch // processes) * processes:
        parser.error(
            f"--samples: found {arguments.samples}, fewer than one batch (--batch {arguments.batch})"
        )
    name = "model" if own_model else "checkpoint"
    if not (getattr(arguments, name) / "config.json").is_file():
        parser.error(f"--{name}: found no config.json in {getattr(arguments, name)}")
    if own_model and arguments.profile is None:
        arguments.profile = PROFILE.with_name(f"{arguments.model.resolve().name}.profile.safetensors")
    try:
        base = MACSConfig() if arguments.config is None else MACSConfig.from_file(arguments.config)
        base.updated(target_load=arguments.target_load)
        if arguments.picture is not None:
            with Image.open(arguments.picture) as image:
                image.verify()
            if not own_model:
                question_tokens(arguments.question)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def question_tokens(question: str) -> list[int]:
    """A typed question as a prompt about a picture; a word the model never learned is a ``ValueError``."""
    words = question.replace("?", " ? ").split()
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        known = sorted(word for word in VOCABULARY if word.isalpha() and len(word) > 1)
        raise ValueError(
            f"--question: the model does not know {unknown}, expected some of: {' '.join(known)}"
        )
    room = data.QUESTION_TOKENS - len(words)
    if room < 0:
        raise ValueError(f"--question: found {len(words)} words, at most {data.QUESTION_TOKENS} fit")
    return encode(FILLER) * room + data.PICTURE_PREFIX + encode(" ".join(words))
