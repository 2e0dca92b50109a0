"""Measure which expert of a model serves which modality, and keep it as a profile.

    python tools/calibrate.py                                     # the tiny model, pictures of its own
    python tools/calibrate.py --engine megatron --data pictures/
    torchrun --nproc-per-node 8 tools/calibrate.py --model DIR --data requests.jsonl --out model.safetensors

``--data`` is a folder of pictures and ``.txt`` files (``cat.txt`` beside ``cat.png`` is the question
about it), or a file of JSON lines ``{"text": ..., "image": path}``, either of which may be missing.
``--model`` is a checkpoint directory in Hugging Face format, with its processor, run by DeepSpeed's
AutoEP; for a model of Megatron's own, run its own script under
``python -m megatron_macs.launch SCRIPT ... --moe-macs --moe-macs-calibrate FILE``.

Shows every layer's experts by modality bias, how stable that is (profiles of two disjoint halves of
the requests against each other), and how many requests are enough. An existing profile is checked
against the model with ``--check``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tiny_vlm import data
from tiny_vlm import model as tiny
from tiny_vlm.vocabulary import BEGIN, FILLER, build_tokenizer, encode

from macs import MACSConfig, Profile, Runtime
from macs.files import output_file

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DEFAULT_QUESTION = "Describe this picture."
AGREEMENT = 0.95
"""Two halves that class this share of the experts alike are a profile."""


@dataclass(frozen=True)
class Request:
    """A text, perhaps about a picture."""

    text: str
    picture: Path | None = None


def read_requests(path: Path) -> list[Request]:
    """The requests of a folder or of a file of JSON lines; a bad one is a ``ValueError`` with its place."""
    if path.is_dir():
        pictures = sorted(one for one in path.rglob("*") if one.suffix.lower() in PICTURES)
        questions = {one.with_suffix("") for one in pictures}
        texts = [one for one in sorted(path.rglob("*.txt")) if one.with_suffix("") not in questions]
        found = [Request(_question_beside(one), one) for one in pictures]
        found += [Request(one.read_text()) for one in texts]
    else:
        found = [
            _request(line, f"{path}, line {number}", path.parent)
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if line.strip()
        ]
    if not found:
        raise ValueError(f"--data: found no pictures and no texts in {path}")
    return found


def _question_beside(picture: Path) -> str:
    beside = picture.with_suffix(".txt")
    return beside.read_text() if beside.is_file() else DEFAULT_QUESTION


def _request(line: str, place: str, folder: Path) -> Request:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(values, dict) or not values or not set(values) <= {"text", "image"}:
        raise ValueError(
            f"{place}: found {line.strip()[:80]}, expected fields text and image, or one of them"
        )
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{place}: field {name}: found {value!r}, expected a string")
    picture = None if "image" not in values else folder / values["image"]
    if picture is not None and not picture.is_file():
        raise ValueError(f"{place}: field image: found no file {picture}")
    return Request(values.get("text", DEFAULT_QUESTION), picture)


def tiny_sample(request: Request) -> data.Sample:
    """A request as the tiny model's prompt; words it does not know are unknown to it."""
    pixels = None if request.picture is None else opened(request.picture, tiny.open_picture)
    prefix = encode(BEGIN) if pixels is None else data.PICTURE_PREFIX
    room = data.PROMPT_TOKENS - len(prefix)
    words = list(build_tokenizer()(request.text.lower())["input_ids"])[:room]
    return data.Sample("own", prefix + encode(FILLER) * (room - len(words)) + words, [], pixels)


