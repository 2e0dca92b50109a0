"""Scripts that do not change, run with MACS; what is missing is named at import."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from support.workers import free_port

from macs import Recording


def test_an_older_deepspeed_is_refused_with_the_needed_version(program, tmp_path):
    package = tmp_path / "deepspeed" / "moe"
    package.mkdir(parents=True)
    (tmp_path / "deepspeed" / "__init__.py").write_text("__version__ = '0.16.0'\n")
    (package / "__init__.py").write_text("")
    (package / "sharded_moe.py").write_text(
        "def top1gating(): ...\nclass TopKGate:\n    def forward(self, input, used_token=None): ...\n"
    )
    done = program("-c", "import deepspeed_macs", status=1)
    assert "deepspeed_macs needs deepspeed>=0.19.8,<0.20; found 0.16.0, which lacks" in done.stderr


def test_without_deepspeed_the_extra_is_named(program):
    done = program("-c", "import sys; sys.modules['deepspeed'] = None; import deepspeed_macs", status=1)
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


LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --nproc-per-node 2 --master-port".split(),
    "deepspeed": [Path(sys.executable).parent / "deepspeed", *"--num_gpus 2 --master_port".split()],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_that_does_not_change_runs_with_macs(program, tmp_path, launcher):
    """With the block in a file, or in the script's own config."""
    block = {"capacity_factor": 0.5, "min_tokens": 0, "image_token_id": 5}
    words = "--macs", "macs.json", "script.py"
    if launcher == "deepspeed":
        block["record"] = str(tmp_path / "routing.safetensors")
        words = "script.py", "--config", "macs.json"
    config = block if launcher == "torchrun" else {"dtype": "fp32", "moe": {"ep_size": 2}, "macs": block}
    (tmp_path / "macs.json").write_text(json.dumps(config))
    (tmp_path / "script.py").write_text(SCRIPT)
    module = "--module" if launcher == "deepspeed" else "-m"
    launch = *LAUNCHERS[launcher], free_port(), module, "deepspeed_macs.launch"
    done = program(*launch, *words, DS_ACCELERATOR="cpu")
    lines = sorted(line[line.index("rank ") :] for line in done.stdout.splitlines() if ", dropped" in line)
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        local = rank if launcher == "deepspeed" else None
        assert line.startswith(f"rank {rank} of 2, {local}, dropped ") and float(line.split()[-1]) > 0
        if launcher == "deepspeed":
            recording = Recording.load(tmp_path / f"routing.rank{rank}.safetensors")
            assert recording.num_ranks == 2 and len(recording.records[0].modality) > 0


def test_a_script_that_is_not_there_is_named(program, tmp_path):
    done = program("-m", "deepspeed_macs.launch", "nothing.py", status=2)
    assert "found no script" in done.stderr
