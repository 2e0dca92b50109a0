"""Megatron's routing trace as a recording, and back."""

import importlib.util
import json
import math

import pytest
import torch
import torch.distributed as dist

from macs import Recording
from macs_tools.common.traces import load_recordings, read_trace
from macs_tools.report import run as report


def line(**changes):
    record = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 2}
    return json.dumps(record | {"topk": 2, "top_indices": [[0, 5], [4, 1]]} | changes) + "\n"


def test_layers_are_numbered_in_order_and_those_that_guess_ahead_left_out(tmp_path):
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text(
        line() + "\n" + line(layer=1, top_indices=[[1, 2], [2, 3]]) + line(block="mtp", mtp_idx=0)
    )
    found = read_trace(path, experts=8)
    assert [(one.layer, one.step) for one in found.records] == [(1, 0), (0, 0)]
    assert found.records[0].experts.tolist() == [[0, 5], [4, 1]] and found.num_experts == 8
    assert read_trace(path, experts=6).num_experts == 6
    assert found.records[0].weights.tolist() == [[0.5, 0.5]] * 2 and not found.records[0].modality.any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no record of block 'decoder'"),
        ("{", ", line 1: .*JSONDecodeError"),
        ("[" * 100000, ", line 1: .*RecursionError"),
        ("[]", ", line 1: found no record"),
        (line(num_tokens=3), r"line 1: .*top_indices: found shape \(2, 2\), expected \(3, 2\)"),
        (line(top_indices=[0, 1, 2, 3]), "line 1: .*top_indices: found shape"),
        (line(top_indices=[[0, 1], [2]]), "line 1: .*inhomogeneous"),
        (line(top_indices=[[0, 1], [2, "x"]]), "line 1: .*could not convert"),
        (line(top_indices=[[0, 1], [2, 0.7]]), "line 1: .*top_indices: found a number that cannot be"),
        (line(top_indices=[[0, 1], [2, 65537]]), "line 1: .*top_indices: found a number that cannot be"),
        (line(step=None), "line 1: .*step: found 'None', expected a whole number"),
        (line(step=0.5), "line 1: .*step: found '0.5', expected a whole number"),
        (line(layer="3"), "line 1: .*layer: found '3', expected a whole number"),
        (line(macs_experts="6"), "line 1: .*macs_experts: found '6', expected a whole number"),
        (line(logit_offset=-2, logit_bytes=24), "line 1: .*logit_offset: found '-2', expected"),
        (line(macs_modality=[0, 256]), "line 1: .*macs_modality: found a number that cannot be"),
        (line(macs_modality=[0, 0.7]), "line 1: .*macs_modality: found a number that cannot be"),
        (line(macs_modality=[0, 1, 1]), r"line 1: .*macs_modality: found shape \(3,\), expected \(2,\)"),
        (line(macs_weights=[[1.0, -0.5]] * 2), "line 1: .*macs_weights: found a number that cannot be"),
        (line(macs_weights=[1.0, 0.5]), "line 1: .*macs_weights: found shape"),
        (line(macs_weights=[[1.0, math.nan]] * 2), "line 1: .*macs_weights: found a number that cannot be"),
        (line() + '{"step": 1}\n', "line 2: .*KeyError"),
        (line() + line(topk=3, top_indices=[[0, 1, 2]] * 2), "its records do not fit together"),
        (line(macs_modality=[0, 9]), "found modality ids outside 0..3"),
        (line() + line(macs_modality=[0, 1]), "do not fit together: 'macs_modality'"),
        (line(top_indices=[[0, 1], [2, 2]]), "found a token with an expert twice"),
        (line(top_indices=[[0, 9], [1, 2]]), "found experts outside -1..5"),
        (line(logit_offset=0, logit_bytes=24), "found logits in them, but no file"),
        (line(logit_offset=0, logit_bytes=24) + line(), "found logits in them, but no file"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path, text, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path, experts=6)


@pytest.mark.parametrize(
    ("places", "logits", "message"),
    [
        ([(0, 24), (24, 24)], torch.zeros(24), None),
        ([(0, 24), (40, 24)], torch.zeros(24), "ends before the logits of step 0"),
        ([(0, 64)], torch.zeros(24), "ends before the logits of step 0"),
        ([(0, 24), (24, 22)], torch.zeros(24), "its records do not fit together"),
        ([(0, 24), (24, 24)], torch.full((24,), math.nan), "found weights that are not finite"),
    ],
)
def test_logits_beside_a_trace_are_checked(tmp_path, places, logits, message):
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text("".join(line(logit_offset=first, logit_bytes=size) for first, size in places))
    (tmp_path / "logits_rank0.bin").write_bytes(logits.bfloat16().view(torch.int16).numpy().tobytes())
    if message is None:
        assert read_trace(path).num_experts == 6
        return
    with pytest.raises(ValueError, match=message):
        read_trace(path)


