"""What a layer's records are summed up as."""

import pytest
import torch

from macs import METRICS, LayerReport, Topology
from macs.adapters import summarized
from macs.steps.contracts import Field


def report_of(busiest):
    """Steps of 100 tokens, k 1, on two ranks of an expert each, the first of which ends with so many rows."""
    rows = torch.zeros(len(busiest), len(Field) + 3 * 2, dtype=torch.int64)
    for name, value in (("sources", 1), ("planned", 1), ("tokens", 100), ("kept", 75), ("dropped", 25)):
        rows[:, Field[name.upper()]] = value
    rows[:, -2] = torch.tensor(busiest)
    rows[:, -1] = 100 - rows[:, -2]
    return LayerReport(rows, Topology(2, 2), 1)


def test_every_figure_is_summed_up_over_steps_and_layers():
    found = report_of([50, 60, 70]).summary()
    assert list(found) == list(METRICS)
    assert found["load_after"] == pytest.approx(1.2) and found["dropped"] == 0.25
    both = summarized([report_of([50, 60, 70]), report_of([50])])
    assert both["load_after"] == pytest.approx(1.1)
    assert {name: format(both[name], one.form) for name, one in METRICS.items()}["dropped"] == "25.0%"


def test_a_metric_is_a_row(monkeypatch):
    most = METRICS["load_after"].__class__("busiest step", lambda one: float(one.load("after").max()))
    monkeypatch.setitem(METRICS, "load_most", most)
    assert report_of([50, 60, 70]).summary()["load_most"] == pytest.approx(1.4)
