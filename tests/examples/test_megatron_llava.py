"""The LLaVA example, run as a user would."""

import json
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from support.workers import free_port
from tiny_vlm import data

ROOT = Path(__file__).parents[2]


def test_the_table(program, tmp_path):
    out = tmp_path / "out.json"
    launcher = *"-m torch.distributed.run --nproc-per-node 2 --master-port".split(), free_port()
    words = "--policy macs --samples 28 --repeats 1 --json".split()
    profile = tmp_path / "p.safetensors"
    program(
        *launcher, ROOT / "examples" / "megatron_llava.py", *words, out, "--profile", profile, folder=ROOT
    )
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["vanilla", "macs paper", "macs default"]
    vanilla, bounded = results["vanilla"], results["macs default"]
    assert set(vanilla["accuracy"]) == set(data.TASKS) and vanilla["agreement"] == 1.0
    assert vanilla["visual_ratio"] > 0.5  # pictures were seen: 64 of 73 tokens in five of seven prompts
    assert bounded["load_after"] < vanilla["load_after"] and results["macs paper"]["rerouted"] > 0