def test_how_many_experts_there_are_is_not_guessed(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(line())
    with pytest.raises(ValueError, match="and 5 as the largest index; expected --experts"):
        read_trace(path)


def test_a_second_call_in_a_step_is_a_step_of_its_own(tmp_path):
    """As of another microbatch: added up, two that are skewed each their own way would look even."""
    path = tmp_path / "trace.jsonl"
    calls = [line(top_indices=[[0, 1]] * 2), line(top_indices=[[4, 5]] * 2), line(step=1), line(step=1)]
    path.write_text("".join(calls))
    assert [one.step for one in read_trace(path, experts=6).records] == [0, 1, 2, 3]


def test_the_ranks_of_a_run_number_their_steps_alike(tmp_path):
    """Also where one of them called a layer twice in a step, and the others did not."""
    paths = [tmp_path / f"router_trace_rank{rank}.jsonl" for rank in range(2)]
    paths[0].write_text(line() + line() + line(step=1))
    paths[1].write_text(line() + line(step=1))
    steps = [[one.step for one in found.records] for found in load_recordings(paths, 6)]
    assert steps == [[0, 1, 2], [0, 2]]


def recorded():
    generator = torch.Generator().manual_seed(0)
    count, counts = 90, [40, 30, 20]
    return Recording(
        16,
        4,
        {
            "layers": torch.tensor([0, 1, 0], dtype=torch.int32),
            "steps": torch.tensor([0, 0, 1]),
            "counts": torch.tensor(counts),
            "experts": torch.rand(count, 16, generator=generator).topk(3).indices.short(),
            "weights": torch.rand(count, 3, generator=generator).half(),
            "modality": torch.randint(0, 2, (count,), generator=generator).to(torch.int8),
        },
    )


def test_a_recording_goes_there_and_back(tmp_path, capsys):
    first, there, back = (tmp_path / name for name in ("a.rank2.safetensors", "b.jsonl", "c.safetensors"))
    recorded().save(first)
    report.main([str(first), "--to", str(there)])
    record = json.loads(there.read_text().splitlines()[1])
    assert record["rank"] == 2 and record["layer"] == 1 and record["num_tokens"] == 30
    report.main([str(there), "--to", str(back)])
    expected, found = recorded(), Recording.load(back)
    assert (found.num_experts, found.num_ranks) == (16, 4)
    assert all(torch.equal(found.tensors[name], one) for name, one in expected.tensors.items())
    assert "3 records of 2 layers, 90 tokens, 51% of them visual" in capsys.readouterr().out


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None
    or importlib.util.find_spec("megatron.core.transformer.moe.router_trace") is None,
    reason="this Megatron has no routing trace",
)
@pytest.mark.parametrize("logits", [False, True])
def test_what_stock_megatron_wrote_is_read_and_reported(pool, tmp_path, logits):
    chosen = pool.run(routes_traced, 2, {"folder": str(tmp_path), "logits": logits})
    paths = [tmp_path / f"router_trace_rank{rank}.jsonl" for rank in range(2)]
    experts = [] if logits else ["--experts", "4"]
    found = load_recordings(paths, None if logits else 4)
    for mine, recording in zip(chosen, found, strict=True):
        found = [(one.layer, one.step, one.experts.tolist()) for one in recording.records]
        assert found == [tuple(one) for one in mine] and len(found) == 8
        assert (recording.num_experts, recording.top_k, recording.num_ranks) == (4, 2, 2)
        first = recording.records[0]
        if logits:
            best = first.scores.topk(2).indices.sort(1).values
            assert torch.equal(best, first.experts.sort(1).values)
            assert not torch.allclose(first.weights[:, 0], torch.tensor(0.5))
    page = tmp_path / "page.html"
    out = tmp_path / "found.json"
    files = ["--out", str(page), "--json", str(out)]
    report.main([*map(str, paths), *experts, "--sizes", "2", "4", "--shape", "tiny", *files])
    rows = json.loads(out.read_text())["rows"]
    assert [row["ranks"] for row in rows if row["policy"] == "macs 1.05"] == [2, 4]
    assert all(row["load"] <= 1.1 for row in rows if row["policy"] == "macs 1.05")
    assert "do not say which they are" in page.read_text() and "2 of 8 steps" not in page.read_text()


def routes_traced(folder, logits):
    """On a rank: stock Megatron's router tracer over two layers and some steps; what the routers chose."""
    from megatron.core.transformer.moe.router_trace import RouterTracer
    from support.megatron_ranks import Layout, batch_of, build_layer, drawn, layer_config, megatron_on

    rank, chosen = dist.get_rank(), []
    with megatron_on(Layout(2, ep=2)):
        layers = [build_layer(None, layer_config()) for _ in range(2)]
        layers[1].router.weight.copy_(drawn(5, layers[1].router.weight.shape) / 2)
        blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": layer}) for layer in layers)
        model = torch.nn.ModuleDict({"decoder": torch.nn.ModuleDict({"layers": blocks})})
        tracer = RouterTracer(folder, 100, rank, capture_logits=logits)
        tracer.register_hooks(model)
        for step in range(4):
            hidden, _ = batch_of(rank + 2 * step, 1, 4 if step == 3 else 80)
            for number, layer in enumerate(layers):
                _, routes = layer.router(hidden)
                chosen.append((number, step, routes.nonzero()[:, 1].view(-1, 2).tolist()))
        tracer.flush()
    return chosen
