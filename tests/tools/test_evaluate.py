"""The evaluation tool: what it measures, and that it goes on where it was interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def evaluate(folder, *arguments):
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--out", str(folder / "points.jsonl")]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_points_are_measured_once_and_shown(tmp_path):
    small = ("--questions", "28", "--batch", "28", "--ranks", "4", "--plot", str(tmp_path / "curve.png"))
    first = evaluate(tmp_path, "--grid", "presets", *small)
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and (tmp_path / "curve-mixed-4.png").stat().st_size > 1000
    for found in (line["found"] for line in lines):
        assert found["ranks"] == 4 and len(found["layers"]) == 4
        mean, low, high = found["kl"]
        assert 0 <= low <= mean <= high
        assert found["kept"] + found["rerouted"] + found["dropped"] == pytest.approx(1.0)
    pooled = sorted(
        (line["found"]["settings"]["capacity_factor"], line["found"]["straggler"])
        for line in lines
        if line["found"]["title"] == "macs pooled"
    )
    # Capacity pooled per rank bounds what a rank computes, in rows.
    assert all(load <= gamma + 0.02 for gamma, load in pooled) and pooled[0][1] < pooled[-1][1]
    assert "busiest rank at most 1.05 times the mean" in first.stdout and "macs pooled" in first.stdout
    again = evaluate(tmp_path, "--grid", "presets", *small)
    assert "20 points, 20 of them in" in again.stdout
    assert len((tmp_path / "points.jsonl").read_text().splitlines()) == 20
    refused = evaluate(tmp_path, "--questions", "10", "--batch", "28")
    assert refused.returncode == 2 and "--questions: found 10, expected a batch (28)" in refused.stderr


def test_the_best_of_a_policy_keeps_to_the_bound():
    from evaluate import best_within

    def point(title, straggler, kl):
        return {"title": title, "straggler": straggler, "kl": [kl, kl, kl]}

    found = [point("a", 1.2, 0.1), point("a", 1.0, 0.3), point("a", 0.9, 0.4), point("b", 1.1, 0.0)]
    best = best_within(found, 1.05)
    assert list(best) == ["a"] and best["a"]["kl"][0] == 0.3