@contextlib.contextmanager
def megatron(arguments: argparse.Namespace) -> Iterator[tuple[Runtime, Any]]:
    """The tiny model in Megatron's static engine."""
    from megatron.core import parallel_state
    from tiny_vlm.megatron import PictureEncoder, build_megatron_model
    from tiny_vlm.megatron_engine import Engine

    from megatron_macs import attach_modality, cpu_engine

    source, runtime = tiny.load_model(arguments.checkpoint), Runtime()
    with contextlib.nullcontext() if torch.cuda.is_available() else cpu_engine(), processes():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
        changes = {"expert_model_parallel_size": dist.get_world_size()}
        model = build_megatron_model(source, runtime, **changes)
        if torch.cuda.is_available():
            model, source = model.cuda(), source.cuda()
        attach_modality(model, image_token_id=source.config.image_token_id)
        yield runtime, Engine(model, PictureEncoder(source), arguments.batch)
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def deepspeed(arguments: argparse.Namespace) -> Iterator[tuple[Runtime, Any]]:
    """The tiny model, or a checkpoint of one's own, under DeepSpeed's AutoEP."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from tiny_vlm.deepspeed import Engine

    import deepspeed_macs

    with processes():
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "expert_parallel": {"enabled": True, "autoep_size": dist.get_world_size()},
            "macs": {},
        }
        if arguments.model is None:
            model = tiny.load_model(arguments.checkpoint)
        else:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype)
        engine = deepspeed_macs.initialize(model=model, config=config)[0]
        engine.eval()
        if arguments.model is None:
            answers: Any = Engine(engine.module)
        else:
            from deepspeed_qwen3_vl_moe import ProcessorEngine

            processor = AutoProcessor.from_pretrained(arguments.model)
            answers = ProcessorEngine(engine.module, processor, 1)
        yield engine.macs, answers


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """The process group that a launcher started, or one of a single process."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            store = dist.FileStore(f"{folder}/store", 1)
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def own_batches(arguments: argparse.Namespace) -> list[list[Any]]:
    """What the engine is asked, in batches; every rank has its share, and equally many batches."""
    if arguments.data is None:
        asked: list[Any] = data.draw_samples(arguments.seed, "train", data.TASKS, arguments.samples)
    else:
        requests = read_requests(arguments.data)
        # In their order, pictures of one kind would make up one half, or all that is taken.
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(arguments.seed))
        requests = [requests[i] for i in order[: arguments.samples].tolist()]
        asked = [tiny_sample(one) for one in requests] if arguments.model is None else requests
    if arguments.model is not None:
        asked = [processor_request(one) for one in asked]
    whole = arguments.batch * dist.get_world_size()
    count = len(asked) // whole
    if count < 2:
        raise ValueError(
            f"--data: found {len(asked)} requests, expected {2 * whole} or more: two batches "
            f"(--batch {arguments.batch}) for each of {dist.get_world_size()} processes"
        )
    rank = dist.get_rank()
    batches = [asked[number * whole : (number + 1) * whole] for number in range(count)]
    return [batch[rank * arguments.batch : (rank + 1) * arguments.batch] for batch in batches]


def processor_request(request: Request) -> Any:
    """A request as ``ProcessorEngine`` takes it."""
    from deepspeed_qwen3_vl_moe import Request as Asked

    if request.picture is None:
        return Asked(request.text, None)
    return Asked(request.text, opened(request.picture, lambda path: Image.open(path).convert("RGB")))


