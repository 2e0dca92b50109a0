"""One plan in every engine: Megatron, DeepSpeed's AutoEP and DeepSpeed's MoE layer."""

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

JOBS = "support.both_engines"

CHOICES = [
    ("vanilla", {}),
    ("token-drop", {}),
    ("rank-balanced", {}),
    ("expanded-drop", {}),
    ("macs", {"capacity_factor": 0.7}),
    ("paper", {"capacity_factor": 0.7}),
    ("macs", {"level": "rank", "reroute": "group"}),
]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("policy", "settings"), CHOICES)
def test_the_same_inputs_give_the_same_plan(pool, world, policy, settings):
    for layers in pool.run(f"{JOBS}:plans", world, policy, settings):
        assert len(layers) == 4
        for found in layers:
            assert found["same"] and found["weights"] < 1e-5 and found["profile"]
            assert len(set(found["moved"])) == 1
        if world == 2:  # a layer may be even by itself
            assert any(found["moved"][0] > 0 for found in layers) == (policy != "vanilla")


def test_the_same_questions_get_the_same_answers(pool):
    for choices in pool.run(f"{JOBS}:answers", 2, CHOICES, 28, timeout=200):
        for found in choices:
            megatron, autoep, moe = found["answers"]
            assert megatron == autoep == moe
            assert found["right"] > 0.5
            assert found["loads"][0] == found["loads"][1] == found["loads"][2]
