"""``macs tune``: the search for a split, and a run of it."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from macs import MACSConfig, Profile, Runtime
from macs.records.tuning import target_of
from macs_tools import cli
from macs_tools.tune import run, search

NATURAL = np.array([1.2, 1.4, 1.3])
COST = np.array([5.0, 0.1, 0.5])
"""KL of a layer for each unit of load below its natural one, squared."""


def measured(bounds, noise=0.0):
    loads = np.minimum(np.array(bounds), NATURAL)
    each = (COST * (NATURAL - loads) ** 2).sum()
    kl = each * np.linspace(0.5, 1.5, 64) * (1 + noise)
    return search.Measured(loads, kl, kl < 1)


def test_single_layers_make_a_split_that_spares_the_dear_one():
    curves = search.singles(measured, NATURAL)
    assert all((np.diff(loads) > 0).all() and (np.diff(kl) <= 0).all() for loads, kl in curves)
    bounds = search.split_by(curves, 0.8)
    assert np.mean(bounds) == pytest.approx(0.8, abs=1e-6)
    assert bounds[0] > bounds[2] > bounds[1]
    assert measured(bounds).kl.mean() < 0.5 * measured([0.8] * 3).kl.mean()


def test_a_target_that_nothing_reaches_is_one_bound():
    curves = search.singles(measured, NATURAL)
    assert search.split_by(curves, 0.2) == [0.2] * 3


def test_moves_make_it_better_and_never_dearer():
    start = [0.8, 0.8, 0.8]
    best, held = search.refined(measured, start, 100.0, 60)
    assert held.loads.mean() <= 0.8 + 1e-3
    assert held.kl.mean() < 0.5 * measured(start).kl.mean()
    assert best[0] > best[2] > best[1]
    same, _ = search.refined(measured, start, 100.0, 0)
    assert same == start


@pytest.fixture
def tune(program):
    def run(folder, *arguments, launcher=("-m",), status=0):
        folder.mkdir(exist_ok=True)
        words = *launcher, "macs_tools", "tune", "--out", folder / "tuned.safetensors", *arguments
        return program(*words, folder=folder, status=status)

    return run


PROCESSES = (*"-m torch.distributed.run --nproc-per-node 2 -m".split(),)


def test_a_tuning_is_measured_kept_and_served(tune, tmp_path):
    flags = ("--requests", "112", "--batch", "28", "--targets", "0.6", "0.9", "--tries", "2", "--ranks", "2")
    done = tune(tmp_path, *flags)
    assert "of at most" in done.stdout  # a file shows no bar
    found = Profile.load(tmp_path / "tuned.safetensors").tuning
    assert found.target_loads.tolist() == [0.9, 0.6] and found.layer_loads.shape == (2, 4)
    assert (found.ranks, found.requests, found.policy) == (2, 56, "macs")
    assert bool((found.kl[:, 1] <= found.kl[:, 0]).all())
    assert bool((found.kl[:, 0] <= found.kl[:, 2]).all())
    # Layers in groups share a bound, and other kinds of batches take turns.
    other = ("--groups", "2", "--batches", "mixed", "small", "--targets", "0.6", "--tries", "0")
    done = tune(tmp_path / "grouped", *flags, *other)
    assert "2 groups of layers" in done.stdout
    bounds = Profile.load(tmp_path / "grouped" / "tuned.safetensors").tuning.layer_loads
    assert bounds.shape == (1, 4) and bool((bounds[:, ::2] == bounds[:, 1::2]).all())
    # The same again measures nothing.
    lines = (tmp_path / "tuned.measured.jsonl").read_text().splitlines()
    tune(tmp_path, *flags)
    assert (tmp_path / "tuned.measured.jsonl").read_text().splitlines() == lines
    assert all(len(json.loads(line)["kl"]) == 56 for line in lines)
    profile = Profile.load(tmp_path / "tuned.safetensors")
    assert torch.equal(profile.tuning.layer_loads, found.layer_loads)
    runtime = Runtime(MACSConfig(max_kl=float(found.kl[:, 0].max())), profile=profile)
    assert target_of(runtime.config, profile.tuning) == 0.6


def test_megatron_measures_what_the_plain_adapter_does(tune, tmp_path):
    """Two processes of Megatron, and one that plans as two: the same loads, KL alike."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    flags = "--requests 56 --batch 28 --targets 0.6 --tries 0 --compensation-rank 4".split()
    tune(tmp_path / "plain", *flags, "--ranks", "2")
    done = tune(tmp_path / "megatron", *flags, "--engine", "megatron", launcher=PROCESSES)
    one, other = (
        {str(json.loads(found["key"])[1:]): found for found in map(json.loads, path.read_text().splitlines())}
        for path in (tmp_path / name / "tuned.measured.jsonl" for name in ("plain", "megatron"))
    )
    # Answers are part of the pass there, and exempt; here they follow from the cache. Splits may differ.
    common = [(one[key], other[key]) for key in one if key in other]
    assert len(common) > 15 and common[0][0]["same"] == common[0][1]["same"]
    for mine, its in common:
        assert np.allclose(mine["loads"], its["loads"], atol=0.08)
    profiles = [Profile.load(tmp_path / name / "tuned.safetensors") for name in ("plain", "megatron")]
    estimates = [found.compensation for found in profiles]
    assert estimates[0].rank == 4 and torch.equal(estimates[0].tokens[:, 1], estimates[1].tokens[:, 1])
    explained = [one.explained[:, 1] for one in estimates]
    assert torch.allclose(*explained, atol=1e-3) and bool((explained[0] > 0.5).all())
    assert "visual" in done.stdout
    tunings = [found.tuning for found in profiles]
    assert [found.ranks for found in tunings] == [2, 2] and tunings[0].requests == tunings[1].requests == 28


