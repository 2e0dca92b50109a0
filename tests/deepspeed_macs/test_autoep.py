"""AutoEP layers with MACS, in every model AutoEP knows and some it does not, over gloo processes."""

import pytest
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from support.hf_models import CONFIGS

from deepspeed_macs.models import why_no_layers

JOBS = "support.deepspeed_jobs"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(pool, name, world):
    for found in pool.run(f"{JOBS}:autoep_unbounded_is_stock", world, name, {}):
        assert found["off by"] < 1e-5  # AutoEP itself computes what Hugging Face does
        assert found["same"] == dict.fromkeys(found["same"], True)


@pytest.mark.parametrize(
    "expert_parallel",
    [{"score_apply": "pre"}, {"combine_impl": "legacy_bmm"}, {"use_grouped_mm": False}],
    ids=lambda options: next(iter(options)),
)
def test_autoeps_options_stay_bit_for_bit(pool, expert_parallel):
    for found in pool.run(f"{JOBS}:autoep_unbounded_is_stock", 2, "qwen3_moe", expert_parallel):
        assert found["same"] == dict.fromkeys(found["same"], True)


def test_four_ranks_stay_bit_for_bit(pool):
    for found in pool.run(f"{JOBS}:autoep_unbounded_is_stock", 4, "qwen3_vl_moe", {}):
        assert found["same"] == dict.fromkeys(found["same"], True)


def check_rows(found):
    """What is dropped is neither sent nor computed; what is rerouted travels once."""
    for rank, one in enumerate(found):
        arrived = sum(other["to_rank"][rank] for other in found)
        assert one["sent"] == [one["kept_rows"], arrived]  # there and back
        assert arrived <= one["computed"] <= arrived + one["padding"]


@pytest.mark.parametrize("policy", ["vanilla", "token-drop", "expanded-drop", "rank-balanced", "macs"])
def test_the_layer_computes_its_plan_and_sends_nothing_else(pool, policy):
    settings = {"capacity_factor": 0.6}
    found = pool.run(f"{JOBS}:autoep_planned_output", 2, "qwen3_vl_moe", policy, settings, {})
    check_rows(found)
    for one in found:
        assert one["error"] < 1e-4 and one["finite"]
        changed = one["statistics"]["dropped"] + one["statistics"]["rerouted"]
        assert (changed == 0) == (policy == "vanilla")
        assert (one["kept_rows"] < 3 * 12 * 2) == (
            one["statistics"]["dropped"] > 0
        ) or policy == "expanded-drop"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_moe", {"score_apply": "pre"}),
        ("qwen3_moe, weights not normalised", {}),
        ("qwen3_5_moe", {}),
        ("deepseek_v3", {}),
        ("deepseek_v2, limited groups", {}),
        ("kimi", {}),
        ("internvl", {"combine_impl": "legacy_bmm"}),
    ],
)
def test_shared_experts_scores_and_scales_keep_working(pool, name, options):
    settings = {"capacity_factor": 0.6, "reroute": "group"}
    found = pool.run(f"{JOBS}:autoep_planned_output", 2, name, "macs", settings, options)
    check_rows(found)
    for one in found:
        assert one["error"] < 1e-4 and one["finite"]
        assert one["statistics"]["rerouted"] > 0


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2, limited groups", "kimi"])
def test_rerouting_stays_within_a_tokens_groups(pool, name):
    found = pool.run(f"{JOBS}:autoep_rerouted_within_groups", 1, name)[0]
    assert found["within"] and found["rerouted"] > 0


@pytest.mark.parametrize("lengths", [[9, 1], [1, 30], [30, 2, 7, 1]])
def test_ranks_may_have_uneven_tokens(pool, lengths):
    block = {"capacity_factor": 0.5}
    found = pool.run(f"{JOBS}:autoep_uneven_tokens", len(lengths), lengths, block, timeout=60)
    for (shape, finite), length in zip(found, lengths, strict=True):
        assert shape == (1, length, 64) and finite


def test_one_process_plans_what_two_plan(pool):
    first, second = pool.run(f"{JOBS}:autoep_virtual_plan", 2, 1)
    (whole,) = pool.run(f"{JOBS}:autoep_virtual_plan", 1, 2)
    assert first[0] + second[0] == whole[0]
    assert first[1] + second[1] == whole[1] > 0


@pytest.mark.parametrize("score_apply", ["post", "pre"])
@pytest.mark.parametrize("world", [2, 4])
def test_folded_with_tensor_parallelism(pool, world, score_apply):
    found = pool.run(f"{JOBS}:folded", world, score_apply, 2)
    plain = pool.run(f"{JOBS}:not_folded", world, score_apply, 2)
    for first, second, logits in zip(found[::2], found[1::2], plain[::2], strict=True):
        assert first["same"] == second["same"] == dict.fromkeys(first["same"], True)
        assert first["logits"] == second["logits"]  # tensor-parallel ranks agree
        assert torch.allclose(torch.tensor(first["logits"]), torch.tensor(logits), atol=1e-5)
        assert "policy expanded-drop: the expert-parallel group holds" in first["refusal"]
        # Together they send what the plan keeps, once, and less than stock does.
        assert first["sent"] + second["sent"] == first["kept"] == second["kept"]
        assert first["kept"] < first["stock sent"] + second["stock sent"] == 3 * 12 * 2


def test_a_model_of_several_models_is_refused_with_the_one_to_pass():
    """As Qwen3-Omni, whole: its talker has experts, too, and does not see pictures."""
    whole = torch.nn.Module()
    whole.thinker = torch.nn.Identity()
    assert "deepspeed_macs.initialize(model=model.thinker, ...)" in why_no_layers(whole)
