"""``macs``: one command for the tools; only the one that is asked for is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from macs.runtime.launch import leave, nearest

from .common.command import run

COMMANDS = {
    "doctor": ("doctor", "what is installed here, and whether MACS can work with it"),
    "tune": ("tune.run", "a profile: the experts' modality, and the split of a load among layers"),
    "report": (
        "report.run",
        "recorded traffic, and what policies and balancers would win on it, at any EP size",
    ),
    "when": ("when", "time of a prefill by model, GPU and load: MACS beside EPLB and pruning"),
    "evaluate": ("evaluate", "what policies and loads cost in answers, on a model and requests of yours"),
    "bench planner": ("bench.run", "time of the planner, by step"),
    "bench layer": ("bench.run", "Megatron's real MoE layer over processes, policies in turn"),
    "bench launches": ("common.launches", "kernel launches of a plan, counted exactly"),
    "bench gpu": ("bench.gpu", "what only a GPU can tell: kernels, graphs, times, in one run"),
}
"""By the words that ask for it: where a command's ``main`` is, and what it is for."""


def usage() -> str:
    """The commands and what they are for."""
    from macs.version import __version__

    width = max(map(len, COMMANDS))
    lines = [f"  macs {words.ljust(width)}  {purpose}" for words, (_, purpose) in COMMANDS.items()]
    title = f"macs {__version__}: modality-aware capacity scaling for multimodal MoE inference"
    return "\n".join([title, "", *lines, "", "macs COMMAND --help tells what a command takes."])


def main(given: Sequence[str] | None = None) -> int:
    """The exit code of the command that the words ask for."""
    words = list(sys.argv[1:] if given is None else given)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from macs.version import __version__

        print(f"macs {__version__}")
        return 0
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            break
    else:
        if words[0] == "bench" and words[1:2] in ([], ["-h"], ["--help"]):
            print("\n".join(line for line in usage().splitlines() if "macs bench" in line))
            return 0
        asked = " ".join(words[: 2 if words[0] == "bench" else 1])
        leave("macs", f"found {asked!r}, expected one of {', '.join(COMMANDS)}{nearest(asked, COMMANDS)}")
    # The modes of a benchmark share a parser, which reads the mode itself.
    module, _ = COMMANDS[name]
    shared = module == "bench.run"

    def command(rest: Sequence[str]) -> int | None:
        return importlib.import_module(f".{module}", __package__).main(rest)

    return run(f"macs {name}", command, words[1:] if shared else words[length:])


if __name__ == "__main__":
    raise SystemExit(main())
