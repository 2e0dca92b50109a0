"""The LLaVA example, run as a user would."""

import json
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from tiny_vlm import data

ROOT = Path(__file__).parents[2]


def test_the_table(torchrun, tmp_path):
    out = tmp_path / "out.json"
    words = "--policy macs --samples 28 --batch 4 --repeats 1 --json".split()
    script, profile = ROOT / "examples" / "megatron_llava.py", tmp_path / "p.safetensors"
    torchrun(script, *words, out, "--profile", profile, folder=ROOT)
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["vanilla", "macs paper", "macs default"]
    vanilla, bounded = results["vanilla"], results["macs default"]
    assert set(vanilla["accuracy"]) == set(data.TASKS) and vanilla["agreement"] == 1.0
    assert vanilla["visual_ratio"] > 0.5  # pictures were seen: 64 of 73 tokens in five of seven prompts
    assert bounded["load_after"] < vanilla["load_after"] and results["macs paper"]["rerouted"] > 0
