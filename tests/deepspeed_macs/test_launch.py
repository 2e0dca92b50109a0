"""Scripts that do not change, run with MACS; what is missing is named at import."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from support.workers import free_port

from macs import Recording

ROOT = Path(__file__).parents[2]


def run_python(code, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


def test_an_older_deepspeed_is_refused_with_the_needed_version(tmp_path):
    package = tmp_path / "deepspeed" / "moe"
    package.mkdir(parents=True)
    (tmp_path / "deepspeed" / "__init__.py").write_text("__version__ = '0.16.0'\n")
    (package / "__init__.py").write_text("")
    (package / "sharded_moe.py").write_text(
        "def top1gating(): ...\nclass TopKGate:\n    def forward(self, input, used_token=None): ...\n"
    )
    done = run_python("import deepspeed_macs", tmp_path)
    assert done.returncode != 0
    assert "deepspeed_macs needs deepspeed>=0.19.8,<0.20; found 0.16.0, which lacks" in done.stderr


def test_without_deepspeed_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['deepspeed'] = None; import deepspeed_macs"
    done = run_python(code, tmp_path)
    assert "deepspeed_macs needs deepspeed: pip install 'macs-moe[deepspeed]'" in done.stderr


SCRIPT = """
import argparse, sys
import deepspeed, torch
from support.deepspeed_ranks import Model, batch_of

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--config", default=None)
arguments = parser.parse_args()
deepspeed.init_distributed("gloo", verbose=False)
world = torch.distributed.get_world_size()
config = arguments.config or {"dtype": "fp32", "moe": {"ep_size": world}}
engine = deepspeed.init_inference(Model(4, 2, world), config=config).eval()
with torch.inference_mode():
    engine(batch_of(torch.distributed.get_rank(), 3, 9))
dropped = float(engine.macs.reports()[0].dropped.sum()) if hasattr(engine, "macs") else -1.0
line = f"rank {torch.distributed.get_rank()} of {world}, {arguments.local_rank}, dropped {dropped:g}"
sys.stdout.write(line + "\\n")
"""


def launched(folder, launcher, *arguments):
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    tools = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PATH": tools + os.pathsep + os.environ["PATH"],
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m"],
        "deepspeed": [
            "deepspeed",
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "--module",
        ],
        "python": [sys.executable, "-m"],
    }[launcher]
    done = subprocess.run(
        [*command, "deepspeed_macs.launch", *(str(one) for one in arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line[line.index("rank ") :] for line in done.stdout.splitlines() if ", dropped" in line]
    return done, sorted(lines)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_script_that_does_not_change_runs_with_macs(tmp_path, launcher):
    block = tmp_path / "macs.json"
    block.write_text(json.dumps({"capacity_factor": 0.5, "min_tokens": 0, "image_token_id": 5}))
    done, lines = launched(tmp_path, launcher, "--macs", block, tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        local = rank if launcher == "deepspeed" else None
        assert line.startswith(f"rank {rank} of 2, {local}, dropped ")
        assert float(line.split()[-1]) > 0


def test_a_scripts_own_config_holds_the_block(tmp_path):
    config = {"dtype": "fp32", "moe": {"ep_size": 2}}
    config["macs"] = {"capacity_factor": 0.5, "min_tokens": 0, "image_token_id": 5}
    config["macs"]["record"] = str(tmp_path / "routing.safetensors")
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    done, lines = launched(
        tmp_path, "torchrun", tmp_path / "script.py", "--config", tmp_path / "ds_config.json"
    )
    assert done.returncode == 0, done.stderr
    assert all(float(line.split()[-1]) > 0 for line in lines) and len(lines) == 2
    recordings = [Recording.load(tmp_path / f"routing.rank{rank}.safetensors") for rank in (0, 1)]
    assert all(one.num_ranks == 2 and len(one.records[0].modality) > 0 for one in recordings)


def test_a_script_that_is_not_there_is_named(tmp_path):
    done, _ = launched(tmp_path, "python", tmp_path / "nothing.py")
    assert done.returncode == 2 and "found no script" in done.stderr
