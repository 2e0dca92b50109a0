"""Calibration profiles: measuring, classifying, files, and files that are none."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from support.cases import AnyAdapter

from macs import Modality, Profile, Runtime, Topology
from macs.records.profile import Calibration, router_fingerprint

ROUTER = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def profile(**changes):
    values = {
        "visual": torch.tensor([[90, 5, 5, 0]]),
        "text": torch.tensor([[5, 5, 90, 0]]),
        "fingerprints": (router_fingerprint(ROUTER),),
        "top_k": 2,
    }
    return Profile(**{**values, **changes})


def test_calibration_counts_tokens_by_expert_and_modality():
    mask = torch.tensor([[1, 0, 2, 1]])
    tokens = Modality.of(mask, valid=torch.tensor([[True, True, True, False]])).tokens()
    calibration = Calibration(3)
    for _ in range(2):
        calibration.observe(torch.tensor([[0, 1], [1, 2], [0, -1], [2, 1]]), tokens)
    assert calibration.counts().tolist() == [[0, 2, 2], [4, 2, 0]]


def test_calibration_without_a_run_is_refused():
    assert not Calibration(3).counts().any()  # of one rank; others may have had tokens
    runtime = Runtime()
    layer = runtime.add_layer(AnyAdapter(lambda: torch.randn(3, 4), Topology(3), 1))
    assert runtime.layers == [layer]
    with pytest.raises(ValueError, match="no tokens were observed"):
        runtime.measured_profile()


def test_bias():
    found = profile()
    # q = f_v / (f_v + f_t): 0.9/0.95, 0.05/0.1, 0.05/0.95, and 0.5 where nothing was seen.
    torch.testing.assert_close(
        found.visual_preference(), torch.tensor([[0.9 / 0.95, 0.5, 0.05 / 0.95, 0.5]]).double()
    )
    assert found.bias(0.1).tolist() == [[1.0, 0.0, -1.0, 0.0]]
    assert found.bias(0.46).tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_one_modality_alone_gives_no_bias():
    found = profile(visual=torch.zeros(1, 4, dtype=torch.int64))
    assert found.bias(0.1).tolist() == [[0.0] * 4]


def test_a_row_is_found_by_its_router():
    assert profile().row_of(ROUTER, 2) == 0
    assert profile().row_of(ROUTER.bfloat16(), 2) == 0
    with pytest.raises(ValueError, match="it was measured on another model"):
        profile().row_of(ROUTER + 1, 2)
    for router, top_k in ((ROUTER[:3], 2), (ROUTER, 1)):
        with pytest.raises(ValueError, match="a profile is of one model, whose layers are alike"):
            profile().row_of(router, top_k)


def test_truncated(tmp_path):
    path = tmp_path / "p.safetensors"
    profile().save(path)
    whole = path.read_bytes()
    for size in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Profile.load(path)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_hostile(tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Profile.load(path)
    good = {"visual": torch.ones(1, 4).long(), "text": torch.ones(1, 4).long()}
    header = {"fingerprints": ["x"], "top_k": 2}

    def written(tensors=good, header=header, form="macs-profile-2"):
        text = header if isinstance(header, str) else json.dumps(header)
        save_file(tensors, str(path), metadata={"format": form, "macs": text})
        return path

    Profile.load(written())
    twice = {name: one.repeat(2, 1) for name, one in good.items()}
    cases: list[tuple[dict, str]] = [
        ({"form": "other"}, "found format 'other', expected 'macs-profile-2'"),
        ({"tensors": {"visual": good["visual"]}}, "what macs tune writes, found KeyError('text')"),
        ({"header": {"top_k": 2}}, "expected what macs tune writes, found KeyError('fingerprints')"),
        ({"header": "{"}, "expected what macs tune writes, found JSONDecodeError"),
        ({"header": []}, "expected what macs tune writes, found TypeError"),
        ({"header": {**header, "top_k": "2"}}, "expected what macs tune writes, found TypeError"),
        ({"header": {**header, "tuning": {}}}, "found KeyError('tuning_target_loads')"),
        ({"tensors": {**good, "tuning_kl": good["text"] + 0}}, "found KeyError('tuning_target_loads')"),
        ({"tensors": {**good, "compensation_basis": good["text"] + 0}}, "KeyError('compensation_mean')"),
        ({"tensors": twice, "header": {**header, "fingerprints": ["x", "x"]}}, "layers with equal router"),
        ({"header": {**header, "top_k": 9}}, "profile.top_k: found 9, expected 1 to 4"),
        ({"header": {**header, "fingerprints": []}}, "profile.fingerprints: found 0, expected 1"),
        ({"tensors": {**good, "text": good["text"].float()}}, "profile.text: found torch.float32"),
        ({"tensors": {**good, "text": -good["text"]}}, "profile.text: found a negative count"),
        ({"tensors": {**good, "text": torch.ones(2, 4).long()}}, "profile.text: found shape (2, 4)"),
    ]
    for changes, message in cases:
        with pytest.raises((ValueError, TypeError)) as caught:
            Profile.load(written(**changes))
        assert message in str(caught.value), changes


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "none.safetensors")


def test_profiles_of_runs_and_stages_become_one():
    one, stage = profile(), profile(fingerprints=("another",), visual=torch.tensor([[1, 2, 3, 4]]))
    both = Profile.merged([one, stage, one])
    assert both.fingerprints == (*one.fingerprints, "another") and both.top_k == 2
    assert torch.equal(both.visual[0], 2 * one.visual[0])
    assert both.visual[1].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="expected those of one model"):
        Profile.merged([one, profile(top_k=1)])


def test_drift_is_what_moved_beyond_chance():
    even = torch.tensor([[1000, 1000, 1000, 1000]])
    then = profile(visual=even, text=even)
    generator = torch.Generator().manual_seed(0)
    same = torch.multinomial(torch.ones(4), 400, True, generator=generator).bincount(minlength=4)
    moved = torch.tensor([1600, 800, 800, 800])
    visual, text = then.drift(0, moved * 100, same)
    assert visual == pytest.approx(0.15, abs=0.02) and text < 0.02
    assert then.drift(0, torch.zeros(4), even[0]) == (0.0, 0.0)
    assert then.drift(0, torch.tensor([9, 0, 0, 0]), even[0])[0] > 0.3
