"""What the examples measure on the tiny model, whatever the engine: answers, loads and times by policy."""

from __future__ import annotations

import argparse
import json
import operator
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from macs import POLICIES, MACSConfig, Profile, Runtime
from macs.adapters import summarized
from macs.config import TARGET_LOAD
from macs.runtime.launch import first_process
from macs_tools.common.answers import divergence
from macs_tools.tune.model import Said

from . import CHECKPOINT, data
from . import model as tiny
from .arguments import PROFILE, question_tokens
from .clock import LayerClock
from .results import Results, results_table
from .vocabulary import words_of

VANILLA = "vanilla"
Shown = dict[str, tuple[str, MACSConfig]]
"""Columns of MACS: title -> policy and settings."""

PAPER = "paper", MACSConfig(target_load=TARGET_LOAD)
"""The paper's policy under the load that the others keep to."""

COLUMNS: Shown = {"paper": PAPER, "default": ("macs", MACSConfig())}

MAX_KL = 0.001
"""Nats that the tuned column may cost in the answers, by what its tuning verified."""


def columns_of(arguments: argparse.Namespace) -> Shown:
    """The settings of MACS to show; with the tuning of the shipped model, where there is one for so many
    ranks, whose file is the profile then."""
    tuning = Path(__file__).parent / f"tuning-{dist.get_world_size()}-ranks.safetensors"
    own = arguments.profile is not None or arguments.checkpoint != CHECKPOINT
    if own or not tuning.exists():
        return COLUMNS
    arguments.profile = tuning
    return {**COLUMNS, "tuned": ("macs", MACSConfig(split="tuned", max_kl=MAX_KL))}


