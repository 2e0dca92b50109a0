"""The trained tiny model, in Hugging Face and in Megatron, on real pictures and texts."""

import json
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.utils import get_attention_mask
from support.cases import busy
from support.megatron_ranks import Layout, megatron_on, on_megatron
from support.ranks import on_ranks
from tiny_vlm import data, easy_vqa, plain
from tiny_vlm import model as tiny
from tiny_vlm.evaluate import accuracy_by_task, rank_imbalance
from tiny_vlm.megatron import PictureEncoder, build_megatron_model
from tiny_vlm.megatron_engine import Engine

from macs import Runtime
from macs.adapters import current_modality
from megatron_macs import attach_modality

ROOT = Path(__file__).parents[2]


MODELS = {
    path.name: path for path in (tiny.CHECKPOINT, *sorted((tiny.CHECKPOINT.parent / "others").iterdir()))
}


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_small_and_its_logs_figures_are_its_own(name):
    folder = MODELS[name]
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    settings = [line["settings"] for line in log if "settings" in line][-1]
    logged = log[-1].get("test") or {"accuracy": log[-1]["test_accuracy"], "imbalance": log[-1]["imbalance"]}
    model = tiny.load_model(folder)
    tasks = easy_vqa.TASKS if settings.get("recipe") == "easy-vqa" else data.TASKS
    samples = data.draw_samples(settings["seed"], "test", tasks, 70 * len(tasks))
    found = accuracy_by_task(model, samples)
    for task in tasks:
        assert found[task] == pytest.approx(logged["accuracy"][task], abs=0.15), task
    assert rank_imbalance(model, samples[:140], 4) == pytest.approx(logged["imbalance"], abs=0.2)
    for task in set(logged["accuracy"]) - set(tasks):
        hard = accuracy_by_task(model, data.draw_samples(settings["seed"], "test", (task,), 50))
        assert hard[task] == pytest.approx(logged["accuracy"][task], abs=0.2), task


def built(source, runtime, **changes):
    """The model in Megatron, under its parallel state."""
    size = parallel_state.get_expert_model_parallel_world_size()
    model = build_megatron_model(source, runtime, expert_model_parallel_size=size, **changes)
    if runtime is not None:
        attach_modality(model, image_token_id=source.config.image_token_id)
    return model


def logits_of(model, source, samples):
    ids = torch.tensor([sample.prompt for sample in samples])
    with model.pictures(PictureEncoder(source)(samples)):
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), get_attention_mask(ids.shape[1]))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("tasks", [data.TASKS, data.TEXT_TASKS], ids=["mixed", "text"])
@on_megatron()
def test_megatron_gives_hugging_faces_logits(world, tasks, dispatcher):
    source = tiny.load_model()
    samples = data.draw_samples(5, "test", tasks, 14)[dist.get_rank() :: world]
    expected = source(**tiny.sample_inputs(samples)).logits
    stock, roomy = (
        logits_of(built(source, runtime, moe_token_dispatcher_type=dispatcher), source, samples)
        for runtime in (None, Runtime(busy(capacity_factor=1e6)))
    )
    torch.testing.assert_close(stock, expected, rtol=0, atol=1e-4)
    assert torch.equal(stock, roomy)


@pytest.mark.parametrize(("world", "policy"), [(1, "vanilla"), (2, "vanilla"), (2, "macs")])
@on_megatron()
def test_the_engine_plans_the_prompt_and_answers_as_greedy_decoding_does(world, policy):
    source = tiny.load_model()
    runtime = Runtime(busy(), policy=policy)
    model = built(source, runtime)
    samples = data.draw_samples(5, "test", data.TASKS, 28)[dist.get_rank() :: world]
    answers = Engine(model, PictureEncoder(source), len(samples)).generate(samples)
    right = sum(answer == sample.answer for answer, sample in zip(answers, samples, strict=True))
    assert right > (0.5 if policy == "vanilla" else 0.4) * len(answers)
    if policy == "vanilla":
        assert answers == plain.Engine(tiny.load_model()).generate(samples)
    # One prompt step over all tokens; the steps of one token a sequence are neither planned nor recorded.
    report = runtime.reports(dist.group.WORLD)[0]
    assert report.tokens.tolist() == [28 * data.PROMPT_TOKENS] == report.prefill.tokens.tolist()
    assert report.planned.tolist() == [world if policy == "macs" else 0]