def test_a_text_model_is_tuned_under_autoep(tune, tmp_path):
    """Requests of several lengths; with a limit that nothing exceeds, answers and KL are the model's own."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from tiny_vlm.vocabulary import build_tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = build_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"moe_intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, initializer_range=0.3)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = list(tokenizer.get_vocab())[10:30]
    lines = [json.dumps({"text": " ".join(words[: 3 + number % 7])}) for number in range(16)]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    flags = ("--model", str(tmp_path / "model"), "--data", str(tmp_path / "requests.jsonl"), "--tokens", "4")
    flags += ("--requests", "16", "--batch", "8", "--tries", "0", "--targets", "4", "--engine", "deepspeed")
    tune(tmp_path / "tuned", *flags, launcher=PROCESSES)
    rows = map(json.loads, (tmp_path / "tuned" / "tuned.measured.jsonl").read_text().splitlines())
    unlimited = [one for one in rows if max(one["kl"]) == 0]
    assert unlimited and all(all(one["same"]) for one in unlimited)
    assert Profile.load(tmp_path / "tuned" / "tuned.safetensors").tuning.ranks == 2


def test_an_interrupted_tuning_prints_what_is_kept(monkeypatch, capsys, tmp_path):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("macs_tools.tune.sources.opened", interrupted)
    with pytest.raises(SystemExit) as end:
        run.main(["--out", str(tmp_path / "tuned.safetensors")])
    assert end.value.code == 130
    error = capsys.readouterr().err
    assert "tuned.measured.jsonl, and the same command goes on from there" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--requests", "10"), "--requests: found 10, expected two batches (112) or more"),
        (("--model", "x"), "--model: expected --data with it"),
        (("--targets", "0"), "--targets: found 0.0, expected more than 0"),
        (("--engine", "megatron", "--batches", "read"), "--engine megatron: found --model or --batches"),
        (("--engine", "deepspeed", "--ranks", "4"), "--ranks: found 4 with 1 processes of deepspeed"),
        (("--model", ".", "--data", ".", "--batches", "read"), "--batches: found with --model"),
        (("--polcy", "macs"), "did you mean --policy?"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", "--out", "tuned.safetensors", *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_a_mistake_found_with_the_model_is_one_line(tune, tmp_path):
    done = tune(tmp_path, "--groups", "3", status=2)
    assert "groups: found 3, expected a divisor of the model's 4 layers" in done.stderr
    assert len(done.stderr.splitlines()) == 1
