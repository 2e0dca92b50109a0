"""Tensor, expert and expert-tensor parallelism, with and without sequence parallelism, on gloo."""

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from support.workers import RankFailed

JOBS = "support.megatron_layouts"

LAYOUTS = {
    "TP 2": {"tp": 2, "ep": 1, "etp": 2, "sp": False},
    "TP 2, sequence parallel": {"tp": 2, "ep": 1, "etp": 2, "sp": True},
    "TP 2, EP 2": {"tp": 2, "ep": 2, "etp": 1, "sp": False},
    "TP 2, EP 2, sequence parallel": {"tp": 2, "ep": 2, "etp": 1, "sp": True},
    "TP 2 x EP 2 x ETP 2": {"tp": 2, "ep": 2, "etp": 2, "sp": False},
    "TP 2 x EP 2 x ETP 2, sequence parallel": {"tp": 2, "ep": 2, "etp": 2, "sp": True},
    "TP 2 x EP 4, sequence parallel": {"tp": 2, "ep": 4, "etp": 1, "sp": True},
    "EP 2 x DP 2": {"tp": 1, "ep": 2, "etp": 1, "sp": False},
}


def world(layout):
    return max(layout["tp"], layout["ep"] * layout["etp"], 4 if layout["tp"] == 1 else 0)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_with_nothing_over_capacity_the_output_is_stock_bit_for_bit(pool, name, dispatcher):
    layout = LAYOUTS[name]
    for same in pool.run(f"{JOBS}:unbounded_is_stock", world(layout), layout, dispatcher):
        assert same == dict.fromkeys(same, True)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("scope", ["local", "group"])
def test_the_layer_computes_what_the_plan_says(pool, name, dispatcher, scope):
    layout = LAYOUTS[name]
    if scope == "group" and layout["tp"] > 1 and not layout["sp"]:
        pytest.skip("refused: tensor-parallel ranks hold the same tokens")
    settings = {"capacity_factor": 0.6, "scope": scope}
    found = pool.run(f"{JOBS}:planned_output", world(layout), layout, dispatcher, "macs", settings)
    for rank, one in enumerate(found):
        assert one["error"] < 1e-5 and one["mask"] and one["moved"] > 0
        twin = found[rank - rank % layout["tp"]]
        if not layout["sp"]:
            assert one["plan"] == twin["plan"]  # ranks with the same tokens agree
        elif rank % layout["tp"]:
            assert one["plan"] != twin["plan"]
    if scope == "group":
        # Together they keep to one capacity: no expert gets more than all sources' quotas.
        tokens = 3 * 12 * (1 if layout["sp"] else layout["tp"]) * len(found) // layout["tp"]
        loads = [sum(column) for column in zip(*(one["loads"] for one in found), strict=True)]
        groups = len(found) // (layout["ep"] * layout["etp"])
        assert max(loads) < groups * 3.0 * 0.6 * tokens * 3 / 8


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        ("macs", {"scope": "group"}, "config.scope = 'group': every rank would have quotas of its own"),
        ("expanded-drop", {}, "policy expanded-drop: every rank would add experts of its own"),
    ],
)
def test_replicas_must_plan_alike(pool, policy, settings, message):
    with pytest.raises(RankFailed, match="set sequence_parallel") as caught:
        pool.run(f"{JOBS}:refused", 2, LAYOUTS["TP 2, EP 2"], policy, settings)
    assert all(message in error[1] for error in caught.value.errors)


def test_sequence_parallelism_wants_the_whole_mask(pool):
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:bad_mask", 2, LAYOUTS["TP 2, EP 2, sequence parallel"])
    assert "modality mask: found shape (3, 6), the layer has 3 sequences of 12 tokens" in str(caught.value)


@pytest.mark.parametrize(
    "settings", [("vanilla", {}), ("macs", {"capacity_factor": 0.8})], ids=["vanilla", "macs"]
)
def test_every_stage_of_a_pipeline_has_the_mask(pool, settings):
    policy, config = settings
    layout = {"tp": 1, "ep": 1, "etp": 1, "sp": False, "pp": 1}
    (whole,) = pool.run(f"{JOBS}:pipeline_answers", 1, layout, policy, config, 14)
    assert whole["layers"] == 4 and whole["mask"] and whole["planned"] == 4
    found = pool.run(f"{JOBS}:pipeline_answers", 2, {**layout, "pp": 2}, policy, config, 14)
    for one in found:
        assert one["layers"] == 2 and one["mask"] and one["planned"] == 2
        assert one["answers"] == whole["answers"]


def test_pipeline_and_expert_parallelism(pool):
    layout = {"tp": 1, "ep": 2, "etp": 1, "sp": False, "pp": 1}
    plain = pool.run(f"{JOBS}:pipeline_answers", 2, layout, "macs", {"scope": "group"}, 14)
    found = pool.run(f"{JOBS}:pipeline_answers", 4, {**layout, "pp": 2}, "macs", {"scope": "group"}, 14)
    for one in found:
        assert one["mask"] and one["layers"] == 2
        assert one["answers"] == plain[one["replica"]]["answers"]


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("macs", {"capacity_factor": 0.5}),
        ("macs", {"capacity_factor": 0.5, "scope": "group"}),
        ("token-drop", {}),
    ],
)
def test_flex_dispatchers_carry_the_plan(pool, backend, world, policy, settings):
    layout = {"tp": 1, "ep": world, "etp": 1, "sp": False}
    found = pool.run(f"{JOBS}:over_deepep", world, layout, backend, policy, settings)
    for one in found:
        assert one["same"] and one["error"] < 1e-5 and abs(one["weights"]) < 1e-4
        assert one["handed"] == one["kept"] and one["dropped"] > 0
    # What is dropped reaches no expert.
    assert sum(one["rows"][1] for one in found) == sum(one["kept"] for one in found)
    assert sum(one["rows"][0] for one in found) == len(found) * 3 * 12 * 3


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("expanded-drop", {}, "moe_flex_dispatcher_backend = 'deepep' sends 3 assignments a token"),
        ("macs", {"moe_flex_dispatcher_backend": "ncclep"}, "expected one of deepep, hybridep"),
        ("macs", {"moe_expert_rank_capacity_factor": 1.0}, "it drops what the plan keeps"),
    ],
)
def test_what_flex_dispatchers_cannot_express_is_refused(pool, policy, changes, message):
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:refused_flex", 2, {"tp": 1, "ep": 2, "etp": 1, "sp": False}, policy, changes)
    assert all(message in error[1] for error in caught.value.errors)