@on_ranks(2)
def test_real_pictures_one_process_plans_what_two_plan():
    source, rank = tiny.load_model(), dist.get_rank()
    samples = data.draw_samples(5, "test", data.TASKS, 12)
    own, plans = slice(6 * rank, 6 * rank + 6), []
    for layout, virtual_ranks, asked in ((Layout(2, ep=2), 1, samples[own]), (Layout(2), 2, samples)):
        with megatron_on(layout):
            runtime = Runtime(busy(min_tokens=0), virtual_ranks=virtual_ranks)
            events = []
            model = built(source, runtime)
            runtime.layers[0].on_plan(events.append)
            logits_of(model, source, asked)
            assert current_modality() is None
            experts = events[0].plan.experts
            plans.append(experts.view(len(experts) // len(asked), len(asked), -1).transpose(0, 1))
            assert events[0].plan.rerouted.any()
    assert torch.equal(plans[0], plans[1][own])


@pytest.fixture
def main_job(torchrun):
    script = ROOT / "examples" / "megatron_inference.py"
    return lambda *words, **options: torchrun(script, *words, folder=ROOT, COLUMNS="80", **options)


def test_the_main_job(main_job, tmp_path):
    done = main_job(*"--samples 56 --batch 28 --repeats 1 --json".split(), tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    drops = ["token-drop", "expanded-drop", "rank-balanced"]
    assert list(results) == ["vanilla", *drops, "macs paper", "macs default", "macs tuned"]
    for title, found in results.items():
        assert title.split()[0] in done.stdout
        assert set(found["accuracy"]) == set(data.TASKS)
        assert found["kept_mass"] == pytest.approx(1.0) if title == "vanilla" else found["kept_mass"] < 1
        assert found["layer_ms"] > 0
    assert results["vanilla"]["agreement"] == 1.0 and results["vanilla"]["time_ratio"] == 1.0
    assert results["token-drop"]["load_after"] < results["vanilla"]["load_after"]
    assert results["macs tuned"]["load_after"] < 0.95
    shown = done.stdout.split("policy", 1)[1]
    assert "KL x 1000" in shown and "--moe-macs-max-kl" in shown and "Next:" in shown
    assert len(shown.splitlines()) <= 30 and max(map(len, shown.splitlines())) <= 80
    kl = {title: found["kl"] for title, found in results.items()}
    assert kl["vanilla"] == 0 and 0 < kl["macs default"] < 0.1 and 0 < kl["token-drop"] < 0.1


def test_the_main_job_on_a_users_picture(main_job, program, tmp_path):
    from PIL import Image

    sample = data.draw_samples(11, "test", ("count",), 1)[0]
    Image.fromarray(sample.pixels).save(tmp_path / "own.png")
    config = tmp_path / "macs.yaml"
    config.write_text("preset: fast\ncapacity_factor: 1.1\n")
    arguments = ["--picture", tmp_path / "own.png", "--policy", "macs", "--config", config]
    arguments += ["--profile", tmp_path / "profile.safetensors", "--batch", "4"]
    done = main_job(*arguments, "--question", "how many digits are there ?")
    answers = [
        line.split(":")[1].strip()
        for line in done.stdout.splitlines()
        if line.startswith(" ") and ":" in line
    ]
    assert (tmp_path / "profile.safetensors").exists()  # measured, for it was not there
    assert len(answers) == 2 and set(answers) <= {"1", "2", "3", "4"}, done.stdout
    assert "any other picture is a guess" in " ".join(done.stdout.split())
    script, question = ROOT / "examples" / "megatron_inference.py", "how many zebras are there ?"
    refused = program(script, *arguments, "--question", question, status=2, RANK="0")
    assert "the model does not know ['zebras']" in refused.stderr