def share_of(arguments: argparse.Namespace) -> int:
    """Questions a rank asks at once."""
    return max(1, arguments.batch // dist.get_world_size())


def settings_by_name(arguments: argparse.Namespace, columns: Shown) -> Shown:
    """Column title -> policy and settings, vanilla first; ``columns`` where no file gives settings. The last
    of them without a split says how much the baselines may take."""
    target = arguments.target_load
    changes: dict[str, Any] = {} if target is None else {"target_load": target, "max_kl": None}
    policy, last = [one for one in columns.values() if one[1].split == "uniform"][-1]
    if arguments.config is None:
        base = POLICIES[policy].configured(last)
        own = {f"macs {name}": one for name, one in columns.items()}
    else:
        base = MACSConfig.from_file(arguments.config)
        own = {"macs": (policy, base)}
    chosen: Shown = {VANILLA: (VANILLA, base)}
    shown: tuple[str, ...] = ("token-drop", "expanded-drop", "rank-balanced", "macs")
    if POLICIES[policy].configured(base).level == "expert":  # a step costs what its fullest expert does
        shown = ("token-drop", "expanded-drop", "macs")
    for name in arguments.policy or shown:
        entries = own if name == "macs" else {name: (name, base)}
        chosen |= {title: (one, config.updated(**changes)) for title, (one, config) in entries.items()}
    return chosen


class Experiment:
    """The model in its engine on every rank, and what is measured on it.

    engine.generate answers samples greedily, token ids up to and with the end token; runtime is its MACS
    layers' own; clock times them; group holds the expert-parallel ranks; columns are those of MACS to show;
    said gives log-probabilities [A, V] of answers, where the engine can. Every rank makes the same calls.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        console: Console,
        runtime: Runtime,
        engine: Any,
        clock: LayerClock,
        group: dist.ProcessGroup,
        columns: Shown | None = None,
        said: Said | None = None,
    ) -> None:
        self.arguments = arguments
        self.console = console
        self.runtime = runtime
        self.engine = engine
        self.clock = clock
        self.group = group
        self.columns = COLUMNS if columns is None else columns
        self.said = said
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.share = share_of(arguments)

    def mine(self, samples: list[data.Sample]) -> list[list[data.Sample]]:
        """This rank's part of every batch; all ranks have equally many, of equal size."""
        step = self.share * self.ranks
        whole = len(samples) // step * step
        return [samples[i + self.rank * self.share :][: self.share] for i in range(0, whole, step)]

    def profile(self) -> Profile:
        """The profile on disk, or, where there is none, one measured on validation samples."""
        path = self.arguments.profile or PROFILE
        there = [path.exists()]
        dist.broadcast_object_list(there, src=0)
        if not there[0]:
            self.console.print(f"no profile at {path}: measuring one, about a minute")
            samples = self.questions(1, "validation", 4 * self.share * self.ranks)
            with Progress(console=self.console, transient=True) as progress, self.runtime.calibration():
                self.answers(self.mine(samples), progress, "calibrating")
            profile = self.runtime.measured_profile(self.group)
            if self.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                profile.save(path)
            dist.barrier()
        return Profile.load(path)

    def answers(self, batches: list[list[data.Sample]], progress: Progress, title: str) -> list[list[int]]:
        """Every answer of this rank's batches under the policy in use."""
        bar = progress.add_task(title, total=len(batches))
        found = []
        for batch in batches:
            found += self.engine.generate(batch)
            progress.advance(bar)
        return found

    def scored(self, batches: list[list[data.Sample]], answers: list[list[int]]) -> list[Tensor]:
        """Log-probabilities of this rank's ``answers`` under the policy in use; nothing is recorded."""
        if self.said is None:
            return []
        found, ahead = [], iter(answers)
        self.runtime.recording = False
        with torch.inference_mode():
            for batch in batches:
                found += self.said(batch, [next(ahead) for _ in batch])
        self.runtime.recording = True
        return found

    def layer_times(
        self,
        batch: list[data.Sample],
        chosen: dict[str, tuple[str, MACSConfig]],
        profile: Profile,
        progress: Progress,
    ) -> dict[str, float]:
        """Median milliseconds of a MoE layer in prefill, on the slowest rank, policies in turn.

        Vanilla is the engine's own layer: MACS is off, not merely idle. Nothing is recorded.
        """
        times: dict[str, list[float]] = {title: [] for title in chosen}
        bar = progress.add_task("timing the layers", total=self.arguments.repeats + 1)
        for repeat in range(self.arguments.repeats + 1):
            for title, (policy, config) in chosen.items():
                self.runtime.use(policy, config, profile)
                self.runtime.enabled, self.runtime.recording = title != VANILLA, False
                self.engine.generate(batch, tokens=1)  # warms the planner of this policy
                with self.clock.running() as calls:
                    self.engine.generate(batch, tokens=1)
                slowest = max(self.gathered([statistics.mean(calls)]))
                if repeat > 0:
                    times[title].append(slowest)
            progress.advance(bar)
        self.runtime.enabled, self.runtime.recording = True, True
        return {title: statistics.median(values) for title, values in times.items()}

    def gathered(self, value: list) -> list:
        """Every rank's list, joined."""
        parts: list[list] = [[] for _ in range(self.ranks)]
        dist.all_gather_object(parts, value)
        return [item for part in parts for item in part]

    def run(self) -> dict[str, Results]:
        """Every policy's results, over all ranks."""
        chosen = settings_by_name(self.arguments, self.columns)
        profile = self.profile()
        batches = self.mine(self.questions(0, "test", self.arguments.samples))
        asked = self.gathered([sample for batch in batches for sample in batch])
        answers, reports, kl = {}, {}, {}
        with Progress(console=self.console) as progress:
            for title, (policy, config) in chosen.items():
                self.runtime.use(policy, config, profile)
                own = self.answers(batches, progress, title)
                answers[title] = self.gathered(own)
                reports[title] = [report.prefill for report in self.runtime.reports(self.group)]
                if title == VANILLA:
                    expected, stock = own, self.scored(batches, own)
                given = stock if title == VANILLA else self.scored(batches, expected)
                kl[title] = self.gathered([divergence(*pair) for pair in zip(stock, given, strict=True)])
            times = self.layer_times(batches[0], chosen, profile, progress)
        tasks = [one for one in data.TASKS if any(sample.task == one for sample in asked)]

        def right(title: str, task: str) -> float:
            pairs = zip(answers[title], asked, strict=True)
            return statistics.mean(found == one.answer for found, one in pairs if one.task == task)

        return {
            title: {
                **summarized(reports[title]),
                "accuracy": {task: right(title, task) for task in tasks},
                "agreement": statistics.mean(map(operator.eq, answers[title], answers[VANILLA])),
                "kl": statistics.mean(kl[title]) if kl[title] else None,
                "layer_ms": times[title],
                "time_ratio": times[title] / times[VANILLA],
            }
            for title in chosen
        }

    def about_tuned(self) -> str:
        """What the tuned column is; nothing where a flag gives its target."""
        config, tuning = self.columns["tuned"][1], self.profile().tuning
        if self.arguments.target_load is not None or config.max_kl is None or tuning is None:
            return ""
        target = tuning.target_within(config.max_kl)
        return (
            f" Tuned: {target:g} of the mean, split among the layers by macs tune, which verified a KL of at "
            f"most {config.max_kl:g} on other questions (--moe-macs-max-kl {config.max_kl:g})."
        )

    def questions(self, seed: int, split: str, count: int) -> list[data.Sample]:
        """What is asked, the same on every rank."""
        return data.draw_samples(seed, split, data.TASKS, count)

    def own_question(self, picture: Path, question: str) -> data.Sample:
        """A user's question about a user's picture."""
        return data.Sample("own", question_tokens(question), [], tiny.open_picture(picture))

    def ask(self, picture: Path, question: str) -> Iterator[tuple[str, str]]:
        """Policy and answer to a user's question about a user's picture: of vanilla and of the last column of
        MACS, or of every policy asked for."""
        sample = self.own_question(picture, question)
        profile = self.profile()
        chosen = settings_by_name(self.arguments, self.columns)
        if not self.arguments.policy:
            chosen = {title: chosen[title] for title in (VANILLA, list(chosen)[-1])}
        for title, (policy, config) in chosen.items():
            self.runtime.use(policy, config, profile)
            yield title, self.words(self.engine.generate([sample])[0])

    def words(self, ids: Sequence[int]) -> str:
        """An answer as text."""
        return words_of(ids)

    caution = (
        "The model knows handwritten digits on photographs, and nothing else: its answer about any other "
        "picture is a guess."
    )
    """Said under the answer to a question of one's own."""

    def further_columns(self, titles: list[str]) -> dict[str, list[str]]:
        """Columns that only this engine's table has: heading -> a cell for each policy."""
        return {}


ENGINES = {"megatron": ("Megatron-Core", "megatron.core"), "deepspeed": ("DeepSpeed", "deepspeed")}
"""Names, as they are written and imported."""


def describe_run(arguments: argparse.Namespace, engine: str, what: str, share: int) -> str:
    """The caption of a table: what was run, and what its rows mean."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    name, module = ENGINES[engine]
    version = import_module(module).__version__
    ranks = dist.get_world_size()
    batch = share * ranks
    asked = arguments.samples // batch * batch
    return (
        f"{name} {version}, {what}, {ranks} expert-parallel ranks, {device}; {asked} questions in "
        f"batches of {batch}. "
        "Load: the largest rank's rows over the mean of the router's choice. KL: of the answers, in nats, "
        "from vanilla. Same: answers that equal vanilla's; pictures, texts: right answers. ms: of a MoE "
        "layer in prefill, median on the slowest rank; time: over vanilla's, the engine's own layer."
    )


NEXT = """Next:
  your own picture   --picture FILE --question "what is the largest digit ?"
  your own model     macs tune --model DIR --data FILE --ranks 8
  does it pay        macs when --loads 1.2 2
  every figure       --json FILE"""


def show(arguments: argparse.Namespace, experiment: Experiment, engine: str, what: str) -> None:
    """Run what the arguments ask for and print it."""
    console = experiment.console
    if arguments.picture is not None:
        for title, answer in experiment.ask(arguments.picture, arguments.question):
            console.print(f"{title:>16}: {answer}")
        console.print(experiment.caution)
        return
    results = experiment.run()
    caption = describe_run(arguments, engine, what, experiment.share)
    if "macs tuned" in results:
        caption += experiment.about_tuned()
    console.print(results_table(results, experiment.further_columns(list(results))))
    console.print(caption, highlight=False)
    console.print(NEXT, highlight=False, markup=False)
    if arguments.json is not None and dist.get_rank() == 0:
        arguments.json.write_text(json.dumps({"caption": caption, "results": results}, indent=1))


def run(
    arguments: argparse.Namespace,
    build: Callable[[argparse.Namespace, Console], Experiment],
    engine: str,
    what: str,
) -> None:
    """An example's whole run on this rank: ``build`` loads the model into the engine."""
    console = Console(quiet=not first_process())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with import_module(f".{engine}", __package__).joined():
        with console.status("loading the model"):
            experiment = build(arguments, console)
        show(arguments, experiment, engine, what)
        dist.barrier()
        dist.destroy_process_group()
