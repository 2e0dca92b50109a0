"""The adapter over plain Hugging Face blocks: the smallest one, and what the contract is tried with."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

from support.hf_models import IMAGE_TOKEN, build, token_ids

from macs import MACSConfig, Runtime, attach_modality, attach_plain, modality

MODELS = ["mixtral", "qwen3_moe", "qwen3_moe, weights not normalised", "qwen3_vl_moe", "deepseek_v3", "kimi"]
IDS = token_ids(0, rows=4, length=24)
TIGHT = {"target_load": 0.7, "min_tokens": 0}


def ran(model, block):
    """What a block of the model was given and made of it, in a forward pass over ``IDS``."""
    found = {}
    hook = block.register_forward_hook(lambda module, args, output: found.update(given=args[0], made=output))
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(IDS)
        language = getattr(model.model, "language_model", model.model)
        language(inputs_embeds=embedded)
    hook.remove()
    return found


def moe_blocks(model):
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]


def by_hand(block, given, plan):
    """The planned experts of a block, one assignment after the other."""
    flat = given.reshape(-1, given.shape[-1])
    made = torch.zeros_like(flat)
    for slot in range(plan.experts.shape[1]):
        for token in (plan.experts[:, slot] >= 0).nonzero()[:, 0].tolist():
            expert = int(plan.experts[token, slot])
            up = block.experts.gate_up_proj[expert]
            up, down = (up, block.experts.down_proj[expert])
            gate, value = (flat[token] @ up.T).chunk(2)
            made[token] += plan.weights[token, slot] * ((block.experts.act_fn(gate) * value) @ down.T)
    if hasattr(block, "shared_experts"):
        made = made + block.shared_experts(flat)
    return made.view_as(given)


@pytest.mark.parametrize("name", MODELS)
def test_with_nothing_over_capacity_the_output_is_the_models_own_bit_for_bit(name):
    model = build(name)
    block = moe_blocks(model)[0]
    stock = ran(model, block)["made"]
    runtime = Runtime(MACSConfig(capacity_factor=1e6, min_tokens=0), virtual_ranks=4)
    undo = attach_plain(model, runtime)
    with modality(IDS == IMAGE_TOKEN):
        assert torch.equal(ran(model, block)["made"], stock)
        assert runtime.reports()[0].planned.sum() == 4
        runtime.use("macs", MACSConfig(**TIGHT))
        assert not torch.equal(ran(model, block)["made"], stock)
    undo()
    assert torch.equal(ran(model, block)["made"], stock) and not any(
        getattr(one, "macs", None) for one in moe_blocks(model)
    )


@pytest.mark.parametrize("policy", ["macs", "token-drop", "expanded-drop"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "internvl"])
def test_the_block_computes_what_was_planned(name, policy):
    model = build(name)
    block = moe_blocks(model)[0]
    runtime = Runtime(MACSConfig(**TIGHT), policy=policy, virtual_ranks=4)
    attach_plain(model, runtime)
    plans = []
    planner = block.macs.planner
    plan = planner.plan
    planner.plan = lambda *args, **named: plans.append(plan(*args, **named)) or plans[-1]
    with modality(IDS == IMAGE_TOKEN):
        found = ran(model, block)
    assert int((plans[0].experts < 0).sum()) > 0
    with torch.inference_mode():
        expected = by_hand(block, found["given"], plans[0])
    torch.testing.assert_close(found["made"], expected, rtol=1e-4, atol=1e-5)
    load = float(runtime.reports()[0].load("after"))
    assert load <= 0.75 or policy == "expanded-drop"


def test_the_mask_comes_with_the_call():
    model = build("qwen3_moe")
    runtime = Runtime(MACSConfig(**TIGHT), virtual_ranks=2)
    attach_plain(model, runtime)
    attach_modality(model, image_token_id=IMAGE_TOKEN)
    with torch.inference_mode():
        model(IDS)
    assert int(runtime.reports()[0].visual.sum()) == int((IDS == IMAGE_TOKEN).sum())


def test_training_and_small_steps_are_the_models_own():
    model = build("qwen3_moe")
    runtime = Runtime(MACSConfig(target_load=0.7), virtual_ranks=2)
    attach_plain(model, runtime)
    with modality(IDS == IMAGE_TOKEN):
        model.train()
        model(IDS)
        model.eval()
        with torch.inference_mode():
            model(IDS[:, :3])
    assert not any(layer.recorder.started for layer in runtime.layers)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.Linear(4, 4)


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="found a gate of Linear in 0, expected one of MixtralTopKRouter"):
        attach_plain(nn.Sequential(Unknown()), Runtime())
    with pytest.raises(ValueError, match="found no MoE block in Sequential"):
        attach_plain(nn.Sequential(nn.Linear(2, 2)), Runtime())
    model = build("mixtral")
    attach_plain(model, Runtime())
    with pytest.raises(ValueError, match="has MACS already"):
        attach_plain(model, Runtime())
