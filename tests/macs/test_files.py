"""Files that a run leaves behind: whole or not at all, and refused before the run."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from macs import Profile, Runtime
from macs.files import check_output, save_tensors

COUNTS = torch.ones(1, 4, dtype=torch.int64)
PROFILE = Profile(COUNTS, COUNTS.clone(), ("a",), 2)


def test_a_save_that_fails_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    PROFILE.save(path)
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        Profile(COUNTS * 2, COUNTS.clone(), ("a",), 2).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


def test_a_saved_file_is_as_others_are(tmp_path):
    path, plain = tmp_path / "a.safetensors", tmp_path / "plain"
    save_tensors({"x": torch.ones(2)}, path, {"format": "any"})
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert safetensors.torch.load_file(path)["x"].tolist() == [1.0, 1.0]


def test_a_folder_in_the_files_place_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"--json: found the folder .*, expected a file's path"):
        check_output(tmp_path, "--json")
    with pytest.raises(ValueError, match="--json: found no folder"):
        check_output(tmp_path / "no" / "a.json", "--json")
    with (
        pytest.raises(ValueError, match="record_routing: found the folder"),
        Runtime().record_routing(tmp_path),
    ):
        pass
    assert os.listdir(tmp_path) == []
    assert check_output(tmp_path / "a.json", "--json") == (tmp_path / "a.json").resolve()
