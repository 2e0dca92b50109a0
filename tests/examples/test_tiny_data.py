"""The tiny model's data: splits, prompts, answers, layouts."""

from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from tiny_vlm import data, pictures
from tiny_vlm import model as tiny
from tiny_vlm.training import SEQUENCE_TOKENS, TURNS, draw_training_batch
from tiny_vlm.vocabulary import VOCABULARY, build_tokenizer, encode

WORDS = {index: word for word, index in VOCABULARY.items()}


def text(ids):
    return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prompts_have_one_length_and_right_answers(split):
    for sample in data.draw_samples(3, split, data.TASKS, 70):
        assert len(sample.prompt) == data.PROMPT_TOKENS
        assert text(sample.answer).endswith("<end>") and len(sample.answer) <= data.ANSWER_TOKENS
        prompt, answer = text(sample.prompt), text(sample.answer).removesuffix(" <end>")
        assert (sample.pixels is None) == ("<image>" not in prompt)
        assert sample.prompt.count(VOCABULARY["<image>"]) in (0, data.IMAGE_TOKENS)
        if sample.task == "arithmetic":
            a, b, plus, c, d, equal = prompt.split()[-6:]
            assert (plus, equal) == ("+", "=")
            assert int(answer.replace(" ", "")) == int(a + b) + int(c + d)
        if sample.task == "recall":
            words = prompt.split()
            pairs = dict(pairwise(words[words.index("<begin>") + 1 : words.index("?")]))
            assert answer == pairs[words[-1]]


def test_questions_are_about_what_is_there():
    rng = np.random.default_rng(0)
    for _ in range(40):
        picture = pictures.draw_picture(rng, "train")
        present = picture.present
        for task in data.PICTURE_TASKS:
            question, answer = (text(ids) for ids in data.ask(rng, picture, task))
            answer = answer.removesuffix(" <end>")
            assert len(question.split()) == data.QUESTION_TOKENS
            expected = {
                "count": str(len(present)),
                "largest": str(max(present)),
                "sum": " ".join(f"{sum(present):02d}"),
            }
            if task == "where":
                quadrant = pictures.QUADRANTS.index(" ".join(question.split()[3:5]))
                digit = picture.digits[quadrant]
                assert answer == ("none" if digit < 0 else str(digit))
            elif task == "exists":
                assert answer == ("yes" if int(question.split()[-1]) in present else "no")
            else:
                assert answer == expected[task]
        shown = {int(value) for value in picture.patches if value >= 0}
        assert shown == set(present)


def test_splits_share_no_digit_no_sum_and_no_crop():
    digits = {split: pictures._digits(split) for split in ("train", "validation", "test")}
    seen = {split: sum(len(images) for images in found.values()) for split, found in digits.items()}
    assert sum(seen.values()) == 1797
    sums = {}
    for split in digits:
        samples = data.draw_samples(0, split, ("arithmetic",), 300)
        sums[split] = {text(sample.prompt[-6:]) for sample in samples}
    assert not sums["train"] & sums["test"] and not sums["validation"] & sums["test"]
    for train, test in zip(pictures.photographs("train"), pictures.photographs("test"), strict=True):
        assert train.shape[1] >= pictures.PICTURE_SIZE and test.shape[1] >= pictures.PICTURE_SIZE


