"""vLLM on a CPU with a tiny Qwen3-VL-MoE and pictures: tensor and expert parallelism over two processes.

Needs an environment of its own (docs/vllm.md); elsewhere skipped.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; it needs an environment of its own")

import tiny_random_vlm
import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "vllm_qwen3_vl_moe.py"
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_random_vlm.make(tmp_path_factory.mktemp("model"))


def answers(folder, model, *flags, fails=False):
    """What the example prints to its file, or its errors."""
    out = folder / "out.json"
    command = [sys.executable, str(EXAMPLE), "--model", str(model), "--dtype", "float32", "--json", str(out)]
    done = subprocess.run(
        [*command, *flags], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    if fails:
        assert done.returncode != 0
        return done.stderr + done.stdout
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def stock(model, tmp_path_factory):
    """vLLM's own answers, one process."""
    return answers(tmp_path_factory.mktemp("stock"), model, "--tensor-parallel-size", "1")["answers"]


def test_with_nothing_over_the_limit_two_ranks_answer_as_stock_does(tmp_path, model, stock):
    found = answers(tmp_path, model, "--target-load", "8", "--macs", '{"min_tokens": 8}')
    assert found["answers"] == stock
    assert found["workers"][0]["before"] == found["workers"][0]["after"] != []


def test_no_rank_computes_more_than_its_limit(tmp_path, model, stock):
    found = answers(tmp_path, model, "--target-load", "0.7", "--macs", '{"min_tokens": 8}')
    first, second = found["workers"]
    assert first["before"] == second["before"] and first["after"] == second["after"]  # one plan
    assert len(first["after"]) == tiny_random_vlm.LAYERS
    assert max(map(max, first["before"])) > 1 and max(map(max, first["after"])) <= 0.7
    # Counted in the experts' input: calls are layer after layer, step after step; decoding steps of three
    # prompts are not planned. What the plans say is what was computed, of every token of the prompts.
    rows = torch.tensor([first["rows"], second["rows"]]).view(2, -1, tiny_random_vlm.LAYERS).amax(0)
    rows = rows[
        torch.tensor([first["rows"], second["rows"]]).sum(0).view(-1, tiny_random_vlm.LAYERS)[:, 0] > 8
    ].T
    mean = rows / torch.tensor(first["after"])  # of the router's choice, by layer and step
    assert (rows <= 0.7 * mean + 1e-6).all() and torch.allclose(mean, mean[:1].expand_as(mean))
    tokens = float(mean[0].sum()) * 2 / tiny_random_vlm.TOP_K
    # A prompt may be read beside a decoding step of the two others.
    assert 0 <= round(tokens, 3) - sum(found["tokens"]) <= 2 * len(first["after"][0])
    assert [len(ids) for ids in found["answers"]] == [len(ids) for ids in stock]


def test_a_prompt_is_read_in_chunks_through_its_picture(tmp_path, model):
    """With nothing over the limit chunks answer as whole prompts do."""
    flags = ("--tensor-parallel-size", "1", "--target-load", "8", "--max-num-batched-tokens", "24")
    whole = answers(tmp_path, model, *flags[:2])["answers"]
    macs = '{"min_tokens": 8, "virtual_ranks": 4}'
    found = answers(tmp_path, model, *flags, "--macs", macs)
    assert found["answers"] == whole and len(found["workers"][0]["after"][0]) >= 4  # steps


def test_the_example_needs_no_model(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--target-load", "0.7", "--tokens", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    shown = [line for line in done.stdout.splitlines() if line.startswith("layer ")]
    assert len(shown) == tiny_random_vlm.LAYERS
    assert all(float(line.split()[-2]) <= 0.7 < float(line.split()[3]) for line in shown)


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path, model):
    flags = ("--target-load", "0.7", "--macs", '{"profile": "nothing.safetensors"}')
    assert "expected a file that macs tune wrote" in answers(tmp_path, model, *flags, fails=True)


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def question(number):
    """A chat request: every second one has a picture."""
    import base64
    import io

    from PIL import Image

    content = [{"type": "text", "text": f"question {number}"}]
    if number % 2:
        image = io.BytesIO()
        Image.new("RGB", (64 + 32 * (number % 3), 64), (number % 255, 90, 160)).save(image, "PNG")
        url = "data:image/png;base64," + base64.b64encode(image.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4}


def test_the_server_answers_many_at_once_and_shows_its_loads(tmp_path, model):
    seconds = float(os.environ.get("MACS_VLLM_SECONDS", "15"))
    port, metrics = free_port(), free_port()
    entry = {"macs": {"target_load": 0.7, "min_tokens": 8, "metrics_port": metrics}}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512"]
    command += [*"--max-num-seqs 8 --max-num-batched-tokens 64 --enforce-eager --port".split(), str(port)]
    command += ["--no-enable-prefix-caching", "--tensor-parallel-size", "2", "--enable-expert-parallel"]
    command += ["--host", "127.0.0.1", "--additional-config", json.dumps(entry)]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    bad, done = [], []

    def ask(number):
        body = json.dumps(question(number)).encode()
        request = Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    def client(first):
        number, end = first, time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                assert 1 <= ask(number) <= 4
                done.append(number)
            except (HTTPError, URLError, AssertionError) as error:
                bad.append(repr(error))
            number += 8

    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
            try:
                urlopen(f"{address}/health", timeout=2).close()
                break
            except (URLError, OSError):
                time.sleep(1)
        clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        assert not bad and len(done) >= 16, (bad[:3], len(done))
        shown = urlopen(f"{address}/metrics", timeout=10).read().decode()
    finally:
        server.terminate()
        server.wait(60)
    assert "vllm:num_requests_running" in shown
    ours = [line for line in shown.splitlines() if line.startswith("macs_")]
    assert any('macs_steps_total{decision="planned"}' in line for line in ours), ours[:20]
