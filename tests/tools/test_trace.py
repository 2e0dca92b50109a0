"""Megatron's routing trace as a recording, and back."""

import json
import subprocess
import sys

import pytest
import torch

from macs import Recording
from macs_tools.common.traces import load_recordings, read_trace, write_trace
from macs_tools.report import run as report


def line(**changes):
    record = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 2}
    return json.dumps(record | {"topk": 2, "top_indices": [[0, 5], [4, 1]]} | changes) + "\n"


def test_layers_are_numbered_in_order_and_those_that_guess_ahead_left_out(tmp_path):
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text(line() + line(layer=1, top_indices=[[1, 2], [2, 3]]) + line(block="mtp", mtp_idx=0))
    found = read_trace(path, experts=8)
    assert [(one.layer, one.step) for one in found.records] == [(1, 0), (0, 0)]
    assert found.records[0].experts.tolist() == [[0, 5], [4, 1]] and found.num_experts == 8
    assert read_trace(path, experts=6).num_experts == 6
    assert found.records[0].weights.tolist() == [[0.5, 0.5]] * 2 and not found.records[0].modality.any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no record of block 'decoder'"),
        ("{", "line 1 is no JSON"),
        (line() + line(topk=3), "step 0, layer 3: found 3 experts a token, expected 2"),
        (line(topk=0, top_indices=[[], []]), "found 0 experts a token, expected 1"),
        (line(num_tokens=3), "step 0, layer 3: found 2 tokens, expected 3"),
        (line(top_indices=[[0, 1], [2]]), "step 0, layer 3: found rows that are not of 2 numbers each"),
        (line(top_indices=[[0, 1], [2, "x"]]), "found something that is no number"),
        (line(top_indices=[[0, 1], [2, 0.7]]), "found an index that is no expert's"),
        (line(top_indices=[[0, 1], [2, 40000]]), "found an index that is no expert's"),
        (line(macs_weights=[[1.0, 0.0]]), "step 0, layer 3: found macs_weights of other tokens"),
        (line(macs_kinds=[0, "image"]), "found something else than int in macs_kinds"),
        (line(rank=None, logit_offset=0, logit_bytes=24), "no rank that says in which file"),
        (line() + '{"step": 1}\n', "line 2 has no layer"),
        (line(top_indices=[[0, 9], [1, 2]]), "found experts outside -1..5"),
        (line(logit_offset=0, logit_bytes=24), "no file"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path, text, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path, experts=6)


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
    report.main([str(there), "--to", str(back), "--ranks", "4"])
    expected, found = recorded(), Recording.load(back)
    assert (found.num_experts, found.num_ranks) == (16, 4)
    assert all(torch.equal(found.tensors[name], one) for name, one in expected.tensors.items())
    assert "3 records of 2 layers, 90 tokens, 51% of them visual" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    write_trace(recorded(), path)
    for arguments, message in (
        ([path, "--to", tmp_path / "b.jsonl"], "expected one .jsonl for a .safetensors, or one back"),
        ([tmp_path / "x.jsonl", "--to", tmp_path / "b.safetensors"], "found no file"),
    ):
        command = [sys.executable, "-m", "macs_tools", "report", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("logits", [False, True])
def test_what_stock_megatron_wrote_is_read_and_reported(pool, tmp_path, logits):
    pytest.importorskip(
        "megatron.core.transformer.moe.router_trace", reason="this Megatron has no routing trace"
    )
    chosen = pool.run("support.megatron_jobs:traced", 2, str(tmp_path), logits)
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
