"""The benchmark: real layers on real processes, at the smallest size; what it counts, checks and refuses."""

import json
import os

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
from macs_tools.bench import arguments as bench_arguments


def benchmark(program, folder, *arguments):
    done = program("-m", "macs_tools", "bench", *arguments, "--json", "out.jsonl")
    return json.loads((folder / "out.jsonl").read_text()), done.stdout


def test_layers_side_by_side(program, tmp_path):
    flags = "layer --shape tiny --workloads image-flood --steps 1 --repeats 2 --ladder 1.3".split()
    policies = ["--policies", "token drop", "expanded drop", "macs", "macs, nothing over"]
    files = ["--save-cost-model", "costs.json"]
    found, shown = benchmark(program, tmp_path, *flags, *policies, *files)
    rows = {row["policy"]: row for row in found["rows"]}
    assert list(rows) == ["vanilla", *policies[1:], "token drop 1.3", "expanded drop 1.3", "macs 1.3"]
    assert all(row["ms"] > 0 and row["share"] > 0 for row in rows.values())
    assert rows["vanilla"]["ratio"] == rows["vanilla"]["ideal"] == 1
    assert rows["macs"]["load_after"] <= 1.06 < rows["vanilla"]["load_after"]
    assert rows["macs"]["ideal"] == pytest.approx(rows["macs"]["load_after"] / rows["vanilla"]["load_after"])
    assert rows["token drop"]["load_after"] < rows["token drop 1.3"]["load_after"] <= 1.31
    assert rows["token drop"]["rerouted"] == rows["macs"]["rerouted"] == 0 < rows["macs"]["dropped"]
    for name in ("ideal", "load_after", "dropped", "kept_mass"):
        assert rows["macs, nothing over"][name] == rows["vanilla"][name]
    same = found["under_capacity"]
    assert same["same_collectives"] and same["same_bits"] and same["stock"]["alltoall_base_"] >= 2
    assert same["stock"] == same["macs"] and len(same["stock"]) >= 4
    assert set(found["cost_model"]["planner_ms"]) == set(rows) - {"vanilla"}
    assert found["machine"]["megatron"] and found["shape"]["experts"] == 16
    assert "costs.json" in os.listdir(tmp_path)
    assert "output bit for bit the same" in shown.replace("\n", " ")


def test_the_planner_alone(program, tmp_path):
    flags = "planner --shape tiny --tokens 512 --repeats 1 --policies macs".split()
    found, _ = benchmark(program, tmp_path, *flags)
    macs = found["policies"]["macs"]
    assert macs["ms"] > 0 and sum(macs["parts"].values()) > 0


def test_wrong_output_is_not_timed(program):
    """A policy whose layer does not compute its plan has no time, and the run fails."""
    flags = "layer --shape tiny --ranks 1 --workloads uniform --steps 1 --repeats 1".split()
    flags += ["--policies", "macs", "token drop"]
    code = (
        "from macs_tools.bench import layer, run\n"
        "real = layer.Side.__call__\n"
        "def wrong(side, *given):\n"
        "    return real(side, *given) + 0.1 * (side.runtime.policy == 'token-drop')\n"
        "layer.Side.__call__ = wrong\n"
        "import torch\n"
        "torch.multiprocessing.spawn = lambda work, given, nprocs: work(0, *given)\n"
        f"run.main({flags})\n"
    )
    done = program("-c", code, status=1)
    assert "some output was wrong" in done.stderr
    assert done.stdout.count("not timed: wrong") == 1 and "token drop │ not timed: wrong" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["layer", "--policies", "mac"], "--policies: found 'mac', expected some of vanilla"),
        (["layer", "--shape", "huge"], "invalid choice: 'huge'"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["layer", "--ranks", "3"], "--ranks: found 3, expected a divisor of the 64 experts"),
        (["layer", "--repeats", "0"], "--repeats: found 0, expected more than 0"),
        (["planner", "--recordings", "x"], "--recordings: found mode planner, expected layer"),
    ],
)
def test_mistakes_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench_arguments.parse_arguments(flags)
    assert message in capsys.readouterr().err
