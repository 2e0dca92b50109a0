"""The plain adapter under threads and inside wrappers: accelerate, FSDP2, PEFT."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

from support.hf_models import IDS, IMAGE_TOKEN, TIGHT, build, moe_blocks, served, token_ids
from support.ranks import on_ranks

from macs import MACSConfig, Runtime, attach_modality, attach_plain, modality


def test_requests_of_several_threads_are_planned_with_their_own_masks():
    """As in the pool of a web server: prompts of other shapes, and each other's answers alone."""
    model, _ = served()
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
    model, runtime = served()
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


def profiled(settings):
    """The profile of a model whose weights are where they are used, and its answer with it."""
    model, runtime = build("qwen3_moe"), Runtime(settings, virtual_ranks=2)
    attach_plain(model, runtime)
    with runtime.calibration():
        model(IDS)
    profile = runtime.measured_profile()
    runtime.use("macs", settings, profile)
    return profile, model(IDS).logits


@pytest.mark.parametrize("placed", ["cpu", "disk"])
def test_weights_that_accelerate_keeps_elsewhere_are_fetched(placed, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    settings = MACSConfig(reroute="group", **TIGHT)
    with modality(IDS == IMAGE_TOKEN), torch.inference_mode():
        profile, expected = profiled(settings)
        model = build("qwen3_moe")
        if placed == "cpu":
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
        assert moe_blocks(model)[0].gate.weight.is_meta
        attach_plain(model, Runtime(settings, profile=profile, virtual_ranks=2))
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.engine
@on_ranks(2)
def test_weights_that_fsdp2_keeps_in_parts_are_put_together():
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP2")
    settings = MACSConfig(reroute="group", **TIGHT)
    with modality(IDS == IMAGE_TOKEN), torch.no_grad():
        profile, expected = profiled(settings)
        model = build("qwen3_moe")
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        for block in moe_blocks(model):
            fsdp.fully_shard(block.gate, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        assert type(moe_blocks(model)[0].gate.weight).__name__ == "DTensor"
        attach_plain(model, Runtime(settings, profile=profile, virtual_ranks=2))
        assert torch.equal(model(IDS).logits, expected)


def test_gates_are_found_inside_wrappers():
    class Wrapper(nn.Module):
        """As PEFT's, around a layer whose parameter it trains."""

        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        disable_adapters, merged, active_adapters = False, False, ()

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


def test_adapters_of_peft_on_routers_and_experts_are_part_of_the_model():
    """Merged or not, a model plans alike; taken off after merging, MACS stays on."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    names = ["mlp.gate.weight", "mlp.experts.gate_up_proj"]
    lora = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_parameters=names)
    settings = MACSConfig(reroute="group", **TIGHT)

    def served(model):
        runtime = Runtime(settings, virtual_ranks=4)
        attach_plain(model, runtime)
        return runtime

    with modality(IDS == IMAGE_TOKEN), torch.inference_mode():
        models = []
        for _ in range(2):
            torch.manual_seed(3)
            models.append(peft.get_peft_model(build("qwen3_moe"), lora).eval())
        adapted, merged = models[0], models[1].merge_and_unload().eval()
        runtime, other = served(adapted), served(merged)
        plans = []
        for one in (runtime, other):
            one.on_plan(lambda event: plans.append(event.plan.experts))
        found, expected = adapted(input_ids=IDS).logits, merged(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert len(plans) == 4 and all(map(torch.equal, plans[:2], plans[2:]))
        unloaded = adapted.merge_and_unload().eval()
        unloaded(input_ids=IDS)
        assert len(plans) == 6


class Threads(nn.Module):
    """As ``DataParallel``: calls the model inside from threads of its own."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *inputs):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(self.module, inputs))


def test_a_wrapper_may_call_the_model_from_threads_while_a_switch_waits():
    model = build("qwen3_moe")
    runtime = Runtime(MACSConfig(**TIGHT), virtual_ranks=2)
    attach_plain(model, runtime)
    outer = Threads(model)
    attach_modality(outer, image_token_id=IMAGE_TOKEN)
    entered = threading.Event()
    runtime.on_plan(lambda event: entered.set())

    def switch():
        entered.wait(30)
        runtime.use("macs", MACSConfig(target_load=0.6, min_tokens=0))

    thread = threading.Thread(target=switch)
    thread.start()
    with torch.inference_mode():
        first, second = outer(IDS, IDS[:2])
    thread.join(60)
    assert not thread.is_alive() and runtime.config.target_load == 0.6
    # Also where the planners were made in that pass, which the switch waited for.
    assert {layer.planner.config.target_load for layer in runtime.layers} == {0.6}
    assert first.logits.shape[0] == 4 and second.logits.shape[0] == 2
