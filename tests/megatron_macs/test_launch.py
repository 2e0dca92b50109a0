"""Flags and the launcher: a script that knows nothing of MACS."""

import argparse
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from support.workers import free_port

from macs import MACSConfig, Profile, Recording
from macs.config import settings
from megatron_macs import add_macs_args, runtime_from_args, tokens_from_args
from megatron_macs.options import macs_options

ROOT = Path(__file__).parents[2]


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
import argparse, logging, os, sys, urllib.request, warnings
warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
import torch, torch.distributed as dist
from contextlib import nullcontext
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

parser = argparse.ArgumentParser()
parser.add_argument("--hidden-size", type=int, required=True)
parser.add_argument("--out", required=True)
arguments = parser.parse_args()
from megatron_macs import cpu_engine  # for want of a GPU, not for MACS

with cpu_engine(), torch.inference_mode():
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    config = TransformerConfig(
        num_layers=2, hidden_size=arguments.hidden_size, num_attention_heads=2, num_moe_experts=4,
        moe_router_topk=2, moe_router_load_balancing_type="none", moe_ffn_hidden_size=8,
        moe_router_dtype="fp32", moe_token_dispatcher_type="alltoall", normalization="RMSNorm",
        expert_model_parallel_size=dist.get_world_size(), add_bias_linear=False,
        use_cpu_initialization=True, attention_backend=AttnBackend.local, hidden_dropout=0.0,
        attention_dropout=0.0, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    model = GPTModel(
        config, spec, vocab_size=32, max_sequence_length=64, position_embedding_type="rope",
        parallel_output=False,
    ).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
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


def launched(folder, name, *flags, module=True, by_name=False, **environment):
    import torch

    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    out = folder / name
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port())] + (["-m", "megatron_macs.launch"] if module else [])
    command += ["-m", "script"] if by_name else [str(script)]
    command += ["--hidden-size", "16", *flags, "--out", str(out)]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    results = [torch.load(f"{out}.{rank}") for rank in (0, 1)] if done.returncode == 0 else []
    return done, results


def test_a_script_that_does_not_change_runs_with_macs(tmp_path):
    import torch

    _, stock = launched(tmp_path, "stock", module=False)
    _, without = launched(tmp_path, "without")
    roomy = ("--moe-macs", "--moe-macs-image-token-id", "3", "--moe-macs-capacity-factor", "1000")
    _, unbounded = launched(tmp_path, "unbounded", *roomy)
    tight = (*roomy[:3], "--moe-macs-capacity-factor", "0.3", "--moe-macs-reroute", "none")
    recorded = tmp_path / "routing.safetensors"
    port = str(free_port(2))
    served = ("--moe-macs-metrics-port", port)
    done, bounded = launched(
        tmp_path, "bounded", *tight, "--moe-macs-record", str(recorded), *served, METRICS_PORT=port
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        dropped = re.findall(
            r'macs_assignments_total{action="dropped",layer="0",modality="\w+"} (\S+)',
            bounded[rank]["metrics"],
        )
        assert len(dropped) == 2 and sum(map(float, dropped)) == bounded[rank]["dropped"]
    for rank in (0, 1):
        recording = Recording.load(tmp_path / f"routing.rank{rank}.safetensors")
        assert [(one.layer, one.step, len(one.modality)) for one in recording.records] == [
            (0, 0, 80),
            (1, 0, 80),
        ]
        assert (recording.num_experts, recording.num_ranks, recording.top_k) == (4, 2, 2)
        assert int((recording.records[0].modality > 0).sum()) == bounded[rank]["images"]
    for rank in (0, 1):
        assert without[rank]["layer"] == "MoELayer" and unbounded[rank]["layer"] == "MACSMoELayer"
        assert torch.equal(without[rank]["logits"], stock[rank]["logits"])
        assert torch.equal(unbounded[rank]["logits"], stock[rank]["logits"])
        assert bounded[rank]["dropped"] > 0 and unbounded[rank]["dropped"] == 0
        assert not torch.equal(bounded[rank]["logits"], stock[rank]["logits"])
        assert bounded[rank]["visual"] == bounded[rank]["images"] > 0
    assert "MACS planned 2 times in 2 layers: kept " in done.stderr


def test_a_module_by_its_name_and_a_run_too_small_to_plan(tmp_path):
    flags = ("--moe-macs", "--moe-macs-min-tokens", "1000")
    done, found = launched(tmp_path, "small", *flags, by_name=True)
    assert done.returncode == 0 and found[0]["layer"] == "MACSMoELayer"
    nothing = "MACS planned nothing: no forward pass in eval() mode had min_tokens = 1000"
    assert done.stderr.count(nothing) == 1


def test_a_script_that_does_not_change_calibrates(tmp_path):
    out = tmp_path / "model.safetensors"
    flags = ("--moe-macs", "--moe-macs-image-token-id", "3", "--moe-macs-calibrate", str(out))
    done, found = launched(tmp_path, "calibrated", *flags)
    assert done.returncode == 0, done.stderr
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
def test_mistakes_are_refused_before_the_script_runs(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_macs.launch", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("code", ["", "0", "3"])
def test_a_script_without_moe_layers_gets_a_warning(tmp_path, code):
    script = tmp_path / "dense.py"
    script.write_text(f"import sys; sys.exit({code})\n")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_macs.launch", str(script), "--moe-macs"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "the script built no MoE layer" in done.stderr
