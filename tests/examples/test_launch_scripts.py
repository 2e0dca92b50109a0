"""The launch scripts: what they would run, and that Megatron and MACS know every flag of it."""

import argparse
import importlib.util
import os
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
SCRIPTS_OWN = {"--num-tokens-to-generate", "--prompts"}  # of Megatron-LM's examples/inference
FAKES = {
    "torchrun": 'printf "%s\\n" torchrun "$@"',
    "srun": 'printf "%s\\n" srun; exec "$@"',
    "scontrol": "printf 'node-a\\nnode-b\\n'",
}


@pytest.fixture
def commanded(program, tmp_path):
    """The words of the command a launch script ends in, and what it prints on stderr."""
    for name, body in FAKES.items():
        fake = tmp_path / name
        fake.write_text(f"#!/usr/bin/env bash\n{body}\n")
        fake.chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MEGATRON_LM": "/megatron"}
    given["CHECKPOINT"] = "/checkpoint"

    def run(script, *arguments, **environment):
        words = LAUNCH / script, *arguments
        done = program(*words, executable="bash", status=None, **{**given, **environment})
        return done.stdout.splitlines(), done.stderr

    return run


SLURM = {
    "SLURM_JOB_NODELIST": "node-[a-b]",
    "SLURM_NNODES": "4",
    "SLURM_JOB_ID": "7",
    "SLURM_SUBMIT_DIR": str(LAUNCH),
}
LAYOUTS = [
    ("one_node.sh", {}, ("1", "1", "8")),
    ("one_node.sh", {"TP": "2", "EP": "8"}, ("2", "1", "8")),
    ("slurm.sbatch", {**SLURM, "EP": "8"}, ("1", "1", "8")),
    ("slurm.sbatch", {**SLURM, "TP": "2", "EP": "8"}, ("2", "1", "8")),
    ("slurm.sbatch", {**SLURM, "PP": "2", "EP": "16"}, ("1", "2", "16")),
]


@pytest.mark.parametrize(("script", "environment", "layout"), LAYOUTS)
def test_launch_scripts_run_the_launcher_under_torchrun(commanded, script, environment, layout):
    words, _ = commanded(script, "--moe-macs-level", "rank", **environment)
    assert (words[0] == "srun") == script.endswith("sbatch") and "torchrun" in words[:2]
    assert words[words.index("-m") + 1] == "megatron_macs.launch"
    assert words[words.index("-m") + 2].startswith("/megatron/examples/inference/")
    sizes = tuple(
        words[words.index(f"--{kind}-model-parallel-size") + 1] for kind in ("tensor", "pipeline", "expert")
    )
    assert sizes == layout and ("--sequence-parallel" in words) == (layout[0] == "2")
    assert words[-2:] == ["--moe-macs-level", "rank"] and "--moe-macs" in words
    if script.endswith("sbatch"):
        assert words[words.index("--rdzv-endpoint") + 1] == "node-a:29500"


def test_what_must_be_set_is_asked_for(commanded):
    assert "a checkout of Megatron-LM" in commanded("one_node.sh", MEGATRON_LM="")[1]
    assert "the folder of a Megatron checkpoint" in commanded("one_node.sh", CHECKPOINT="")[1]


def test_megatron_and_macs_know_every_flag(commanded, tmp_path):
    pytest.importorskip("megatron.training", reason="this Megatron's wheel has no megatron.training")
    from megatron.training.arguments import add_megatron_arguments

    from megatron_macs import add_macs_args
    from megatron_macs.options import macs_options, tokens_from_args

    settings = tmp_path / "macs.yaml"
    settings.write_text("capacity_factor: 1.25\n")
    words, _ = commanded("one_node.sh", TP="2", MACS_CONFIG=str(settings))
    parser = add_macs_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    arguments, unknown = parser.parse_known_args(words[words.index("-m") + 3 :])
    assert {word for word in unknown if word.startswith("--")} <= SCRIPTS_OWN
    assert arguments.num_experts == 128 and arguments.expert_model_parallel_size == 8
    assert macs_options(arguments).settings().capacity_factor == 1.25
    assert tokens_from_args(arguments) == {"image_token_id": 151655, "video_token_id": 151656}


def test_a_model_from_megatrons_flags(program):
    there = importlib.util.find_spec("megatron.training") is not None
    words = LAUNCH / "flags_on_a_laptop.sh", "--moe-macs-level", "rank"
    done = program(*words, executable="bash", status=0 if there else 2)
    if not there:
        assert "needs megatron-core 0.18 or later" in done.stderr
        return
    assert "logits of (4, 256, 128), macs" in done.stdout and "load, before" in done.stdout
