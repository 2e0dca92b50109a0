"""Layers from transformer-engine's spec, and what its fused kernels must not be given."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from megatron_macs.dispatcher import keep_a_row

TESTS = Path(__file__).parents[1]
FOLDER = os.environ.get("MACS_TRANSFORMER_ENGINE")  # its Python alone, as CI unpacks it
HERE = importlib.util.find_spec("transformer_engine") is not None


@pytest.mark.skipif(not (FOLDER or HERE), reason="transformer-engine is not here")
@pytest.mark.skipif(
    importlib.util.find_spec("megatron.core.inference.config") is None,
    reason="this Megatron's specs need an older transformer-engine",
)
def test_layers_are_built_with_its_grouped_experts(program):
    done = program("-O", TESTS / "support" / "te_layers.py", *([FOLDER] if FOLDER else []))
    lines = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("LAYER ")]
    assert len(lines) == 5
    for line in lines:
        layer, experts, dispatcher, router, shared = line["parts"]
        assert (layer, experts) == ("MACSMoELayer", "TEGroupedMLP")
        assert (dispatcher, router) == ("MACSAlltoAllTokenDispatcher", "MACSTopKRouter")
        assert (shared != "NoneType") == ("moe_shared_expert_overlap" in line["changes"])


def test_a_fused_permutation_always_gets_a_row():
    """It asserts that there is one; a plan may drop them all."""
    chosen = torch.tensor([[False, True, False], [True, False, False]])
    probs = chosen * 0.5
    nothing = torch.zeros_like(chosen)
    kept, weights = keep_a_row(nothing, torch.zeros_like(probs), chosen)
    assert kept.tolist() == [[False, True, False], [False] * 3] and not weights.any()
    kept, weights = keep_a_row(chosen, probs, chosen)
    assert torch.equal(kept, chosen) and torch.equal(weights, probs)
    empty = torch.zeros(0, 3, dtype=torch.bool)
    assert keep_a_row(empty, empty.float(), empty)[0].shape == (0, 3)