def opened(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a reader makes of a picture; an error names the file."""
    try:
        return reader(path)
    except OSError as error:
        raise ValueError(f"--data: {path}: not a picture: {error}") from error


def counted(runtime: Runtime, engine: Any, batches: Sequence[list[Any]], console: Console) -> list[Profile]:
    """A profile of every batch, over all processes."""
    found = []
    for batch in track(batches, "calibrating", console=console, transient=True):
        with runtime.calibration():
            engine.generate(batch, tokens=1)
        found.append(runtime.measured_profile(dist.group.WORLD))
    return found


@dataclass(frozen=True)
class Stability:
    """Two profiles of so many requests each, on disjoint ones: the share of experts that both class
    alike, and the mean difference of their visual preference q, by layer [L]."""

    requests: int
    alike: torch.Tensor
    difference: torch.Tensor


def stability(profiles: Sequence[Profile], requests: int, config: MACSConfig) -> list[Stability]:
    """Halves of even and odd batches against each other, of 1, 2, 4, ... batches and of all of them.

    ``requests``: in a batch, over all processes.
    """
    even, odd = profiles[::2], profiles[1::2]
    most = min(len(even), len(odd))
    sizes = [2**n for n in range(most.bit_length()) if 2**n < most]
    found = []
    for size in [*sizes, most]:
        one, other = Profile.merged(even[:size]), Profile.merged(odd[:size])
        alike = (one.bias(config) == other.bias(config)).double().mean(1)
        apart = (one.visual_preference() - other.visual_preference()).abs().mean(1)
        found.append(Stability(size * requests, alike, apart))
    return found


def enough(found: Sequence[Stability]) -> int | None:
    """Requests from which on two profiles class ``AGREEMENT`` of the experts alike; none if never."""
    answer = None
    for one in reversed(found):
        if float(one.alike.mean()) < AGREEMENT:
            break
        answer = one.requests
    return answer


def bias_table(profile: Profile, config: MACSConfig, halves: Stability) -> Table:
    """Every layer's experts by modality bias."""
    table = Table(
        title="experts by modality bias",
        caption="q: 1 serves visual tokens alone, 0 text alone; alike, apart: experts that two halves of "
        "the requests class alike, and their mean difference of q",
    )
    for name in ("layer", "visual", "both", "text", "most visual", "least visual", "alike", "apart"):
        table.add_column(name, justify="right", no_wrap=True)
    bias, preference = profile.bias(config), profile.visual_preference()
    for layer in range(profile.num_layers):
        counts = [int((bias[layer] == sign).sum()) for sign in (1.0, 0.0, -1.0)]
        most, least = int(preference[layer].argmax()), int(preference[layer].argmin())
        table.add_row(
            str(layer),
            *(str(count) for count in counts),
            f"{most}: {preference[layer, most]:.2f}",
            f"{least}: {preference[layer, least]:.2f}",
            f"{halves.alike[layer]:.0%}",
            f"{halves.difference[layer]:.3f}",
        )
    return table


def plot(profile: Profile, config: MACSConfig, path: Path) -> None:
    """Visual preference q of every layer's experts, in order, with the thresholds of a bias."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    preference = profile.visual_preference().sort(1).values
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for layer in range(profile.num_layers):
        axes.plot(range(profile.num_experts), preference[layer].tolist(), marker=".", label=f"layer {layer}")
    for bound in (0.5 - config.bias_threshold, 0.5 + config.bias_threshold):
        axes.axhline(bound, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="experts of the layer, in order", ylabel="visual preference q", ylim=(0, 1))
    if profile.num_layers <= 12:
        axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check(profile: Profile, runtime: Runtime) -> None:
    """Raise a ``ValueError`` if a profile is of another model."""
    for layer in runtime.layers:
        profile.row_of(layer.seam.router_weight(), layer.top_k)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("deepspeed", "megatron"), default="deepspeed")
    parser.add_argument("--model", type=Path, help="a checkpoint directory in Hugging Face format")
    parser.add_argument("--dtype", default="auto", help="of --model: auto, float32, bfloat16, ...")
    parser.add_argument("--checkpoint", type=Path, default=tiny.CHECKPOINT, help="of the tiny model")
    parser.add_argument("--data", type=Path, help="a folder, or a file of JSON lines")
    parser.add_argument("--samples", type=int, default=448, help="requests at most")
    parser.add_argument("--batch", type=int, default=14, help="requests asked at once, on each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.1, help="[tau] of a modality bias")
    parser.add_argument("--out", type=output_file, default=Path("runs") / "model.safetensors")
    parser.add_argument("--plot", type=output_file, help="a picture of every expert's visual preference")
    parser.add_argument("--check", type=Path, help="a profile to hold against the model instead")
    arguments = parser.parse_args(given)
    if arguments.model is not None and arguments.engine == "megatron":
        parser.error(
            "--model: with Megatron run a script of your own under megatron_macs.launch, with "
            "--moe-macs --moe-macs-calibrate FILE"
        )
    if arguments.model is not None and arguments.data is None:
        parser.error("--model: expected --data with it, a sample of your own requests")
    if arguments.batch < 1:
        parser.error(f"--batch: found {arguments.batch}, expected 1 or more")
    for name in ("model", "checkpoint", "data", "check"):
        path = getattr(arguments, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}: found nothing at {path}")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Measure, show, write."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    arguments = parse_arguments(given)
    console = Console(quiet=int(os.environ.get("RANK", 0)) != 0)
    engines = {"deepspeed": deepspeed, "megatron": megatron}
    try:
        config = MACSConfig(bias_threshold=arguments.threshold)
        with engines[arguments.engine](arguments) as (runtime, engine), torch.inference_mode():
            if arguments.check is not None:
                check(Profile.load(arguments.check), runtime)
                console.print(f"{arguments.check} was measured on this model")
                return
            batches = own_batches(arguments)
            profiles = counted(runtime, engine, batches, console)
            size = arguments.batch * dist.get_world_size()
            first = dist.get_rank() == 0
    except ValueError as error:
        sys.exit(f"calibrate: {error}")
    if not first:
        return
    profile = Profile.merged(profiles)
    found = stability(profiles, size, config)
    console.print(bias_table(profile, config, found[-1]))
    for one in found:
        console.print(
            f"{one.requests:6d} requests a half: {float(one.alike.mean()):.0%} of the experts alike, "
            f"q differs by {float(one.difference.mean()):.3f}"
        )
    least = enough(found)
    console.print(
        f"enough: {least} requests ({AGREEMENT:.0%} alike)"
        if least is not None
        else f"not enough yet: two halves class fewer than {AGREEMENT:.0%} of the experts alike; give more"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    profile.save(arguments.out)
    console.print(f"profile of {len(batches) * size} requests in {arguments.out}")
    if arguments.plot is not None:
        plot(profile, config, arguments.plot)


if __name__ == "__main__":
    main()
