"""The DeepSpeed examples, run as a user would."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from support.hf_models import save_llava
from support.workers import free_port
from tiny_vlm import data

ROOT = Path(__file__).parents[2]
SMALL = ("--samples", "28", "--batch", "14", "--repeats", "1")


@pytest.fixture
def run(program):
    def started(launcher, script, *arguments, status=0):
        words = {
            "torchrun": "-m torch.distributed.run --nproc-per-node 2 --master-port".split(),
            "deepspeed": [Path(sys.executable).parent / "deepspeed", *"--num_gpus 2 --master_port".split()],
        }[launcher]
        return program(
            *words, free_port(), ROOT / "examples" / script, *arguments, folder=ROOT, status=status
        )

    return started


@pytest.mark.parametrize(
    ("launcher", "script", "preset"),
    [
        ("torchrun", "deepspeed_qwen3_vl_moe.py", "default"),
        ("deepspeed", "deepspeed_moe_inference.py", "padded"),
    ],
)
def test_the_table(run, tmp_path, launcher, script, preset):
    out = tmp_path / "out.json"
    done = run(launcher, script, *SMALL, "--json", out, "--profile", tmp_path / "profile.safetensors")
    results = json.loads(out.read_text())["results"]
    shown = ["token-drop", "expanded-drop", "rank-balanced", "macs paper", f"macs {preset}"]
    if preset == "padded":  # there is no rank to pool where every expert computes as much as the fullest
        shown.remove("rank-balanced")
    assert list(results) == ["vanilla", *shown]
    for title, found in results.items():
        assert set(found["accuracy"]) == set(data.TASKS)
        assert found["kept_mass"] == pytest.approx(1.0) if title == "vanilla" else found["kept_mass"] < 1
        assert found["layer_ms"] > 0 and (found["kl"] > 0) == (title != "vanilla")
    assert results["vanilla"]["agreement"] == 1.0 and results["vanilla"]["time_ratio"] == 1.0
    assert results["token-drop"]["load_after"] < results["vanilla"]["load_after"]
    if script == "deepspeed_moe_inference.py":
        lines = done.stdout.split(" policy ", 1)[1].splitlines()[2 : 2 + len(results)]
        rows = [float(line.split()[-3]) for line in lines]
        assert rows[0] == 1.0 and all(share < 1.0 for share in rows[1:])


def test_a_users_checkpoint(run, program, tmp_path):
    save_llava(str(tmp_path / "model"))
    arguments = ["--model", tmp_path / "model", "--tokens", "3", "--profile", tmp_path / "p.safetensors"]
    out = tmp_path / "out.json"
    run("torchrun", "deepspeed_qwen3_vl_moe.py", *arguments, *SMALL, "--json", out)
    results = json.loads(out.read_text())["results"]
    assert results["vanilla"]["accuracy"] == {} and results["vanilla"]["agreement"] == 1.0
    assert results["vanilla"]["visual_ratio"] > 0.3
    assert results["macs default"]["load_after"] < results["vanilla"]["load_after"]
    script = ROOT / "examples" / "deepspeed_qwen3_vl_moe.py"
    missing = program(script, "--model", tmp_path / "nothing", status=2, RANK="0")
    assert "found no config.json" in missing.stderr


def test_a_users_picture(run, tmp_path):
    from PIL import Image

    sample = data.draw_samples(11, "test", ("count",), 1)[0]
    Image.fromarray(sample.pixels).save(tmp_path / "own.png")
    arguments = ["--picture", tmp_path / "own.png", "--question", "how many digits are there ?"]
    arguments += ["--policy", "macs", "--batch", "4", "--profile", tmp_path / "p.safetensors"]
    done = run("torchrun", "deepspeed_qwen3_vl_moe.py", *arguments)
    lines = [line for line in done.stdout.splitlines() if line.strip().startswith(("vanilla:", "macs"))]
    assert len(lines) == 3 and all(line.split(":")[1].strip() in {"1", "2", "3", "4"} for line in lines)
