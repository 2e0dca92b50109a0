"""Flags and the launcher: a script that knows nothing of MACS."""

import argparse
import re
import sys

import pytest
import torch
from support.workers import free_port

from macs import MACSConfig, Profile, Recording, Runtime
from macs.config import settings
from megatron_macs import add_macs_args, launch, runtime_from_args, tokens_from_args
from megatron_macs.options import macs_options


def parsed(*arguments):
    return add_macs_args(argparse.ArgumentParser()).parse_args(list(arguments))


def test_there_is_a_flag_with_help_for_every_setting():
    parser = add_macs_args(argparse.ArgumentParser())
    actions = {action.dest: action for action in parser._actions}
    for setting in settings():
        action = actions[f"moe_macs_{setting.name}"]
        assert f"--moe-macs-{setting.name.replace('_', '-')}" in action.option_strings
        assert setting.metadata["help"] in action.help and action.default is None


def test_flags_go_before_the_file_and_the_file_before_the_preset(tmp_path):
    path = tmp_path / "macs.yaml"
    path.write_text("preset: fast\ncapacity_factor: 1.5\nreroute: none\n")
    args = parsed("--moe-macs", "--moe-macs-config", str(path), "--moe-macs-capacity-factor", "1.25")
    expected = MACSConfig.preset("fast").updated(capacity_factor=1.25, reroute="none")
    assert macs_options(args).settings() == expected == runtime_from_args(args).config
    args = parsed(
        "--moe-macs", "--moe-macs-preset", "safe", "--no-moe-macs-spare-text", "--moe-macs-max-drop", "0.1"
    )
    assert macs_options(args).settings() == MACSConfig.preset("safe").updated(spare_text=False, max_drop=0.1)
    assert macs_options(parsed("--moe-macs", "--no-moe-macs-spare-text")).settings() == MACSConfig()


def test_without_the_flag_there_is_no_macs():
    assert runtime_from_args(parsed()) is None
    with pytest.raises(ValueError, match="found --moe-macs-capacity-factor without --moe-macs"):
        runtime_from_args(parsed("--moe-macs-capacity-factor", "2.0"))
    with pytest.raises(ValueError, match=r"config.capacity_factor: found -1.0"):
        runtime_from_args(parsed("--moe-macs", "--moe-macs-capacity-factor", "-1"))


def test_policies_and_tokens():
    args = parsed("--moe-macs", "--moe-macs-policy", "token-drop", "--moe-macs-image-token-id", "7")
    assert runtime_from_args(args).policy == "token-drop"
    assert tokens_from_args(args) == {"image_token_id": 7}


SCRIPT = """
import argparse, os, sys, urllib.request
import torch, torch.distributed as dist
from megatron.core import parallel_state
from megatron_macs import cpu_engine  # for want of a GPU, not for MACS
from support.megatron_ranks import language_model

parser = argparse.ArgumentParser()
parser.add_argument("--hidden-size", type=int, required=True)
parser.add_argument("--out", required=True)
arguments = parser.parse_args()
with cpu_engine(), torch.inference_mode():
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model = language_model(None, hidden_size=arguments.hidden_size)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    ids = torch.randint(0, 8, (2, 40), generator=torch.Generator().manual_seed(dist.get_rank()))
    mask = torch.ones(1, 1, 40, 40).triu(1).bool()
    logits = model(ids, torch.arange(40).expand_as(ids), mask)
    layer = model.decoder.layers[0].mlp
    found = {"logits": logits, "layer": type(layer).__name__}
    if hasattr(layer, "macs") and layer.macs.recorder.started:
        report = layer.macs.runtime.reports()[0]
        found["dropped"] = float(report.dropped.sum())
        found["visual"] = float(report.visual.sum())
    if "METRICS_PORT" in os.environ:
        port = int(os.environ["METRICS_PORT"]) + dist.get_rank()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            found["metrics"] = answer.read().decode()
    found["images"] = float((ids == 3).sum())
    torch.save(found, f"{arguments.out}.{dist.get_rank()}")
    dist.destroy_process_group()
    sys.exit(0)
"""


