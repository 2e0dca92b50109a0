"""``macs tune --only modality``: requests from files, profiles, how far they can be trusted."""

import json

import pytest
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from tiny_vlm.data import TASKS, draw_samples

from macs import Profile
from macs_tools.common import requests
from macs_tools.tune import modality

TUNE = "-m", "macs_tools", "tune", "--only", "modality"


@pytest.fixture
def folder(tmp_path):
    from skimage import data
    from skimage.io import imsave

    for number in range(4):
        imsave(tmp_path / f"{number}.png", data.astronaut()[:128, number * 30 : number * 30 + 128])
        (tmp_path / f"text{number}.txt").write_text("1 2 + 3 4 =")
    (tmp_path / "1.txt").write_text("what is the largest digit ?")
    return tmp_path


def test_a_folder_is_pictures_with_their_questions_and_texts(folder):
    found = requests.read_requests(folder)
    assert [one.picture and one.picture.name for one in found] == ["0.png", "1.png", "2.png", "3.png"] + [
        None
    ] * 4
    assert [one.text for one in found[:2]] == [requests.DEFAULT_QUESTION, "what is the largest digit ?"]
    lines = [{"image": "0.png"}, {"text": "why?"}, {"image": "1.png", "text": "what?"}]
    path = folder / "requests.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert [(one.text, one.picture is None) for one in requests.read_requests(path)] == [
        (requests.DEFAULT_QUESTION, False),
        ("why?", True),
        ("what?", False),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"picture": "a.png"}', "line 1: found .*picture.*expected fields text and image"),
        ("{}", "line 1: found {}, expected fields"),
        ('{"text": 3}', "line 1: field text: found 3, expected a string"),
        ('{"image": "no.png"}', r"line 1: field image: found no file .*no\.png"),
        ("", "found no pictures and no texts"),
    ],
)
def test_a_bad_request_is_told_with_its_place(tmp_path, line, message):
    path = tmp_path / "requests.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        requests.read_requests(path)


def test_stability_is_of_disjoint_halves():
    def profile(visual, text):
        return Profile(torch.tensor([visual]), torch.tensor([text]), ("router",), 1)

    steady, other = profile([9, 1], [1, 9]), profile([1, 9], [9, 1])
    same = modality.stability([steady] * 6, 10, 0.1)
    assert [one.requests for one in same] == [10, 20, 30] and modality.enough(same) == 10
    assert all(float(one.alike.mean()) == 1 and float(one.difference.mean()) == 0 for one in same)
    opposed = modality.stability([steady, other] * 3, 10, 0.1)
    assert float(opposed[-1].alike.mean()) == 0 and modality.enough(opposed) is None
    assert float(opposed[-1].difference.mean()) == pytest.approx(0.8)


@pytest.mark.parametrize("engine", ["plain", "deepspeed", "megatron"])
def test_a_profile_is_measured_shown_and_checked(program, folder, engine):
    if engine == "megatron":
        pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    done = program(*TUNE, "--engine", engine, *"--out found.safetensors --requests 14 --batch 2".split())
    profile = Profile.load(folder / "found.safetensors")
    assert (profile.num_layers, profile.num_experts, profile.top_k) == (4, 16, 2)
    pictures = sum(one.pixels is not None for one in draw_samples(0, "train", TASKS, 14))
    assert profile.visual.sum(1).tolist() == [pictures * 64 * 2] * 4
    assert "profile of 14 requests in found.safetensors" in done.stdout and "requests a half" in done.stdout
    if engine == "deepspeed":
        fits = program(*TUNE, "--check", "found.safetensors")
        assert "was measured on this model" in fits.stdout
        Profile(profile.visual, profile.text, tuple("abcd"), 2).save(folder / "other.safetensors")
        foreign = program(*TUNE, "--check", "other.safetensors", status=2)
        assert "it was measured on another model" in foreign.stderr
