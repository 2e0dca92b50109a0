"""The trained tiny model, in Hugging Face and in Megatron, on real pictures and texts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from support.workers import free_port
from tiny_vlm import data, easy_vqa
from tiny_vlm import model as tiny
from tiny_vlm.evaluate import accuracy_by_task, rank_imbalance

ROOT = Path(__file__).parents[2]
JOBS = "support.tiny_jobs"


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


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("tasks", [data.TASKS, data.TEXT_TASKS], ids=["mixed", "text"])
def test_megatron_gives_hugging_faces_logits(pool, world, tasks, dispatcher):
    for stock, macs in pool.run(f"{JOBS}:logits_differ_by", world, tasks, dispatcher):
        assert stock < 1e-4 and macs == stock


@pytest.mark.parametrize("world", [1, 2])
def test_the_engine_answers_as_greedy_decoding_does(pool, world):
    for found in pool.run(f"{JOBS}:engine_answers", world, "vanilla", {}, 28):
        assert found["answers"] == found["greedy"]
        assert found["right"] > 0.5 * len(found["answers"])
        # One prompt step over all tokens; the steps of one token a sequence are left alone, unrecorded.
        assert found["steps"] == [28 * data.PROMPT_TOKENS]
        assert found["prefill"] == [28 * data.PROMPT_TOKENS, 1]


def test_macs_plans_the_prompt_and_leaves_decoding_alone(pool):
    for found in pool.run(f"{JOBS}:engine_answers", 2, "macs", {}, 28):
        assert found["planned"] == [2]
        assert found["right"] > 0.4 * len(found["answers"])


def test_real_pictures_one_process_plans_what_two_plan(pool):
    first, second = pool.run(f"{JOBS}:plan_of_real_pictures", 2, 1)
    (whole,) = pool.run(f"{JOBS}:plan_of_real_pictures", 1, 2)
    assert first[0] + second[0] == whole[0]
    assert first[1] + second[1] == whole[1] > 0


def main_job(*arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        str(ROOT / "examples" / "megatron_inference.py"),
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_the_main_job(tmp_path):
    done = main_job(
        "--samples",
        "56",
        "--batch",
        "28",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stderr
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


def test_the_main_job_on_a_users_picture(tmp_path):
    from PIL import Image

    sample = data.draw_samples(11, "test", ("count",), 1)[0]
    Image.fromarray(sample.pixels).save(tmp_path / "own.png")
    config = tmp_path / "macs.yaml"
    config.write_text("preset: fast\ncapacity_factor: 1.1\n")
    arguments = [
        "--picture",
        str(tmp_path / "own.png"),
        "--policy",
        "macs",
        "--config",
        str(config),
        "--profile",
        str(tmp_path / "profile.safetensors"),
        "--batch",
        "28",
    ]
    done = main_job(*arguments, "--question", "how many digits are there ?")
    assert done.returncode == 0, done.stderr
    answers = [
        line.split(":")[1].strip()
        for line in done.stdout.splitlines()
        if line.startswith(" ") and ":" in line
    ]
    assert (tmp_path / "profile.safetensors").exists()  # measured, for it was not there
    assert len(answers) == 2 and set(answers) <= {"1", "2", "3", "4"}, done.stdout
    assert "any other picture is a guess" in " ".join(done.stdout.split())
    refused = main_job(*arguments, "--question", "how many zebras are there ?")
    assert refused.returncode != 0 and "the model does not know ['zebras']" in refused.stderr + refused.stdout
