"""The router's scores, as every part of MACS means them."""

import pytest
import torch

from macs.steps.scoring import full_scores, within_groups


def test_other_score_functions_are_named():
    with pytest.raises(ValueError, match="score function: found 'relu', expected softmax or sigmoid"):
        full_scores(torch.randn(3, 4), "relu")


def test_only_the_groups_a_token_uses_keep_their_scores():
    scores = torch.ones(3, 6)
    found = within_groups(scores, torch.tensor([[0, 1], [1, 5], [2, -1]]), 3)
    assert found.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert within_groups(scores, torch.tensor([[0, 1]] * 3), None) is scores