def test_a_seed_fixes_the_data():
    for first, second in zip(
        data.draw_samples(4, "test", data.TASKS, 14),
        data.draw_samples(4, "test", data.TASKS, 14),
        strict=True,
    ):
        assert first.prompt == second.prompt and np.array_equal(first.pixels, second.pixels)
    mix = {"pictures": 2, "small": 1, "read": 1, "pairs": 1, "texts": 2}
    first, second, other = (draw_training_batch(np.random.default_rng(seed), mix) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    assert not np.array_equal(first.ids, other.ids)
    assert first.ids.shape == (7, SEQUENCE_TOKENS) and len(first.pixels) == 6
    with pytest.raises(KeyError, match="films"):
        draw_training_batch(np.random.default_rng(0), {"films": 1})


def test_harder_pictures_are_read_in_order():
    rng = np.random.default_rng(0)
    for _ in range(20):
        dense = pictures.draw_dense_picture(rng, "train")
        question, answer = (text(ids) for ids in data.ask(rng, dense, "read"))
        assert answer == " ".join(map(str, dense.digits)) + " <end>"
        assert 8 <= len(dense.digits) <= 16 and len(question.split()) == data.QUESTION_TOKENS
        # Every digit is the one that some token in its cell of the grid shows.
        grid = dense.patches.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4)
        assert all(digit in cell for digit, cell in zip(dense.digits, grid, strict=False))
        pair = pictures.draw_picture(rng, "train"), pictures.draw_picture(rng, "train")
        question, answer = (text(ids) for ids in data.ask_pair(rng, pair))
        words = question.split()
        digit = pair[words[2] == "second"].digits[pictures.QUADRANTS.index(" ".join(words[3:5]))]
        assert answer == f"{'none' if digit < 0 else digit} <end>"
    small, read, both = data.draw_samples(5, "test", ("small", "read", "pair"), 3)
    assert len(small.prompt) == len(read.prompt) == data.PROMPT_TOKENS
    assert len(both.pictures) == 2 and len(both.prompt) == data.PROMPT_TOKENS + 66
    assert len(read.answer) <= data.READ_TOKENS


def test_easy_vqa_keeps_its_splits():
    pytest.importorskip("easy_vqa", reason="easy-vqa is not installed")
    from tiny_vlm import easy_vqa

    counts = {split: len(easy_vqa.pictures(split)) for split in ("train", "validation", "test")}
    assert counts == {"train": 3600, "validation": 400, "test": 1000}
    for sample in data.draw_samples(0, "test", easy_vqa.TASKS, 9):
        assert len(sample.prompt) == data.PROMPT_TOKENS - data.QUESTION_TOKENS + easy_vqa.QUESTION_TOKENS
        assert "<unknown>" not in text(sample.prompt) and len(sample.answer) == 2
        assert sample.pixels.shape == (128, 128, 3)


def test_a_question_among_several_is_seen_as_if_it_stood_alone():
    """The training layout: block attention and repeated positions give single-question logits."""
    model = tiny.build_model(0).eval()
    batch = draw_training_batch(np.random.default_rng(0), {"pictures": 1})
    prefix, end = len(data.PICTURE_PREFIX), VOCABULARY["<end>"]
    ends = [at + 1 for at, token in enumerate(batch.ids[0]) if at >= prefix and token == end]
    turns = list(pairwise([prefix, *ends]))
    assert len(turns) == len(TURNS)
    with torch.inference_mode():
        together = model(
            input_ids=torch.from_numpy(batch.ids),
            position_ids=torch.from_numpy(batch.positions).expand(3, -1, -1),
            attention_mask=torch.from_numpy(batch.attends)[:, None],
            **tiny.picture_inputs(batch.pixels),
        ).logits[0]
        for n in (0, 3, len(turns) - 1):
            rows = [*range(prefix), *range(*turns[n])]
            ids = torch.from_numpy(batch.ids)[:, rows]
            alone = model(
                input_ids=ids,
                position_ids=torch.arange(len(rows)).expand(3, 1, -1),
                **tiny.picture_inputs(batch.pixels),
            ).logits[0]
            torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=1e-4)


def test_the_tokenizer_reads_what_people_type():
    tokenizer = build_tokenizer()
    assert tokenizer.encode("what is at top left ?") == encode("what is at top left ?")
    assert tokenizer.encode("12+07=") == encode("1 2 + 0 7 =")
    assert tokenizer.unk_token_id in tokenizer.encode("zebra")


def test_own_pictures_are_cut_and_scaled(tmp_path):
    from PIL import Image

    Image.new("RGB", (300, 200), (255, 0, 0)).save(tmp_path / "red.png")
    pixels = tiny.open_picture(tmp_path / "red.png")
    assert pixels.shape == (128, 128, 3) and pixels[64, 64].tolist() == [255, 0, 0]
    inputs = tiny.picture_inputs([pixels])
    assert inputs["pixel_values"].shape == (256, 384) and inputs["image_grid_thw"].tolist() == [[1, 16, 16]]
