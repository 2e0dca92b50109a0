"""A multimodal MoE answers questions about real pictures through Megatron-Core, with and without MACS.

    torchrun --nproc-per-node 2 examples/megatron_inference.py

Loads the tiny Qwen3-VL-MoE of this repository into Megatron's GPT model, its experts spread over
the processes (expert parallelism), and runs held-out pictures and texts, in mixed batches, through
Megatron's StaticInferenceEngine under every policy. On a CPU it uses gloo and a shim for Megatron's
CUDA calls; with GPUs it uses NCCL and no shim.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # the engine's own bar; ours says more

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.engine import Engine, LayerClock, WordTokenizer, slowest_rank
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.vocabulary import FILLER, build_tokenizer, encode

from macs import PRESETS, MACSConfig, Profile, Runtime
from megatron_macs import attach_modality, cpu_engine

PROFILE = Path("runs") / "tiny_vlm.profile.safetensors"
VANILLA = "vanilla"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--policy",
        action="append",
        choices=("token-drop", "expanded-drop", "rank-balanced", "macs"),
        help="a policy to run beside vanilla; may be given several times (default: token-drop, "
        "expanded-drop, and every preset of MACS)",
    )
    parser.add_argument("--config", type=Path, help="MACS settings, a .yaml or .json file")
    parser.add_argument("--capacity-factor", type=float, help="gamma, for every policy")
    parser.add_argument("--samples", type=int, default=896, help="questions to ask")
    parser.add_argument("--batch", type=int, default=64, help="questions asked at once, over all ranks")
    parser.add_argument("--repeats", type=int, default=9, help="prompts timed for each policy")
    parser.add_argument("--dispatcher", choices=("alltoall", "allgather"), default="alltoall")
    parser.add_argument("--checkpoint", type=Path, default=tiny.CHECKPOINT)
    parser.add_argument("--profile", type=Path, default=PROFILE, help="made if it is not there")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="ask about this picture instead")
    parser.add_argument("--question", help="what to ask about --picture")
    arguments = parser.parse_args()
    if (arguments.picture is None) != (arguments.question is None):
        parser.error("--picture and --question go together")
    return arguments


def settings_by_name(arguments: argparse.Namespace) -> dict[str, tuple[str, MACSConfig]]:
    """Column title -> policy and settings, vanilla first."""
    changes = {} if arguments.capacity_factor is None else {"capacity_factor": arguments.capacity_factor}
    base = MACSConfig() if arguments.config is None else MACSConfig.from_file(arguments.config)
    if arguments.config is not None:
        macs_settings = {"macs": base}
    else:
        macs_settings = {f"macs {name}": MACSConfig.preset(name) for name in PRESETS}
    chosen: dict[str, tuple[str, MACSConfig]] = {VANILLA: (VANILLA, base)}
    for policy in arguments.policy or ("token-drop", "expanded-drop", "macs"):
        entries = macs_settings if policy == "macs" else {policy: base}
        chosen |= {title: (policy, config.updated(**changes)) for title, config in entries.items()}
    return chosen


@dataclass
class Results:
    """What one policy did. Times are milliseconds a layer, on the slowest rank."""

    accuracy: dict[str, float]
    agreement: float
    imbalance_before: float
    imbalance_after: float
    straggler_before: float
    straggler_after: float
    rerouted: float
    dropped: float
    kept_mass: float
    visual_ratio: float
    layer_ms: float
    time_ratio: float


class Experiment:
    """The model in its engine on every rank, and what is measured on it."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.arguments = arguments
        self.console = console
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.group = parallel_state.get_expert_model_parallel_group()
        source = tiny.load_model(arguments.checkpoint)
        self.runtime = Runtime()
        model = build_megatron_model(
            source,
            self.runtime,
            expert_model_parallel_size=self.ranks,
            moe_token_dispatcher_type=arguments.dispatcher,
        )
        attach_modality(model, image_token_id=source.config.image_token_id)
        pictures = PictureEncoder(source)
        if torch.cuda.is_available():
            model, pictures = model.cuda(), pictures.cuda()
        self.share = max(1, arguments.batch // self.ranks)
        self.engine = Engine(model, pictures, self.share)
        self.clock = LayerClock(model)

    def mine(self, samples: list[data.Sample]) -> list[list[data.Sample]]:
        """This rank's part of every batch; all ranks have equally many, of equal size."""
        step = self.share * self.ranks
        whole = len(samples) // step * step
        return [samples[i + self.rank * self.share :][: self.share] for i in range(0, whole, step)]

    def profile(self) -> Profile:
        """The profile on disk, or, where there is none, one measured on validation samples."""
        path = self.arguments.profile
        there = [path.exists()]
        dist.broadcast_object_list(there, src=0)
        if not there[0]:
            self.console.print(f"no profile at {path}: measuring one")
            samples = data.draw_samples(1, "validation", data.TASKS, 4 * self.share * self.ranks)
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

    def layer_times(
        self,
        batch: list[data.Sample],
        chosen: dict[str, tuple[str, MACSConfig]],
        profile: Profile,
        progress: Progress,
    ) -> dict[str, float]:
        """Median milliseconds of a MoE layer in prefill, on the slowest rank, policies in turn.

        Vanilla is Megatron's own layer: MACS is off, not merely idle. Nothing is recorded.
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
                slowest = slowest_rank(statistics.mean(calls))
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
        chosen = settings_by_name(self.arguments)
        profile = self.profile()
        batches = self.mine(data.draw_samples(0, "test", data.TASKS, self.arguments.samples))
        if not batches:
            raise SystemExit("--samples: fewer than one batch; raise it or lower --batch")
        asked = self.gathered([sample for batch in batches for sample in batch])
        answers, reports = {}, {}
        with Progress(console=self.console) as progress:
            for title, (policy, config) in chosen.items():
                self.runtime.use(policy, config, profile)
                answers[title] = self.gathered(self.answers(batches, progress, title))
                reports[title] = [report.prefill for report in self.runtime.reports(self.group)]
            times = self.layer_times(batches[0], chosen, profile, progress)
        return {
            title: summarize(
                asked, answers[title], answers[VANILLA], reports[title], times[title], times[VANILLA]
            )
            for title in chosen
        }

    def ask(self, picture: Path, question: str) -> dict[str, str]:
        """The answer to a user's question about a user's picture, by policy."""
        prompt = question_tokens(question)
        sample = data.Sample("own", prompt, [], tiny.open_picture(picture))
        profile = self.profile()
        answers = {}
        for title, (policy, config) in settings_by_name(self.arguments).items():
            self.runtime.use(policy, config, profile)
            answer = self.engine.generate([sample])[0]
            answers[title] = WordTokenizer().detokenize(answer).removesuffix(" <end>")
        return answers


def question_tokens(question: str) -> list[int]:
    """A typed question as a prompt about a picture; words the model never learned are an error."""
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(question, add_special_tokens=False)
    if tokenizer.unk_token_id in ids:
        unknown = [
            word
            for word in question.split()
            if tokenizer.encode(word, add_special_tokens=False)[0] == tokenizer.unk_token_id
        ]
        known = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 1]
        raise SystemExit(
            f"--question: the model does not know {unknown}; it knows: {' '.join(sorted(known))}"
        )
    room = data.QUESTION_TOKENS - len(ids)
    if room < 0:
        raise SystemExit(f"--question: found {len(ids)} tokens, at most {data.QUESTION_TOKENS} fit")
    return encode(FILLER) * room + data.PICTURE_PREFIX + ids


def summarize(
    asked: list[data.Sample],
    answers: list[list[int]],
    vanilla: list[list[int]],
    reports: list,
    milliseconds: float,
    vanilla_milliseconds: float,
) -> Results:
    """The figures of one policy: means over samples, or over layers and batches of prompts."""
    accuracy = {}
    for task in data.TASKS:
        hits = [answer == s.answer for s, answer in zip(asked, answers, strict=True) if s.task == task]
        accuracy[task] = statistics.mean(hits) if hits else float("nan")

    def mean(values: list) -> float:
        return float(
            torch.cat([torch.as_tensor(value, dtype=torch.float64).flatten() for value in values]).mean()
        )

    shares = [report.shares() for report in reports]
    return Results(
        accuracy=accuracy,
        agreement=statistics.mean(own == other for own, other in zip(answers, vanilla, strict=True)),
        imbalance_before=mean([report.imbalance("before") for report in reports]),
        imbalance_after=mean([report.imbalance("after") for report in reports]),
        straggler_before=mean([report.straggler("before") for report in reports]),
        straggler_after=mean([report.straggler("after") for report in reports]),
        rerouted=mean([share["rerouted"] for share in shares]),
        dropped=mean([share["dropped"] for share in shares]),
        kept_mass=mean([share["kept_mass"] for share in shares]),
        visual_ratio=mean([report.visual_ratio for report in reports]),
        layer_ms=milliseconds,
        time_ratio=milliseconds / vanilla_milliseconds,
    )


def results_table(results: dict[str, Results], caption: str) -> Table:
    """One column a policy, one row a figure."""
    table = Table(caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    for title in results:
        table.add_column(title.replace("-", " "), justify="right")

    def row(name: str, cells: list[str], end: bool = False) -> None:
        table.add_row(name, *cells, end_section=end)

    values = list(results.values())
    for task in data.TASKS:
        row(f"{task}, accuracy", [f"{one.accuracy[task]:.3f}" for one in values])
    for name, tasks in (("pictures", data.PICTURE_TASKS), ("texts", data.TEXT_TASKS)):
        means = [statistics.mean(one.accuracy[task] for task in tasks) for one in values]
        row(f"mean of {name}", [f"{one:.3f}" for one in means])
    row("same answer as vanilla", [f"{one.agreement:.3f}" for one in values], end=True)
    row("busiest expert, before", [f"{one.imbalance_before:.2f}" for one in values])
    row("busiest expert, after", [f"{one.imbalance_after:.2f}" for one in values])
    row("busiest rank, before", [f"{one.straggler_before:.3f}" for one in values])
    row("busiest rank, after", [f"{one.straggler_after:.3f}" for one in values])
    row("rerouted", [f"{one.rerouted:.1%}" for one in values])
    row("dropped", [f"{one.dropped:.1%}" for one in values])
    row("kept mass", [f"{one.kept_mass:.3f}" for one in values])
    row("R_v", [f"{one.visual_ratio:.3f}" for one in values], end=True)
    row("MoE layer, ms", [f"{one.layer_ms:.1f}" for one in values])
    row("time / vanilla", [f"{one.time_ratio:.2f}" for one in values])
    return table


def start() -> None:
    """Join the process group and Megatron's parallel groups: every rank holds a part of the experts."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())


def main() -> None:
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        sys.exit("run me under torchrun: torchrun --nproc-per-node 2 examples/megatron_inference.py")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = Console(quiet=int(os.environ["RANK"]) != 0)
    with nullcontext() if torch.cuda.is_available() else cpu_engine():
        start()
        with console.status("loading the model"):
            experiment = Experiment(arguments, console)
        if arguments.picture is not None:
            for title, answer in experiment.ask(arguments.picture, arguments.question).items():
                console.print(f"{title:>16}: {answer}")
        else:
            results = experiment.run()
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            ranks, batch = experiment.ranks, experiment.share * experiment.ranks
            asked = arguments.samples // batch * batch
            caption = (
                f"Megatron-Core {megatron.core.__version__}, {arguments.dispatcher}, {ranks} expert-parallel "
                f"ranks, {device}; {asked}\nheld-out questions in batches of {batch}. "
                "Busiest expert: load over the mean\nexpert's; busiest rank: rows over vanilla's mean rank; "
                "before and after\nplanning. R_v: effective visual ratio. Times: medians, slowest rank, "
                "vanilla is\nstock. An equal capacity factor is not an equal load: compare policies by\n"
                "their busiest rank."
            )
            console.print(results_table(results, caption))
            if arguments.json is not None and dist.get_rank() == 0:
                found = {title: asdict(one) for title, one in results.items()}
                arguments.json.write_text(json.dumps({"caption": caption, "results": found}, indent=1))
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
