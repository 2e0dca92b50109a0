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
def test_the_layer_computes_its_plan(pool, name, dispatcher):
    layout = LAYOUTS[name]
    settings = {"capacity_factor": 0.6}
    found = pool.run(f"{JOBS}:planned_output", world(layout), layout, dispatcher, "macs", settings)
    for rank, one in enumerate(found):
        assert one["error"] < 1e-5 and one["mask"] and one["moved"] > 0
        twin = found[rank - rank % layout["tp"]]
        if not layout["sp"]:
            assert one["plan"] == twin["plan"]  # ranks with the same tokens agree
        elif rank % layout["tp"]:
            assert one["plan"] != twin["plan"]


def test_replicas_must_plan_alike(pool):
    message = "policy expanded-drop: every rank would add experts of its own"
    with pytest.raises(RankFailed, match="set sequence_parallel") as caught:
        pool.run(f"{JOBS}:refused", 2, LAYOUTS["TP 2, EP 2"], "expanded-drop", {})
    assert all(message in error[1] for error in caught.value.errors)


@pytest.mark.parametrize("name", ["TP 2, sequence parallel", "TP 2, EP 2, sequence parallel"])
def test_an_engine_may_take_sequence_parallelism_back(pool, name):
    # As Megatron's static engine does when it begins to serve: every rank then has whole sequences.
    layout = LAYOUTS[name]
    settings = {"capacity_factor": 0.6}
    found = pool.run(f"{JOBS}:without_sequence_parallelism", 2, layout, "macs", settings)
    plain = pool.run(f"{JOBS}:planned_output", 2, {**layout, "sp": False}, "alltoall", "macs", settings)
    assert [one["plan"] for one in found] == [one["plan"] for one in plain]
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:without_sequence_parallelism", 2, layout, "expanded-drop", settings)
    assert all("every rank would add experts of its own" in error[1] for error in caught.value.errors)


def test_sequence_parallelism_wants_the_whole_mask(pool):
    with pytest.raises(RankFailed) as caught:
        pool.run(f"{JOBS}:bad_mask", 2, LAYOUTS["TP 2, EP 2, sequence parallel"])
    assert "modality mask: found shape (3, 6), the layer has 3 sequences of 12 tokens" in str(caught.value)


ONE = {"tp": 1, "ep": 1, "etp": 1, "sp": False}
MODEL_LAYOUTS = {
    "PP 2": (2, {**ONE, "pp": 2}),
    "TP 2": (2, {**ONE, "tp": 2, "etp": 2}),
    "EP 4": (4, {**ONE, "ep": 4}),
    "TP 2, EP 2": (4, {**ONE, "tp": 2, "ep": 2}),
    "PP 2 x EP 2": (4, {**ONE, "pp": 2, "ep": 2}),
    "TP 2 x PP 2 x EP 2": (8, {**ONE, "tp": 2, "pp": 2, "ep": 2}),
}
QUESTIONS = 14  # two of each task


@pytest.fixture(scope="module")
def alone(pool):
    """The tiny model's answers on one process, vanilla."""
    (found,) = pool.run(f"{JOBS}:tiny_answers", 1, ONE, "vanilla", {}, QUESTIONS, {})
    assert found["layers"] == 4 and found["mask"]
    return found["answers"]


@pytest.mark.parametrize("name", MODEL_LAYOUTS)
def test_vanilla_gives_the_same_answers_under_every_layout(pool, alone, name):
    world, layout = MODEL_LAYOUTS[name]
    for one in pool.run(f"{JOBS}:tiny_answers", world, layout, "vanilla", {}, QUESTIONS, {}):
        assert one["layers"] == 4 // layout.get("pp", 1) and one["mask"]
        assert one["answers"] == alone[one["replica"] :: one["replicas"]]


@pytest.mark.parametrize(
    ("name", "alike", "settings"),
    [
        ("PP 2", "one", {"capacity_factor": 0.8}),
        ("TP 2", "one", {"capacity_factor": 0.8}),
        ("PP 2 x EP 2", "EP 2", {"capacity_factor": 0.8}),
        ("TP 2 x PP 2 x EP 2", "TP 2, EP 2", {"capacity_factor": 0.8}),
    ],
)
def test_layouts_that_split_the_tokens_alike_plan_alike(pool, name, alike, settings):
    others = {"one": (1, ONE), "EP 2": (2, {**ONE, "ep": 2}), **MODEL_LAYOUTS}
    found, plain = (
        pool.run(f"{JOBS}:tiny_answers", one[0], one[1], "macs", settings, QUESTIONS, {})
        for one in (MODEL_LAYOUTS[name], others[alike])
    )
    by_replica = {one["replica"]: one for one in plain}
    stages = MODEL_LAYOUTS[name][1].get("pp", 1)
    for rank, one in enumerate(found):
        twin = by_replica[one["replica"]]
        assert one["mask"] and one["planned"] == [1] * (4 // stages)
        assert one["answers"] == twin["answers"]
        first = rank * stages // len(found) * one["layers"]  # stages are the slowest to vary
        assert one["plans"] == twin["plans"][first : first + one["layers"]]


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunked_prefill_splits_the_mask_with_the_tokens(pool, alone, chunks):
    changes = {"mlp_chunks_for_prefill": chunks}
    (found,) = pool.run(f"{JOBS}:tiny_answers", 1, ONE, "vanilla", {}, QUESTIONS, changes)
    assert found["mask"] and found["planned"] == [chunks] * 4
    assert found["answers"] == alone
    world, layout = MODEL_LAYOUTS["PP 2 x EP 2"]
    settings = {"capacity_factor": 0.8}
    for one in pool.run(f"{JOBS}:tiny_answers", world, layout, "macs", settings, QUESTIONS, changes):
        assert one["mask"] and one["planned"] == [chunks] * 2


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("macs", {"capacity_factor": 0.5}),
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
