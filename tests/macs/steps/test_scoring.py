"""The router's scores, as every part of MACS means them."""

import pytest
import torch

from macs.steps.scoring import candidate_scores

NONE = torch.zeros(3, 1, dtype=torch.int64)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_scores_are_float32_of_any_logits(name):
    logits = torch.randn(3, 4).bfloat16()
    expected = logits.float().softmax(-1) if name == "softmax" else logits.float().sigmoid()
    assert torch.equal(candidate_scores(logits, NONE, name), expected)


def test_other_score_functions_are_named():
    with pytest.raises(ValueError, match="score function: found 'relu', expected softmax or sigmoid"):
        candidate_scores(torch.randn(3, 4), NONE, "relu")


def test_only_the_groups_a_token_uses_keep_their_scores():
    experts = torch.tensor([[0, 1], [1, 5], [2, -1]])
    found = candidate_scores(torch.zeros(3, 6), experts, "sigmoid", None, 3, 2)
    assert (2 * found).tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]
