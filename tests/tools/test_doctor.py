"""``macs doctor``: what it finds, and what it makes of it."""

import pytest

from macs.steps.contracts import Placement
from macs.steps.kernels.dispatch import has_triton
from macs_tools import doctor


def test_what_is_named_must_work(capsys, monkeypatch):
    monkeypatch.setitem(doctor.CHECKS, "gpu", lambda: (doctor.WORKS, "one"))
    monkeypatch.setitem(doctor.CHECKS, "triton", lambda: (doctor.ABSENT, "none here"))
    assert doctor.main(["gpu"]) == 0
    assert doctor.main(["gpu", "triton"]) == 1
    shown = capsys.readouterr().out
    assert "absent" in shown and "none here" in shown


def test_an_unknown_name_is_an_error(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["sglang"])
    assert "found 'sglang', expected one of gpu, kernels" in capsys.readouterr().err


def test_an_adapter_that_cannot_build_on_its_engine_gives_the_reason():
    found = doctor.adapter("macs_of_no_engine", "torch", "nothing")
    assert found[0] == doctor.FAILS and "ModuleNotFoundError" in found[1]
    found = doctor.adapter("json", "an-engine-nobody-has", "megatron")
    assert found[0] == doctor.ABSENT and "pip install -e '.[megatron]'" in found[1]


@pytest.mark.kernels
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_a_plan_that_differs_is_found(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor.equal_kernels()[0] == doctor.WORKS

    def admit(demand, capacities, constants):
        return Placement(demand.routing.experts.clone(), capacities.pools, capacities.rows)

    monkeypatch.setattr("macs.steps.kernels.admission.admit", admit)
    found = doctor.equal_kernels()
    assert found[0] == doctor.FAILS and "differ from plain torch" in found[1]


def test_everything_is_looked_at(program):
    lines = (shown := program("-m", "macs_tools", "doctor", TRITON_INTERPRET="0").stdout).splitlines()
    assert [line.split()[0] for line in lines if line.split()[0] in doctor.CHECKS] == list(doctor.CHECKS)
    assert "megatron" in shown and " fails " not in shown
