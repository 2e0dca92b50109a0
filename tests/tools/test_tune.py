"""``macs tune``: the search for a split, and a run of it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from macs import MACSConfig, Profile, Runtime
from macs.records.tuning import target_of
from macs_tools.tune import search

NATURAL = np.array([1.2, 1.4, 1.3])
COST = np.array([5.0, 0.1, 0.5])
"""Damage of a layer for each unit of load below its natural one, squared."""


def measured(bounds, noise=0.0):
    loads = np.minimum(np.array(bounds), NATURAL)
    each = (COST * (NATURAL - loads) ** 2).sum()
    damage = each * np.linspace(0.5, 1.5, 64) * (1 + noise)
    return search.Measured(loads, damage, damage < 1)


def test_damages_of_single_layers_make_a_split_that_spares_the_dear_one():
    curves = search.singles(measured, NATURAL)
    assert all((np.diff(loads) > 0).all() and (np.diff(damage) <= 0).all() for loads, damage in curves)
    bounds = search.split_by(curves, 0.8)
    assert np.mean(bounds) == pytest.approx(0.8, abs=1e-6)
    assert bounds[0] > bounds[2] > bounds[1]
    assert measured(bounds).damage.mean() < 0.5 * measured([0.8] * 3).damage.mean()


def test_a_target_that_nothing_reaches_is_one_bound():
    curves = search.singles(measured, NATURAL)
    assert search.split_by(curves, 0.2) == [0.2] * 3


def test_moves_make_it_better_and_never_dearer():
    start = [0.8, 0.8, 0.8]
    best, held = search.refined(measured, start, 100.0, 60)
    assert held.loads.mean() <= 0.8 + 1e-3
    assert held.damage.mean() < 0.5 * measured(start).damage.mean()
    assert best[0] > best[2] > best[1]
    same, _ = search.refined(measured, start, 100.0, 0)
    assert same == start


def tune(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "macs", "tune", "--out", str(folder / "tuned.safetensors"), *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_tuning_is_measured_kept_and_served(tmp_path):
    flags = ("--requests", "112", "--batch", "28", "--targets", "0.6", "0.9", "--tries", "2", "--ranks", "2")
    done = tune(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    found = Profile.load(tmp_path / "tuned.safetensors").tuning
    assert found.targets.tolist() == [0.9, 0.6] and found.bounds.shape == (2, 4)
    assert (found.ranks, found.requests, found.policy) == (2, 56, "macs")
    assert bool((found.damage[:, 1] <= found.damage[:, 0]).all())
    assert bool((found.damage[:, 0] <= found.damage[:, 2]).all())
    # The same again measures nothing.
    lines = (tmp_path / "tuned.measured.jsonl").read_text().splitlines()
    again = tune(tmp_path, *flags)
    assert again.returncode == 0 and (tmp_path / "tuned.measured.jsonl").read_text().splitlines() == lines
    assert all(len(json.loads(line)["damage"]) == 56 for line in lines)
    profile = Profile.load(tmp_path / "tuned.safetensors")
    assert torch.equal(profile.tuning.bounds, found.bounds)
    runtime = Runtime(MACSConfig(max_kl=float(found.damage[:, 0].max())), profile=profile)
    assert target_of(runtime.config, profile.tuning) == 0.6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--requests", "10"), "--requests: found 10, expected two batches (112) or more"),
        (("--model", "x"), "--model and --data go together"),
        (("--targets", "0"), "expected loads above 0"),
        (("--polcy", "macs"), "did you mean --policy?"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    done = tune(tmp_path, *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
