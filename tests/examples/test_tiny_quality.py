"""The evaluation of the tiny model: what it measures, and that it goes on where it was interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "evaluate_tiny_vlm.py"


def evaluate(folder, *arguments):
    command = [sys.executable, str(SCRIPT), "--out", str(folder / "points.jsonl")]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def setting(point):
    return point["title"], json.dumps(point["settings"], sort_keys=True)


def best_of(points, bound):
    """The point of least KL over pictures of every title within a bound."""
    within = [one for one in points if one["load"] <= bound]
    return {one["title"]: min((o for o in within if o["title"] == one["title"]), key=kl_of) for one in within}


def kl_of(point):
    return point["picture_kl"][0]


def points_in(path):
    return [json.loads(line)["found"] for line in path.read_text().splitlines()]


def test_points_are_measured_once_shown_and_chosen_from(tmp_path):
    small = ("--questions", "28", "--batch", "28", "--ranks", "4", "--bounds", "1.05", "1.2")
    shown = ("--grid", "bounded", *small, "--plot", str(tmp_path / "curve.png"))
    first = evaluate(tmp_path, *shown)
    assert first.returncode == 0, first.stderr
    points = points_in(tmp_path / "points.jsonl")
    assert len(points) == 10 and (tmp_path / "curve-mixed-4.png").stat().st_size > 1000
    assert (tmp_path / "curve-mixed-4-layers-1.05.png").stat().st_size > 1000
    for found in points:
        assert found["ranks"] == 4 and len(found["layers"]) == 4
        mean, low, high = found["kl"]
        assert 0 <= low <= mean <= high
        assert found["kept"] + found["rerouted"] + found["dropped"] == pytest.approx(1.0)
        # Whatever the policy: what it was told to keep to, it keeps to.
        target = found["settings"]["target_load"]
        assert 1.0 < found["load"] <= target and found["load_p95"] <= target
    assert "KL x 1000 to vanilla by target" in first.stdout and "load at equal KL" in first.stdout
    assert "load at most 1.05" in first.stdout and "rank-balanced" in first.stdout
    again = evaluate(tmp_path, *shown)
    assert "10 points, 10 of them in" in again.stdout and len(points_in(tmp_path / "points.jsonl")) == 10

    elsewhere = (*small, "--split", "test", "--batches", "multi-image")
    chosen = evaluate(tmp_path, *elsewhere, "--chosen", "points.jsonl", "--out", str(tmp_path / "test.jsonl"))
    assert chosen.returncode == 0, chosen.stderr
    found = points_in(tmp_path / "test.jsonl")
    # The best of five policies within each of two bounds, measured where they were not chosen.
    best = [one for bound in (1.05, 1.2) for one in best_of(points, bound).values()]
    assert sorted(map(setting, found)) == sorted({setting(one) for one in best})
    assert all(one["batches"] == "multi-image" and one["text_kl"] is None for one in found)

    again = evaluate(tmp_path, *small, "--chosen", "points.jsonl")
    assert again.returncode == 2 and "--chosen: found --split validation" in again.stderr
    tuning = ROOT / "examples" / "tiny_vlm" / "tuning-2-ranks.safetensors"
    refused = evaluate(tmp_path, *small, "--tuning", str(tuning))
    assert refused.returncode == 2 and "for 2 ranks, expected --ranks 2" in refused.stderr
    refused = evaluate(tmp_path, "--questions", "10", "--batch", "28")
    assert refused.returncode == 2 and "--questions: found 10, expected a batch (28)" in refused.stderr


def test_the_best_of_a_policy_keeps_to_the_bound():
    from tiny_quality.statistics import best_within

    def point(title, load, kl):
        return {"title": title, "load": load, "kl": [kl, kl, kl], "picture_kl": None}

    found = [point("a", 1.2, 0.1), point("a", 1.0, 0.3), point("a", 0.9, 0.4), point("b", 1.1, 0.0)]
    best = best_within(found, 1.05)
    assert list(best) == ["a"] and best["a"]["kl"][0] == 0.3


def test_the_load_at_equal_kl_is_the_least_before_kl_exceeds_it():
    from tiny_quality.statistics import best_baseline, least_load

    def point(title, load, kl, policy="macs", split="uniform"):
        settings = {"split": split, "target_load": load, "capacity_factor": None}
        return {
            "title": title,
            "policy": policy,
            "load": load,
            "kl": [kl, kl, kl],
            "settings": settings,
        }

    baselines = [
        point("a", 1.05, 0.3, "token-drop"),
        point("b", 1.0, 0.2, "rank-balanced"),
        point("c", 1.2, 0.1, "token-drop"),
        point("d", 1.0, 0.0, "token-drop", split="tuned"),
    ]
    ours = [point("macs", load, kl) for load, kl in ((1.0, 0.1), (0.8, 0.15), (0.6, 0.5), (0.4, 0.2))]
    found = baselines + ours
    assert best_baseline(found, 1.05) == baselines[1] and best_baseline(ours, 1.05) is None
    # 0.4 is luck: more load cost more.
    assert least_load(found, "macs", 0.2) == 0.8 and least_load(found, "macs", 0.05) is None
