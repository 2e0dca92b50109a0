"""Megatron's multimodal and hybrid models: every layer is told which token is which."""

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

JOBS = "support.megatron_models"
ONE = {"tp": 1, "ep": 1, "etp": 1, "sp": False}
LAYOUTS = {"one": (1, ONE), "EP 2": (2, {**ONE, "ep": 2})}
QUESTIONS = 14


@pytest.fixture(scope="module")
def tiny_answers(pool):
    """The tiny model's answers, a GPT model with 64 image tokens in its prompts."""
    job = "support.megatron_layouts:tiny_answers"
    (found,) = pool.run(job, 1, ONE, "vanilla", {}, QUESTIONS, {})
    return found["answers"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_llava_expands_the_mask_as_it_expands_its_pictures(pool, tiny_answers, name):
    world, layout = LAYOUTS[name]
    for one in pool.run(f"{JOBS}:llava_answers", world, layout, "vanilla", {}, QUESTIONS):
        assert one["answers"] == tiny_answers[one["replica"] :: one["replicas"]]
        assert all(one["right"]) and len(one["right"]) == one["layers"] * len(one["answers"])
    for one in pool.run(f"{JOBS}:llava_answers", world, layout, "macs", {}, 4):
        assert all(one["right"]) and len(one["right"]) == one["layers"] * len(one["answers"]) > 0


def test_llava_with_several_pictures_of_several_tiles(pool):
    (found,) = pool.run(f"{JOBS}:llava_of_many_tiles", 1)
    # 6 tokens, of which one is a picture of 3 tiles of 5 tokens each.
    assert found["lengths"] == [20] * 4 and found["cut"] == [12] * 4
    assert found["right"] == [True] * 8
    assert found["cached"] == [[0], [0], [0]] and found["outer"]
    assert "num_image_tiles: found 2 pictures, expected 3, as in input_ids" in found["errors"]["tiles"]
    assert "found imgs_sizes" in found["errors"]["sizes"]


def test_later_stages_of_llava_know_the_pictures_by_the_ids(pool):
    # Megatron's VLMInferenceWrapper itself has no pipeline in either version: the stages by hand.
    (whole,) = pool.run(f"{JOBS}:llava_stages", 1, {**ONE, "pp": 1})
    first, last = pool.run(f"{JOBS}:llava_stages", 2, {**ONE, "pp": 2})
    assert whole["layers"] == 4 and first["layers"] == last["layers"] == 2
    assert len({tuple(kinds) for one in (whole, first, last) for kinds in one["kinds"]}) == 1
    assert sum(whole["kinds"][0]) == 64 and first["plans"] + last["plans"] == whole["plans"]
    assert last["logits"] == whole["logits"]


@pytest.mark.parametrize("by", ["with_macs", "install"])
def test_mimo_distinguishes_pictures_video_and_sound(pool, by):
    (found,) = pool.run(f"{JOBS}:mimo_of_many_kinds", 1, by)
    assert found["layers"] == 2 and found["right"] == [True, True]
    assert "special_token_ids: found a modality 'smell', expected its token id" in found["error"]


@pytest.mark.parametrize("by", ["with_macs", "install"])
def test_hybrid_models_have_the_mask_too(pool, by):
    pytest.importorskip("megatron.core.models.hybrid", reason="no hybrid model in this Megatron")
    (found,) = pool.run(f"{JOBS}:hybrid_layers", 1, by)
    assert found["layers"][1::2] == ["MACSMoELayer"] * 2
    assert found["visual"] == [found["images"]] * 2 and found["images"] > 0
