"""The adapter over plain Hugging Face blocks: the smallest one, and what the contract is tried with."""

import copy
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from support.estimates import check_added, profile_of
from support.hf_models import IDS, IMAGE_TOKEN, TIGHT, build, moe_blocks, served

from macs import MACSConfig, Runtime, attach_modality, attach_plain, modality

MODELS = [
    *("mixtral", "qwen3_moe", "qwen3_moe, weights not normalised", "qwen3_vl_moe", "qwen3_omni"),
    *("deepseek_v3", "kimi"),
]


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
def test_estimates_of_what_is_dropped_are_added(name):
    model = build(name)
    block = moe_blocks(model)[0]
    config = MACSConfig(**TIGHT)
    runtime = Runtime(config, virtual_ranks=4)
    attach_plain(model, runtime)
    routers = [layer.adapter.router_weight() for layer in runtime.layers]
    with modality(IDS % 3 > 0):
        profile = profile_of(routers, runtime.layers[0].top_k)
        check_added(runtime, config, profile, lambda: ran(model, block)["made"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_compensates_by_itself(copied):
    model = build("qwen3_moe")
    runtime = Runtime(MACSConfig(**TIGHT, compensation="none"), virtual_ranks=4)
    attach_plain(model, runtime)
    profile = profile_of([layer.adapter.router_weight() for layer in runtime.layers], runtime.layers[0].top_k)
    outputs = []
    for scope in ("none", "all"):
        for one in (model, copied(model)):
            block = moe_blocks(one)[0]
            block.macs.runtime.use("macs", MACSConfig(**TIGHT, compensation=scope), profile)
            with modality(IDS % 3 > 0):
                outputs.append(ran(one, block)["made"])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[2])


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


def test_a_dropped_assignment_is_not_computed():
    """Expert 0 is broken, and out of service by its bias: whatever it would give, it is not in the answer."""
    model = build("deepseek_v3")
    block = moe_blocks(model)[0]
    with torch.no_grad():
        block.gate.e_score_correction_bias[0] = -1e4
        block.experts.down_proj[0] = math.inf
    runtime = Runtime(MACSConfig(**TIGHT), virtual_ranks=4)
    attach_plain(model, runtime)
    with modality(IDS == IMAGE_TOKEN):
        found = ran(model, block)["made"]
    assert runtime.reports()[0].share("dropped") > 0.1 and bool(found.isfinite().all())


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_experts_that_would_compute_what_is_dropped_are_refused(implementation):
    model = build("qwen3_moe")
    undo = attach_plain(model, runtime := Runtime(MACSConfig(**TIGHT)))
    model.set_experts_implementation(implementation)
    skips = implementation == "eager" and transformers.__version__ >= "5.24"
    expected = (
        nullcontext() if skips else pytest.raises(ValueError, match=f"found experts_impl.*{implementation}")
    )
    with modality(IDS == IMAGE_TOKEN), torch.inference_mode():
        with expected:
            model(IDS)
        runtime.enabled = False
        model(IDS)
    undo()
    with expected:
        attach_plain(model, Runtime())


def test_experts_that_are_divided_among_processes_are_refused():
    model = build("qwen3_moe")
    experts = moe_blocks(model)[0].experts
    experts.down_proj = nn.Parameter(experts.down_proj[:4].clone())
    with pytest.raises(ValueError, match="divided among processes, as in transformers' expert parallelism"):
        attach_plain(model, Runtime())


def test_generate_reads_its_mask_behind_the_cache():
    """Whatever transformers calls the cache: a token of a left-padded row is one in decoding, too."""
    model, runtime = served(config=MACSConfig(capacity_factor=1e6, min_tokens=0))
    valid, visual = [], []
    runtime.layers[0].on_plan(lambda event: valid.append(int(event.tokens.valid.sum())))
    runtime.layers[0].on_plan(lambda event: visual.append(int(event.tokens.visual.sum())))
    mask = torch.ones_like(IDS)
    mask[0, :9] = mask[1, :3] = 0
    model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert valid == [int(mask.sum()), 4, 4, 4] and visual[0] == int((IDS == IMAGE_TOKEN)[mask == 1].sum())


def test_the_hook_follows_a_model_to_another_runtime():
    model = build("qwen3_moe")
    first, second = (Runtime(MACSConfig(**TIGHT), virtual_ranks=2) for _ in range(2))
    undo = attach_plain(model, first)
    attach_modality(model, image_token_id=IMAGE_TOKEN)
    with torch.inference_mode():
        model(IDS)
        undo()
        attach_plain(model, second)
        second.on_plan(lambda event: second.use("vanilla"))
        with pytest.raises(RuntimeError, match=r"Runtime.use: found inside a forward pass"):
            model(IDS)
    copied = pickle.loads(pickle.dumps(second))
    copied.use("vanilla")  # which no pass of another process holds up


def test_padding_of_a_model_of_text_alone_is_read():
    model = build("mixtral")
    runtime = Runtime(MACSConfig(**TIGHT), virtual_ranks=2)
    attach_plain(model, runtime)
    with pytest.raises(ValueError, match="text_only=True for a model that has nothing else"):
        attach_modality(model)
    attach_modality(model, text_only=True)
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    with torch.inference_mode():
        model(IDS, attention_mask=mask)
    assert int(runtime.reports()[0].tokens.sum()) == int(mask.sum())


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
