"""The adapter over plain Hugging Face blocks: the smallest one, and what the contract is tried with."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
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


def test_requests_of_several_threads_are_planned_with_their_own_masks():
    """As in the pool of a web server: prompts of other shapes, and each other's answers alone."""
    model = build("qwen3_moe")
    runtime = Runtime(MACSConfig(**TIGHT), virtual_ranks=2)
    attach_plain(model, runtime)
    attach_modality(model, image_token_id=IMAGE_TOKEN)
    prompts = [token_ids(seed, rows=1 + seed % 3, length=16 + 4 * seed) for seed in range(4)]

    def answer(ids):
        with torch.inference_mode():
            return model(ids).logits

    expected = [answer(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, prompts * 12))
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 12, strict=True))


def test_a_switch_waits_for_the_pass_of_another_thread():
    """What a pass begins with it ends with: all layers of a step have one policy."""
    model = build("qwen3_moe")
    runtime = Runtime(MACSConfig(**TIGHT), virtual_ranks=2)
    attach_plain(model, runtime)
    attach_modality(model, image_token_id=IMAGE_TOKEN)
    seen, stop = [], threading.Event()
    runtime.on_plan(lambda event: seen.append((event.layer.index, event.layer.planner.policy.summary)))

    def switch():
        while not stop.is_set():
            runtime.use("token-drop", MACSConfig(**TIGHT))
            runtime.use("macs", MACSConfig(**TIGHT))

    thread = threading.Thread(target=switch)
    thread.start()
    with torch.inference_mode():
        for _ in range(60):
            model(IDS)
    stop.set()
    thread.join()
    layers = len(runtime.layers)
    assert layers == 2 and len(seen) == 60 * layers
    steps = [seen[first : first + layers] for first in range(0, len(seen), layers)]
    assert all(len({summary for _, summary in step}) == 1 for step in steps)
    assert len({step[0][1] for step in steps}) == 2
    remove = runtime.on_plan(lambda event: runtime.use("macs", MACSConfig(**TIGHT)))
    with pytest.raises(RuntimeError, match="found inside a forward pass, expected between two"):
        model(IDS)
    remove()


@pytest.mark.parametrize("placed", ["cpu", "disk"])
def test_weights_that_accelerate_keeps_elsewhere_are_fetched(placed, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    settings = MACSConfig(reroute="group", **TIGHT)
    with modality(IDS == IMAGE_TOKEN), torch.inference_mode():
        runtime = Runtime(settings, virtual_ranks=2)
        attach_plain(plain := build("qwen3_moe"), runtime)
        with runtime.calibration():
            plain(IDS)
        profile = runtime.measured_profile()
        runtime.use("macs", settings, profile)
        expected = plain(IDS).logits
        model = build("qwen3_moe")
        if placed == "cpu":
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
        assert moe_blocks(model)[0].gate.weight.is_meta
        attach_plain(model, Runtime(settings, profile=profile, virtual_ranks=2))
        assert torch.equal(model(IDS).logits, expected)


def test_gates_are_found_inside_wrappers():
    class Wrapper(nn.Module):
        """As PEFT's, around a layer whose parameter it trains."""

        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, hidden):
            return self.base_layer(hidden)

    model, stock = build("deepseek_v3"), build("deepseek_v3")
    for index, block in enumerate(moe_blocks(model)):
        if index:
            block.gate = Wrapper(block.gate)
        else:  # as FSDP2's
            block.gate.__class__ = type("FSDPGate", (type(block.gate),), {})
    with modality(IDS == IMAGE_TOKEN), torch.inference_mode():
        for one in (model, stock):
            attach_plain(one, Runtime(MACSConfig(**TIGHT), virtual_ranks=2))
        assert torch.equal(model(IDS).logits, stock(IDS).logits)


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
