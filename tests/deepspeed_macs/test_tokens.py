"""Which token is which, and which expert is in service, in models under AutoEP."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from contextlib import nullcontext

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from support import hf_models
from support.cases import events_of
from support.deepspeed_ranks import autoep_engine, logits_of, on_deepspeed

import macs

IDS = hf_models.token_ids(0)
MASK = torch.ones_like(IDS)
MASK[:, :8] = 0
IDS = IDS.masked_fill(MASK == 0, 0)
GIVEN = {
    "mask": {"attention_mask": MASK},
    "ones": {"attention_mask": torch.ones_like(MASK)},
    "embeddings": {"attention_mask": MASK},
    "nothing": {},
}
TEXT = {"image_token_id": None}


@pytest.mark.parametrize(
    ("name", "block", "given"),
    [
        (name, {**TEXT, **block}, given)
        for name in ("mixtral", "qwen3_moe")
        for block, given in (
            ({}, "mask"),  # by policies that need no visual tokens
            ({"modality": "text"}, "mask"),
            ({"modality": "text", "policy": "macs"}, "embeddings"),
            ({"padding_token_id": 0}, "nothing"),
            ({"modality": "manual"}, "mask"),
        )
    ]
    + [
        ("qwen3_vl_moe", {}, "mask"),
        ("qwen3_vl_moe", {"padding_token_id": 0}, "nothing"),
        ("qwen3_vl_moe", {"padding_token_id": 0}, "ones"),  # what comes with the call takes precedence
        ("qwen3_vl_moe", {"modality": "manual"}, "mask"),
        ("qwen3_vl_moe", {"modality": "manual"}, "embeddings"),
    ],
)
@on_deepspeed(1)
def test_padding_is_found(name, block, given):
    engine = autoep_engine(name, {"policy": "token-drop", "capacity_factor": 1.0, **block})
    events = events_of(engine.macs)
    inputs = {"input_ids": IDS}
    if given == "embeddings":
        inputs = {"inputs_embeds": engine.module.get_input_embeddings()(IDS)}
    visual = name == "qwen3_vl_moe"
    by_hand = visual and block.get("modality") == "manual"
    with macs.modality(IDS == hf_models.IMAGE_TOKEN) if by_hand else nullcontext():
        engine(use_cache=False, **inputs, **GIVEN[given])
    tokens = events[0].tokens
    real = torch.ones_like(MASK) if given == "ones" else MASK
    assert torch.equal(tokens.valid.view(IDS.shape), real.bool())
    assert int(engine.macs.reports()[0].tokens[0]) == int(real.sum())
    assert (int(tokens.visual.sum()) > 0) == visual


@pytest.mark.parametrize("policy", ["macs", "rank-balanced", "expanded-drop"])
@on_deepspeed(2)
def test_experts_that_a_bias_takes_out_get_no_token(policy):
    block = {"policy": policy, "capacity_factor": 1.0, "level": "rank", "reroute": "group"}
    engine = autoep_engine("glm4_moe", block)
    layers = [one for one in engine.modules() if isinstance(one, AutoEPMoELayer)]
    for layer in layers:
        layer.router.e_score_correction_bias.data[5:] = -1e4
    events = events_of(engine.macs)
    logits_of(engine, hf_models.token_ids(0))
    assert len(layers) == len(events) == 1 and (events[0].plan.experts < 5).all()
    assert events[0].plan.rerouted.any() or policy == "expanded-drop"


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe"])
@on_deepspeed(1)
def test_router_logits_are_put_out(name):
    """``output_router_logits``, as Hugging Face's own."""
    arguments = {"input_ids": hf_models.token_ids(0), "use_cache": False, "output_router_logits": True}
    expected = hf_models.build(name)(**arguments).router_logits
    found = autoep_engine(name, {"capacity_factor": 1e6})(**arguments).router_logits
    assert len(found) == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
