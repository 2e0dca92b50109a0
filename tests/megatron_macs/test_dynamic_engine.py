"""Megatron's dynamic inference engine: packed requests, padding, chunked prefill, decoding."""

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("megatron.core.inference.config", reason="this Megatron's engine is built otherwise")

JOBS = "support.megatron_dynamic"
PROMPTS, IMAGES = 70 + 45 + 90, 35 + 22 + 45


@pytest.mark.parametrize("chunk", [None, 64])
def test_with_nothing_over_capacity_the_answers_are_stock(pool, chunk):
    (stock,) = pool.run(f"{JOBS}:dynamic_answers", 1, None, chunk)
    (found,) = pool.run(f"{JOBS}:dynamic_answers", 1, {"capacity_factor": 1e6}, chunk)
    assert found["answers"] == stock["answers"] and found["steps"] == stock["steps"]
    assert len({tuple(answer) for answer in found["answers"]}) == 3


def test_what_a_batch_is_filled_up_with_is_padding(pool):
    (found,) = pool.run(f"{JOBS}:dynamic_answers", 1, {"capacity_factor": 0.7}, None)
    real, padded = found["steps"][0]
    assert real == PROMPTS < padded
    assert found["told"] == [(PROMPTS, IMAGES, padded)]  # one prompt step; decoding is left alone
    assert found["moved"] > 0 and found["planned"] == [PROMPTS] * 2


def test_padding_is_found_where_no_modality_is(pool):
    (found,) = pool.run(f"{JOBS}:dynamic_answers", 1, {"capacity_factor": 0.7}, None, 4, False)
    assert found["told"] == [(PROMPTS, 0, found["steps"][0][1])]


def test_chunked_prefill_takes_its_part_of_the_mask(pool):
    (found,) = pool.run(f"{JOBS}:dynamic_answers", 1, {"capacity_factor": 0.7}, 64)
    prompts = [one for one in found["told"] if one[0] > 3]
    assert sum(one[0] for one in prompts) >= PROMPTS and sum(one[1] for one in prompts) == IMAGES
    assert [one[0] for one in found["told"]] == [real for real, _ in found["steps"][: len(found["told"])]]


def test_decoding_is_planned_where_it_is_asked_for(pool):
    (found,) = pool.run(f"{JOBS}:dynamic_answers", 1, {"capacity_factor": 0.7, "min_tokens": 0}, None)
    assert [one[0] for one in found["told"]] == [real for real, _ in found["steps"]]


def test_the_static_engine_that_runs_on_the_dynamic_one(pool):
    (stock,) = pool.run(f"{JOBS}:static_answers", 1, None)
    (found,) = pool.run(f"{JOBS}:static_answers", 1, {"capacity_factor": 1e6})
    assert not stock["legacy"] and not found["legacy"]
    assert found["answers"] == stock["answers"] and found["told"] == [IMAGES] * 2
