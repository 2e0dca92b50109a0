"""Which token is which, which expert is in service, and who agrees on what, in DeepSpeed's layers."""

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

JOBS = "support.deepspeed_jobs"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("block", "given"),
    [
        ({"image_token_id": None}, "mask"),  # by policies that need no visual tokens
        ({"image_token_id": None, "modality": "text"}, "mask"),
        ({"image_token_id": None, "modality": "text", "policy": "macs"}, "embeddings"),
        ({"image_token_id": None, "padding_token_id": 0}, "nothing"),
        ({"image_token_id": None, "modality": "manual"}, "mask"),
    ],
)
def test_text_models_find_their_padding(pool, name, block, given):
    found = pool.run(f"{JOBS}:padding_found", 1, name, block, given)[0]
    assert found == {"padding": 24, "tokens": 12, "right": True, "visual": 0}


@pytest.mark.parametrize(
    ("block", "given", "way", "padding"),
    [
        ({}, "mask", "call", 24),
        ({"padding_token_id": 0}, "nothing", "call", 24),
        ({"padding_token_id": 0}, "ones", "call", 0),  # what comes with the call takes precedence
        ({"modality": "manual"}, "mask", "block", 24),
        ({"modality": "manual"}, "embeddings", "block", 24),
    ],
)
def test_multimodal_models_find_theirs(pool, block, given, way, padding):
    found = pool.run(f"{JOBS}:padding_found", 1, "qwen3_vl_moe", block, given, way)[0]
    assert found["padding"] == padding and found["tokens"] == 36 - padding and found["visual"] > 0


@pytest.mark.parametrize("policy", ["macs", "rank-balanced", "expanded-drop"])
def test_experts_that_a_bias_takes_out_get_no_token(pool, policy):
    for layers, sent, rerouted in pool.run(f"{JOBS}:disabled_experts", 2, policy):
        assert layers == 1 and sent == 0
        assert rerouted > 0 or policy == "expanded-drop"


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe"])
def test_router_logits_are_put_out(pool, name):
    found = pool.run(f"{JOBS}:router_logits", 1, name)[0]
    assert found["layers"] == [2, 2] and found["off by"] < 1e-5


@pytest.mark.parametrize("drop_tokens", [True, False])
@pytest.mark.parametrize("off", ["off", "training"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_gate_makes_the_same_collectives_on_or_off(pool, off, drop_tokens, k):
    assert pool.run(f"{JOBS}:gates_off_and_on", 2, off, drop_tokens, k, timeout=60) == [[1.0, 6.0]] * 2
