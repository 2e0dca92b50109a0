"""Visual-token pruning, which MACS is held against: what is kept, what is hidden, and the comparison."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from tiny_quality.pruning import AFTER, BEFORE, AfterLayer, Pruned, kept_of
from tiny_quality.rivals import KEEPS
from tiny_vlm import model as tiny
from tiny_vlm.kinds import draw_batches
from tiny_vlm.vocabulary import IMAGE, VOCABULARY

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return tiny.load_model()


@pytest.fixture(scope="module")
def inputs():
    return tiny.sample_inputs(draw_batches("mixed", "validation", 0, 1, 14)[0])


@torch.inference_mode()
def logits_of(model, inputs):
    return model(**inputs, logits_to_keep=1).logits[:, -1]


def visual(ids):
    return ids == VOCABULARY[IMAGE]


def test_the_highest_scores_of_each_picture_are_kept():
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.1, 0.2, 0.3]])
    assert kept_of(scores, 0.5).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert kept_of(scores, 0.01).sum(1).tolist() == [1, 1]


@torch.inference_mode()
@pytest.mark.parametrize("method", BEFORE)
def test_tokens_are_gone_before_the_language_model(model, inputs, method):
    whole = Pruned(model, inputs, method, 1.0, 0)
    with whole.applied():
        torch.testing.assert_close(logits_of(model, whole.inputs), logits_of(model, inputs))
    half = Pruned(model, inputs, method, 0.5, 0)
    before, after = visual(inputs["input_ids"]).sum(1), visual(half.inputs["input_ids"]).sum(1)
    assert torch.equal(after * 2, before) and after.amax() == 32
    real = half.inputs["attention_mask"].bool()
    assert torch.equal(real.sum(1), inputs["input_ids"].shape[1] - after)
    # Text keeps its positions, and so do pictures' tokens: the last one is where it was.
    assert (half.inputs["position_ids"][..., -1] == inputs["input_ids"].shape[1] - 1).all()
    with half.applied():
        found = logits_of(model, half.inputs)
    texts = before == 0
    torch.testing.assert_close(found[texts], logits_of(model, inputs)[texts])
    assert not torch.allclose(found[~texts], logits_of(model, inputs)[~texts], atol=1e-2)
    torch.testing.assert_close(logits_of(model, inputs), logits_of(model, inputs))  # nothing stays behind


@torch.inference_mode()
@pytest.mark.parametrize("after", [1, 2])
def test_tokens_are_hidden_after_a_layer(model, inputs, after):
    stock = logits_of(model, inputs)
    for keep, same in ((1.0, True), (0.5, False)):
        hooks = AfterLayer(model, after, keep)
        hooks.begin(inputs["input_ids"])
        found = logits_of(model, inputs)
        hooks.remove()
        assert torch.allclose(found, stock, atol=1e-4) == same
        gone = (~hooks.stays).sum(1)
        assert torch.equal(gone, visual(inputs["input_ids"]).sum(1) * int((1 - keep) * 2) // 2)
        assert not (~hooks.stays & ~visual(inputs["input_ids"])).any()
    assert torch.equal(logits_of(model, inputs), stock)


@torch.inference_mode()
def test_hidden_tokens_change_no_other_token(model, inputs):
    """Hidden states of hidden tokens may be anything: no other token's change."""
    hooks = AfterLayer(model, 2, 0.5)
    hooks.begin(inputs["input_ids"])
    expected = logits_of(model, inputs)

    def disturb(module, given):
        return (torch.where(hooks.stays[..., None], given[0], given[0] + 3), *given[1:])

    handle = model.model.language_model.layers[2].register_forward_pre_hook(disturb)
    try:
        torch.testing.assert_close(logits_of(model, inputs), expected)
    finally:
        handle.remove()
        hooks.remove()


def test_the_comparison_is_measured_timed_and_drawn(program, tmp_path):
    command = [ROOT / "examples" / "compare_pruning.py"]
    command += ["--tuning", ROOT / "examples" / "tiny_vlm" / "tuning-4-ranks.safetensors"]
    command += (
        "--split validation --questions 28 --batch 14 --targets 0.6 --json found.json --plot a.png".split()
    )
    shown = program(*command).stdout
    found = {one["title"]: one for one in json.loads((tmp_path / "found.json").read_text())}
    assert len(found) == 1 + len(KEEPS) * len((*BEFORE, *AFTER)) + 1 + 8
    stock, ours, pruned = found["as it is"], found["MACS 0.6"], found["tower attention, 0.5"]
    assert stock["kl"][0] == 0 and stock["tokens"] == 1 and stock["rows"] == stock["natural"] > 1.3
    assert ours["rows"] == pytest.approx(0.6, abs=0.05) and ours["tokens"] == 1
    assert pruned["tokens"] < 0.8 and pruned["rows"] < stock["rows"] and pruned["kl"][0] > 0
    assert 1 <= stock["eplb"] < stock["natural"]
    assert found["after layer 2, 0.5"]["rows"] < stock["rows"]
    for title in ("ideal balance", "EPLB, 1 replica a rank", *found):
        assert title in shown
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert shown.strip().endswith(program(*command).stdout.strip())  # read again


@torch.inference_mode()
def test_prefills_are_timed_in_turn():
    from tiny_quality.rival_times import CHOSEN, seconds
    from tiny_quality.rivals import comparing, parse_arguments

    tuning = str(ROOT / "examples" / "tiny_vlm" / "tuning-4-ranks.safetensors")
    with comparing(parse_arguments(["--tuning", tuning, "--questions", "28", "--batch", "14"])) as one:
        found = seconds(one, (CHOSEN[0], CHOSEN[2], CHOSEN[5]), turns=2)
    assert list(found) == ["as it is", "tower attention, 0.5", "MACS 0.6"]
    assert all(len(each) == 2 and min(each) > 0 for each in found.values())
