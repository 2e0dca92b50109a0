"""The command for a GPU, dry: its sections run small, on a CPU."""

import json

import pytest
import torch

from macs.steps.kernels.dispatch import has_triton
from macs_tools.bench import gpu as gpu_check

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not has_triton() or not torch.backends.cuda.is_built(),
        reason="Triton is not installed, or this torch has no CUDA to make fake tensors of",
    ),
]


def test_every_section_runs_dry(program):
    run = program(*"-m macs_tools bench gpu --dry --limit 240".split(), status=None)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [one["section"] for one in found] == list(gpu_check.sections(True))
    assert all(one["ok"] for one in found), found
    assert run.returncode == 0
    by_name = {one["section"]: one for one in found}
    assert by_name["no sync"]["skipped"] == by_name["graphs"]["skipped"] == "no GPU"
    assert by_name["launches"]["defaults"]["counted"]["demand"] == 1
    assert by_name["image flood"]["after"]["load"] < by_name["image flood"]["before"]["load"]


def test_a_section_that_fails_or_hangs_costs_no_other():
    found = gpu_check.checked("no such section", True, 60)
    assert not found["ok"] and "KeyError" in found["error"]
    found = gpu_check.checked("environment", True, 0.01)
    assert not found["ok"] and "no answer in 0.01 s" in found["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_at_once(capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main([])
    assert end.value.code == 2 and "found no GPU that torch can use, expected one" in capsys.readouterr().err
