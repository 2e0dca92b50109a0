"""An installed wheel, away from the clone: every module imports, every command has help, and one works.

python wheel.py            # with torch alone: what needs more names what to install
python wheel.py --model    # with everything: a random Hugging Face MoE is tuned and evaluated
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

EVERYTHING = "--model" in sys.argv[1:]
NEWER = ("megatron_macs.inference_optimized",)  # of Megatron-Core 0.19 alone
PACKAGES = ("macs", "macs_tools", "megatron_macs", "deepspeed_macs", "vllm_macs")


def modules() -> list[str]:
    """Every module of the wheel."""
    found = []
    for package in PACKAGES:
        root = Path(next(iter(importlib.util.find_spec(package).submodule_search_locations)))
        assert "site-packages" in str(root) or "wheel" in str(root), f"{root} is not the wheel's"
        found += [
            package,
            *(one.name for one in pkgutil.walk_packages([str(root)], f"{package}.", lambda _: None)),
        ]
    return [name for name in found if not name.endswith("__main__")]


def check_imports() -> None:
    """A module imports, or lacks a package that is not of the wheel."""
    for name in modules():
        try:
            importlib.import_module(name)
        except ImportError as error:
            lacking = "pip install" in str(error) or (error.name or "").split(".")[0] not in ("", *PACKAGES)
            if name in NEWER:
                continue
            if EVERYTHING or "needs a clone" in str(error) or not lacking:
                raise


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "macs_tools", *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0 or (not EVERYTHING and "pip install" in done.stderr), (words, done.stderr)
    return done.stdout


def check_commands() -> None:
    from macs_tools.cli import COMMANDS

    for words in COMMANDS:
        run(*words.split(), "--help")
    assert "macs" in run("doctor")


def check_model(folder: Path) -> None:
    """Tune and evaluate a random model of a transformers configuration on requests from a file."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{number}" for number in range(61))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    lines = [
        json.dumps({"text": " ".join(f"w{(7 * number + 3 * i) % 61}" for i in range(24 + number % 5))})
        for number in range(32)
    ]
    (folder / "requests.jsonl").write_text("\n".join(lines))
    common = ("--model", str(folder / "model"), "--data", str(folder / "requests.jsonl"), "--tokens", "4")
    common += ("--ranks", "2", "--requests", "32", "--batch", "8")
    tuned = str(folder / "tuned.safetensors")
    assert "profile with the tuning" in run(
        "tune", *common, "--targets", "0.7", "--tries", "1", "--compensation-rank", "2", "--out", tuned
    )
    shown = run(
        "evaluate", *common, "--targets", "0.7", "--profile", tuned, "--out", str(folder / "rows.json")
    )
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["macs", "macs", "token-drop"], shown
    assert all(0.5 < row["load"] <= 0.7 + 1e-6 and row["kl"][0] > 0 for row in rows), rows


if __name__ == "__main__":
    check_imports()
    check_commands()
    if EVERYTHING:
        with tempfile.TemporaryDirectory() as folder:
            check_model(Path(folder))
    print("the wheel works")
