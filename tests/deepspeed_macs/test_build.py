"""DeepSpeed's first compilation: said, and nobody waits for a builder that is gone."""

import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
if not os.path.isdir("/proc/self/fd"):
    pytest.skip("locks are looked up in /proc", allow_module_level=True)

from torch.utils.file_baton import FileBaton

from deepspeed_macs import build


def test_a_lock_that_a_builder_holds_is_waited_for(tmp_path, caplog):
    lock = tmp_path / "lock"
    code = (
        "import sys, time; from torch.utils.file_baton import FileBaton; baton = FileBaton(sys.argv[1]); "
        "baton.try_acquire(); print('held', flush=True); time.sleep(2); baton.release()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        assert build.holder(lock)
        build.await_build(tmp_path)
        assert not lock.exists()
    assert "DeepSpeed compiles deepspeed_shm_comm" in caplog.text and str(tmp_path) in caplog.text
    (tmp_path / "deepspeed_shm_comm.so").touch()
    caplog.clear()
    build.await_build(tmp_path)
    assert caplog.text == ""


def test_a_lock_whose_owner_is_gone_is_named(tmp_path):
    baton = FileBaton(str(tmp_path / "lock"))
    baton.try_acquire()
    assert build.holder(tmp_path / "lock")
    os.close(baton.fd)  # as a killed process leaves it
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Remove it: rm .*/lock"):
        build.await_build(tmp_path)
    assert time.monotonic() - began < 5


def test_a_lock_of_somebody_unseen_is_given_time(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(build, "on_shared_storage", lambda path: True)
    assert build.holder(lock)
    os.utime(lock, (0, time.time() - build.PATIENCE - 1))
    assert build.holder(lock) is False
    lock.unlink()
    assert build.holder(lock) is None


def test_the_folder_is_torchs(monkeypatch, tmp_path):
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert str(build.build_folder()) == _get_build_directory(build.EXTENSION, False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(build, "get_default_build_root", lambda: str(tmp_path))
    assert str(build.build_folder()) == _get_build_directory(build.EXTENSION, False)


def test_every_way_into_deepspeed_passes_by():
    import importlib

    assert importlib.import_module("deepspeed.comm.torch").build_shm_op.watched
