"""Costs of GPUs: the fitted figures against measurements that are copied here, and whole prefills."""

import numpy as np
import pytest

from macs_tools import when
from macs_tools.common.cost_model import at_load
from macs_tools.common.workloads import SHAPES
from macs_tools.hardware.machine import ENGINES, GPUS, engine_figures, figures, machine, moe_ms
from macs_tools.hardware.prefill import MODELS, Machine, Prompts, served_prompts

SHAPE = SHAPES["qwen3-vl-30b-a3b"]
QWEN = MODELS["qwen3-vl-30b-a3b"]

# aiconfigurator-core 0.12.0, moe_perf: H100, bfloat16, D 2048, FFN 768, E 128, k 8, balanced, ms.
MEASURED = {
    ("trtllm", 1): {2048: 0.650, 16384: 2.692},
    ("trtllm", 8): {2048: 0.114, 16384: 0.400},
    ("vllm", 1): {2048: 0.600, 16384: 2.912},
    ("vllm", 8): {2048: 0.202, 16384: 1.124},
    ("sglang", 8): {2048: 0.221, 16384: 1.294},
}


@pytest.mark.parametrize(("engine", "ranks"), MEASURED)
def test_fitted_experts_take_what_was_measured(engine, ranks):
    key = f"{SHAPE.hidden}x{SHAPE.ffn}x{SHAPE.experts}x{SHAPE.top_k}"
    coefficients = engine_figures("h100", engine)["moe"]["bf16"][key]
    for tokens, expected in MEASURED[engine, ranks].items():
        assignments = tokens * SHAPE.top_k
        rows = np.full(SHAPE.experts // ranks, assignments / SHAPE.experts)
        found = float(moe_ms(coefficients, SHAPE.hidden, SHAPE.ffn, assignments, rows))
        assert found == pytest.approx(expected, rel=0.15)


def test_an_exchange_takes_what_was_measured():
    """DeepEP on 8 H100s, 20 SMs, D 2048, k 8: dispatch and combine of 1024 and 4096 tokens a rank."""
    model = machine("h100", "vllm", SHAPE)
    for tokens, both in ((1024, 0.0891 + 0.1144), (4096, 0.2631 + 0.3334)):
        even = np.full((8, 8), tokens * 8 / 8)
        assert 2 * model.exchange_ms(even, tokens) == pytest.approx(both, rel=0.15)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_machine_is_the_form_that_was_fitted(gpu, engine):
    """The layer's cost model and the fit's own formula give one time."""
    model = machine(gpu, engine, SHAPE)
    requested = at_load(SHAPE, 8, 1.7, 2048)
    found = model.layer(requested, tokens=2048)
    rows = requested.sum(0).reshape(8, -1)[0]
    received = model.copies(requested.reshape(8, 8, -1).sum(2), 2048).sum(0).max()
    key = f"{SHAPE.hidden}x{SHAPE.ffn}x{SHAPE.experts}x{SHAPE.top_k}"
    coefficients = engine_figures(gpu, engine)["moe"]["bf16"][key]
    expected = moe_ms(coefficients, SHAPE.hidden, SHAPE.ffn, 8 * received, rows)
    assert found.source + found.experts == pytest.approx(float(expected))
    assert "measurements of this shape" in model.origin and "guessed" in model.origin


def test_other_shapes_are_said_to_be_of_other_shapes():
    model = machine("b200", "trtllm", SHAPES["cpu"], "fp8")
    assert "other shapes" in model.origin and "of H100s" in model.origin
    assert model.expert_bytes == 3 * 1024 * 512


def test_the_figures_name_their_source():
    source = figures()["source"]
    assert source["package"] == "aiconfigurator-core" and source["licence"] == "Apache-2.0"
    for gpu in GPUS:
        for engine in ENGINES:
            for terms in engine_figures(gpu, engine)["moe"]["bf16"].values():
                assert len(terms) == 5 and min(terms) > 0


def test_a_prefill_is_its_parts():
    prompts = served_prompts(16384)
    assert prompts.tokens == 16384 and (prompts.text, prompts.visual, prompts.images) == (572, 870, 2)
    host = Machine("h100", "vllm", QWEN)
    today = host.prefill(prompts, 8, 2.0)
    assert today.total == pytest.approx(today.vision + today.attention + today.moe + today.exchange)
    balanced, limited = host.prefill(prompts, 8, 1.0), host.prefill(prompts, 8, 2.0, 1.05)
    assert balanced.moe < limited.moe < today.moe
    assert balanced.attention == limited.attention == today.attention
    below, estimated = (host.prefill(prompts, 8, 2.0, 0.6, rank) for rank in (0, 16))
    assert below.moe == estimated.moe < balanced.moe and estimated.planning > below.planning
    # Nothing over the limit: as it is, and a plan.
    loose = host.prefill(prompts, 8, 2.0, 2.5)
    assert loose.total == pytest.approx(today.total + loose.planning) and loose.planning > 0
    pruned = host.prefill(prompts.pruned(0.5), 8, 2.0, encoded=prompts)
    assert pruned.vision == today.vision and pruned.attention < today.attention
    assert host.prefill(Prompts(4, 1000, 0), 8, 1.0).vision == 0


def test_what_to_do_first_changes_no_answer():
    host = Machine("h100", "vllm", QWEN)
    today = host.prefill(served_prompts(4096), 8, 1.0)
    gains = {"balanced": 0.2, "macs": 0.4, "pruned": 0.3}
    assert when.first(today, gains) == "EPLB, then MACS"
    assert when.first(today, gains | {"macs": 0.22}) == "EPLB"
    assert when.first(today, gains | {"balanced": 0.01}) == "tune MACS, or prune"
    assert when.first(today, dict.fromkeys(gains, 0.01)) == "none of these"
    pictures = host.prefill(Prompts(2, 16, 64, 1), 8, 1.0, encoded=Prompts(2, 16, 4096, 1))
    assert when.first(pictures, gains) == "move the encoder"


def test_the_table_of_cases(capsys):
    flags = "--models all --sizes 8 32 --loads 1.2 2 --tokens 4096".split()
    assert len(list(when.rows(when.parse_arguments(flags)))) == 2 * (4 + 3)  # 32 divides not all experts
    when.main(flags)
    shown = capsys.readouterr().out
    assert "aiconfigurator-core 0.12.0" in shown and "kimi-vl-a3b" in shown
    when.main(["--engines", "all"])
    assert "TensorRT-LLM" in capsys.readouterr().out
    with pytest.raises(ValueError, match="found no case, expected EP sizes that divide"):
        when.main(["--sizes", "7"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loads 0.9", "--loads: found 0.9, expected 1 or more"),
        ("--keep 1.5", "--keep: found 1.5, expected at most 1"),
        ("--tokens 0", "--tokens: found 0, expected more than 0"),
        ("--compensation-rank -1", "--compensation-rank: found -1, expected 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        when.main(flags.split())
    assert message in capsys.readouterr().err
