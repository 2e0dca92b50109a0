"""The evaluation of the tiny model: what it measures, and that it goes on where it was interrupted."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from rich.console import Console
from tiny_quality.results import Run, plot, runs
from tiny_quality.run import asked_points, measure

ROOT = Path(__file__).parents[2]
TUNING = ROOT / "examples" / "tiny_vlm" / "tuning-2-ranks.safetensors"


def test_points_are_measured_once_and_drawn(tmp_path, capsys):
    run, path = Run("frontier/main", questions=28, batch=28, bounds=(1.05, 1.2)), tmp_path / "points.jsonl"
    points = measure(run, path, Console())
    plot(points, tmp_path / "curve.png")
    assert len(points) == 10 and (tmp_path / "curve.png").stat().st_size > 1000
    assert {one["title"] for one in points if one["baseline"]} == {
        "token-drop",
        "expanded-drop",
        "rank-balanced",
    }
    for found in points:
        assert found["ranks"] == 4 and len(found["vanilla_loads"]) == 4
        mean, low, high = found["kl"]
        assert 0 <= low <= mean <= high
        # Whatever the policy: every step of every layer keeps to its target.
        assert 1.0 < found["load"] <= found["largest_load"] <= found["target"] + 1e-4
    lines = path.read_text()
    assert measure(run, path, Console()) == points and path.read_text() == lines
    assert "10 points, 10 of them in" in capsys.readouterr().out


def test_a_tuning_for_the_runs_ranks_adds_tuned_points():
    tuned = asked_points(Run("frontier/main", ranks=2, tuning=(TUNING,)))
    assert len(tuned) > len(asked_points(Run("frontier/main", ranks=2)))
    with pytest.raises(ValueError, match="for 2 ranks, expected 4"):
        asked_points(Run("frontier/main", tuning=(TUNING,)))
    assert len({one.name for one in runs()}) == len(runs()) == 17


def test_every_setting_changes_what_it_names():
    from tiny_quality.points import SETTINGS, grids

    from macs import POLICIES, MACSConfig

    points = {one.title: one for one in grids([0.6])["settings"]}
    assert list(points) == list(SETTINGS)
    default = MACSConfig(target_load=0.6)
    for title, (policy, fields) in SETTINGS.items():
        point, row = points[title], POLICIES[points[title].policy]
        served = row.configured(point.config)
        for field, value in fields.items():
            assert (getattr(row, field) if hasattr(row, field) else getattr(served, field)) == value
        if not fields:
            assert (point.policy, point.config) == (policy, default)


def test_pages_have_the_tables_of_the_figures():
    from tiny_quality import pages

    made, used = pages.tables(), set()
    for path in pages.PAGES:
        text = path.read_text()
        assert pages.written(text, made) == text, f"{path}: python examples/results.py --pages"
        used |= {block[1] for block in pages.BLOCK.findall(text)}
    assert used == set(made)


def test_the_load_at_equal_kl_is_the_least_before_kl_exceeds_it():
    from tiny_quality.statistics import best_baseline, least_load

    def point(title, load, kl, baseline=False):
        return {"title": title, "baseline": baseline, "load": load, "kl": [kl, kl, kl]}

    baselines = [
        point("a", 1.05, 0.3, True),
        point("b", 1.0, 0.2, True),
        point("c", 1.2, 0.1, True),
        point("a, tuned", 1.0, 0.0),
    ]
    ours = [point("macs", load, kl) for load, kl in ((1.0, 0.1), (0.8, 0.15), (0.6, 0.5), (0.4, 0.2))]
    found = baselines + ours
    assert best_baseline(found, 1.05) == baselines[1] and best_baseline(ours, 1.05) is None
    # 0.4 is luck: more load cost more.
    assert least_load(found, "macs", 0.2) == 0.8 and least_load(found, "macs", 0.05) is None