@pytest.fixture
def launched(torchrun, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*flags, module=("-m", "megatron_macs.launch"), script=("script.py",), **environment):
        done = torchrun(*module, *script, "--hidden-size", 16, *flags, "--out", "out", **environment)
        return done, [torch.load(tmp_path / f"out.{rank}") for rank in (0, 1)]

    return run


TIGHT = "--moe-macs --moe-macs-image-token-id 3 --moe-macs-capacity-factor 0.3 --moe-macs-reroute none"


def test_a_script_that_does_not_change_runs_with_macs(launched, tmp_path):
    _, stock = launched(module=())
    _, without = launched()
    roomy = "--moe-macs --moe-macs-image-token-id 3 --moe-macs-capacity-factor 1000".split()
    done, unbounded = launched(*roomy, script=("-m", "script"))
    assert done.stderr.count("MACS planned 2 times in 2 layers: kept 100.0%") == 1, done.stderr
    port = free_port(2)
    recorded = "--moe-macs-record", "routing.safetensors", "--moe-macs-metrics-port", port
    done, bounded = launched(*TIGHT.split(), *recorded, METRICS_PORT=str(port))
    assert "MACS planned 2 times in 2 layers: kept " in done.stderr
    for rank, found in enumerate(bounded):
        dropped = r'macs_assignments_total{action="dropped",layer="0",modality="\w+"} (\S+)'
        dropped = re.findall(dropped, found["metrics"])
        assert len(dropped) == 2 and sum(map(float, dropped)) == found["dropped"] > 0
        recording = Recording.load(tmp_path / f"routing.rank{rank}.safetensors")
        records = [(one.layer, one.step, len(one.modality)) for one in recording.records]
        assert records == [(0, 0, 80), (1, 0, 80)]
        assert (recording.num_experts, recording.num_ranks, recording.top_k) == (4, 2, 2)
        assert int((recording.records[0].modality > 0).sum()) == found["images"] == found["visual"] > 0
        assert without[rank]["layer"] == "MoELayer" and unbounded[rank]["layer"] == "MACSMoELayer"
        for same in (without, unbounded):
            assert torch.equal(same[rank]["logits"], stock[rank]["logits"])
        assert not torch.equal(found["logits"], stock[rank]["logits"])


def test_a_run_too_small_to_plan_is_said_to_be():
    said = launch.summary(Runtime(MACSConfig(min_tokens=1000)), [])
    assert "MACS planned nothing: no forward pass in eval() mode had min_tokens = 1000" in said


def test_a_script_that_does_not_change_calibrates(launched, tmp_path):
    flags = ("--moe-macs", "--moe-macs-image-token-id", "3", "--moe-macs-calibrate", "model.safetensors")
    _, found = launched(*flags)
    # The script closes its process group, so that each rank has a file of its own.
    parts = [Profile.load(tmp_path / f"model.rank{rank}.safetensors") for rank in (0, 1)]
    profile = Profile.merged(parts)
    assert profile.num_layers == 2 and int((profile.visual + profile.text).sum()) == 2 * 2 * 80 * 2
    assert int(parts[0].visual.sum()) == 2 * 2 * found[0]["images"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a script, or -m and a module, and its arguments"),
        (
            [__file__, "--moe-macs", "--moe-macs-capacity-factr", "2"],
            "did you mean --moe-macs-capacity-factor?",
        ),
        (["nothing.py"], "found no script 'nothing.py'"),
        ([__file__, "--moe-macs", "--moe-macs-level", "rnk"], "invalid choice: 'rnk'"),
        (
            [__file__, "--moe-macs", "--moe-macs-metrics-address", "0.0.0.0"],
            "config.macs.metrics_address: found '0.0.0.0', expected a metrics_port beside it",
        ),
        ([__file__, "--moe-macs", "--moe-macs-metrics-port", "70000"], "metrics_port: found 70000"),
        ([__file__, "--moe-macs-level", "rank"], "found --moe-macs-level without --moe-macs"),
    ],
)
def test_mistakes_are_refused_before_the_script_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        launch.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("code", ["", "0", "3"])
def test_a_script_without_moe_layers_gets_a_warning(tmp_path, monkeypatch, code):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "dense.py").write_text(f"import sys; sys.exit({code})\n")
    with pytest.raises((SystemExit, ValueError), match="the script built no MoE layer"):
        launch.main([str(tmp_path / "dense.py"), "--moe-macs"])
