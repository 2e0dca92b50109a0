"""Ranks that must run alike, over gloo: disagreements named, nobody hanging, no batch taken for another."""

from datetime import timedelta

import pytest
from support.workers import RankFailed

JOBS = "support.agreement_jobs"
pytestmark = pytest.mark.engine

FIELDS = [
    ("enabled", "enabled"),
    ("calibrating", "calibrating"),
    ("training", "training"),
    ("policy", "policy"),
    ("profile", "profile"),
    ("macs version", "macs version"),
    ("target_load", "config.target_load"),
    ("min_tokens", "config.min_tokens"),
    ("cost", "config.cost"),
    ("level", "config.level"),
]


@pytest.mark.parametrize("before_first", [True, False])
@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_ranks_that_differ_are_told_rank_and_field(pool, kind, field, before_first):
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:ranks_that_differ", 2, kind, before_first, timeout=60)
    errors = caught.value.errors
    told = [error for error in errors if error and error[0] == "RankMismatch"]
    assert told and all(errors), errors
    for _, message, _ in told:
        assert field in message and "rank 1" in message and "ranks [0, 1]" in message
    if before_first:
        assert len(told) == 2  # both compare before anything is sent


def test_ranks_that_change_alike_are_not_held_up(pool):
    for found in pool.run(f"{JOBS}:ranks_that_change_alike", 2):
        assert found["changes"] == 4 and found["looks"] == 1  # one a pass that plans, none for decoding


def test_a_rank_that_is_late_is_waited_for(pool):
    assert pool.run(f"{JOBS}:a_late_rank", 2) == [True, True]


@pytest.mark.parametrize("where", ["in a layer", "between layers", "before the first layer"])
def test_after_an_error_in_the_middle_a_rank_sends_no_other_batch(pool, where):
    # The other rank waits in its collective for as long as a collective may take.
    _, said = pool.run(f"{JOBS}:broken_off", 2, where, patience=timedelta(seconds=15))
    first, *later = said
    assert ("KeyError" if "layers" in where or "before" in where else "RuntimeError: in the layer") in first
    assert len(later) == 2
    for one in later:
        assert "an earlier forward pass on rank 1 ended before its last collective" in one
        assert "ranks [0, 1]" in one and "Build the process groups and the model anew" in one


def test_an_error_after_the_last_layer_breaks_nothing_off(pool):
    _, said = pool.run(f"{JOBS}:broken_off", 2, "after the last layer")
    assert said == ["IndexError: list index out of range"]


def test_without_a_store_nothing_is_compared(pool):
    assert pool.run(f"{JOBS}:without_a_store", 2) == [["NoneType"], ["NoneType"]]


def test_a_copied_model_agrees_by_itself(pool):
    assert pool.run(f"{JOBS}:deep_copies", 2) == [[2, 6, True]] * 2
