"""The modality mask through ``generate()``: caches, left padding, ranks that stop at different steps."""

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

JOBS = "support.deepspeed_tiny_jobs"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("policy", ["vanilla", "macs"])
def test_generation_is_hugging_faces_and_the_mask_follows_it(pool, world, policy):
    settings = {"capacity_factor": 1e6, "min_tokens": 0}
    for found in pool.run(f"{JOBS}:generated", world, policy, settings, True):
        assert found["same"] and found["kinds"] and found["valid"]
        assert found["pictures"] == 2 and found["padding"] > 0
        # One new token a sequence, text, no padding; as many steps as the rank that needs most.
        assert found["later"] == [(4, 0, True)] * (2 if world == 1 else 4)
        assert found["planned"] == [float(policy == "macs")] * (1 + len(found["later"]))


def test_decoding_is_bypassed(pool):
    for found in pool.run(f"{JOBS}:generated", 2, "macs", {"capacity_factor": 1e6}, True):
        assert found["same"] and found["later"] == [] and found["planned"] == [1.0]


def test_without_a_processors_types_the_ids_are_read(pool):
    found = pool.run(f"{JOBS}:generated", 1, "macs", {}, False)[0]
    assert found["kinds"] and found["valid"] and found["pictures"] == 2
