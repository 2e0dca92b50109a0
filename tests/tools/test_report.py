"""``macs report``: what it counts, what it advises, and its page."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from support.estimates import profile_of

from macs import MACSConfig, Recording, Tuning
from macs.records.tuning import settings_of
from macs_tools import cli
from macs_tools.common.workloads import SHAPES
from macs_tools.hardware.machine import machine
from macs_tools.report.advice import advise
from macs_tools.report.prediction import Prediction, drawn_from
from macs_tools.report.run import render, report
from macs_tools.report.simulation import requested_by, resampled
from macs_tools.report.traffic import default_ranks, measured

LAYERS, EXPERTS, TOP_K, RANKS = 3, 8, 2, 4


def recording(seed, steps=6, tokens=96, skew=3.0, visual=0.6, ranks=RANKS, small=2):
    """Of one rank; the last steps are of 5 tokens, as in decoding."""
    generator = torch.Generator().manual_seed(seed)
    counts = [tokens] * steps + [5] * small
    number, total = len(counts), sum(counts) * LAYERS
    logits = torch.randn(total, EXPERTS, generator=generator)
    logits[:, 0] += skew
    kinds = (torch.rand(total, generator=generator) < visual).to(torch.int8)
    return Recording(
        EXPERTS,
        ranks,
        {
            "layers": torch.arange(LAYERS, dtype=torch.int32).repeat(number),
            "steps": torch.arange(number).repeat_interleave(LAYERS),
            "counts": torch.tensor(counts).repeat_interleave(LAYERS),
            "experts": logits.topk(TOP_K).indices.short(),
            "weights": torch.full((total, TOP_K), 0.5, dtype=torch.float16),
            "modality": kinds,
        },
    )


def test_traffic_is_what_one_counts_by_hand():
    both = [recording(0), recording(1)]
    traffic = measured(both, RANKS)
    loads = np.zeros((2, LAYERS, EXPERTS))
    rows = {}
    for one in both:
        for record in one.records:
            for kind, chosen in zip(record.modality.tolist(), record.experts.tolist(), strict=True):
                for expert in chosen:
                    loads[int(kind > 0), record.layer, expert] += 1
                    here = rows.setdefault((record.step, record.layer), [0] * RANKS)
                    here[expert // (EXPERTS // RANKS)] += 1
    assert (traffic.loads == loads).all() and traffic.small == 2 and traffic.sources == 2
    for (step, layer), each in rows.items():
        if step < 6:
            assert traffic.load[step, layer] == pytest.approx(max(each) / (sum(each) / RANKS))
    assert traffic.tokens.tolist() == [96.0] * 6
    assert traffic.typical > 1.3 and 0.55 < traffic.visual_share < 0.65
    first, mean, most = traffic.over_time(4)
    assert first.tolist() == [0, 1, 3, 4] and (mean <= most).all()


def test_steps_that_are_all_small_are_kept():
    traffic = measured([recording(0, steps=0, small=3)], RANKS)
    assert traffic.steps == 3 and traffic.small == 0


def test_ranks_are_the_runs_or_as_many_as_divide():
    assert default_ranks([recording(0)]) == RANKS and default_ranks([recording(0, ranks=1)]) == 8
    with pytest.raises(ValueError, match="--ranks: found 3, expected a divisor of the 8 experts"):
        measured([recording(0)], 3)


def predicted(balance, low, replicas=1.0, pays=None, dropped=0.05, kl=None):
    """A prediction for four ranks, of these times over vanilla's; kl: verified, by target."""
    ratios = {"vanilla": 1.0, "macs 1.05": balance, "macs 0.6": low, "EPLB, 1 replica": replicas}
    rows = [
        {"ranks": 4, "policy": name, "ratio": ratio, "extra_bytes": 2e6, "dropped_mass": dropped}
        for name, ratio in ratios.items()
    ]
    shape = SHAPES["tiny"]
    return Prediction(rows, [4], [0], {4: pays}, kl or {}, machine("h100", "trtllm", shape), shape, {})


BALANCE, LOW = "--moe-macs-target-load 1.05", "--moe-macs-target-load 0.6"


@pytest.mark.parametrize(
    ("changes", "verdict", "flags"),
    [
        ({}, "Worth it: on 4 ranks a target of 1.05 wins 20% of a MoE layer's time and drops 5%", BALANCE),
        ({"balance": 0.99, "low": 0.7}, "Only below the mean: on 4 ranks a target of 0.6 wins 30%", LOW),
        ({"balance": 1.1, "low": 0.99}, "Not here: on 4 ranks no target wins 2%", None),
        ({"dropped": 0.51}, "Measure first: on 4 ranks a target of 1.05 wins 20%", None),
        ({"dropped": 0.51, "kl": {0.6: 0.001}}, "Worth it: on 4 ranks a target of 0.6 wins 40%", BALANCE),
        ({"kl": {1.05: 0.004, 0.6: 0.01}}, "Not as tuned: no target that wins time has a verified KL", None),
        ({"balance": 1.0, "kl": {1.05: 0.001, 0.6: 0.01}}, "Not as tuned: no target that wins time", None),
        ({"replicas": 0.768, "dropped": 0.01}, "EPLB first: 1 replica a rank takes 0.768", None),
        ({"replicas": 0.9}, "Worth it", BALANCE),
    ],
)
def test_the_verdict_weighs_time_drops_verified_kl_and_eplb(changes, verdict, flags):
    given = {"balance": 0.8, "low": 0.6} | changes
    found = advise(measured([recording(0)], RANKS), predicted(**given), None, None)
    assert found.verdict.startswith(verdict)
    lines = [line for _, line in found.commands]
    assert any("macs tune" in line for line in lines) == (given["low"] < 0.98)
    if flags is None:
        assert not any("--moe-macs " in line for line in lines)
    else:
        assert any(line.endswith(f"--moe-macs-image-token-id ID {flags}") for line in lines)


def test_when_not_to_is_said():
    traffic = measured([recording(0, visual=0.0, skew=0.0)], RANKS)
    found = " ".join(advise(traffic, predicted(0.9, 0.6, replicas=0.85, pays=4000), None, None).against)
    assert "no visual token" in found and "from 4000 tokens a rank on" in found
    assert "EPLB, 1 replica a rank takes 0.850 of vanilla's time" in found and "2 MB" in found
    even = replace(traffic, load=np.ones_like(traffic.load))
    found = " ".join(advise(even, predicted(1.0, 0.6), None, None).against)
    assert "balanced already" in found


def tuned(path, layers=LAYERS):
    torch.manual_seed(0)
    tuning = Tuning(
        torch.tensor([1.05, 0.6], dtype=torch.float64),
        torch.tensor([[1.05] * layers, [0.5] * layers], dtype=torch.float64),
        torch.tensor([[1e-5, 0, 1e-4], [1e-3, 0, 1e-2]], dtype=torch.float64),
        ["none", "none"],
        "macs",
        settings_of(MACSConfig(), "macs"),
        RANKS,
        96,
        100,
    )
    routers = [torch.randn(EXPERTS, 6) for _ in range(layers)]
    replace(profile_of(routers, TOP_K), tuning=tuning).save(path)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    out = folder / "report.html"
    found = report(
        [recording(0), recording(1)],
        profile=tuned(folder / "profile.safetensors"),
        sizes=[2, 4],
        tokens=4096,
    )
    out.write_text(render(*found, "<b>.safetensors"))
    return out


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, given):
        given = dict(given)
        self.seen.append((tag, given))
        if "id" in given:
            assert given["id"] not in self.ids
            self.ids.add(given["id"])


def test_the_page_needs_no_network_and_no_scripts(page):
    text = page.read_text()
    found = _Page(text)
    assert page.stat().st_size < 1e6 and "<b>.safetensors" not in text
    for tag, given in found.seen:
        for name in ("src", "href", "srcset"):
            value = given.get(name, "#")
            assert value.startswith(("data:", "#")), (tag, value[:80])
    pictures = [given for tag, given in found.seen if tag == "img"]
    assert len(pictures) == 6 and all(one["alt"] for one in pictures)
    assert ("html", {"lang": "en"}) in found.seen and all(tag != "script" for tag, _ in found.seen)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    for word in (
        "macs 0.6 tuned",
        "0.001 nats at 0.6",
        "--moe-macs-split tuned",
        "least-loaded EP",
        "What compensation explains",
    ):
        assert word in text


def test_every_rank_that_recorded_is_drawn_from_in_steps_that_all_have():
    both = [recording(0, steps=4), recording(1, steps=6)]
    for one in drawn_from(both, 1):
        assert set(one.tensors["layers"].tolist()) == {1} and one.tensors["steps"].tolist() == [0, 3]
    shape = replace(SHAPES["tiny"], experts=EXPERTS, top_k=TOP_K, tokens=64)
    seen = []
    own, batch_of = resampled(drawn_from(both, 1), 1, shape)
    requested_by(own, {}, lambda step, rank: seen.append(rank) or batch_of(step, rank), 0, 8, 4)
    assert seen == [0, 1, 2, 3]
    apart = [recording(0, steps=1, small=0), recording(1, steps=1, small=0)]
    apart[1].tensors["steps"].add_(5)
    with pytest.raises(ValueError, match="layer 0 has no step that all 2 files have"):
        drawn_from(apart, 0)


def test_a_profile_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found a tuning of 5 layers, the recording has 3"):
        report([recording(0)], profile=tuned(tmp_path / "p.safetensors", 5), sizes=[4])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "the following arguments are required: recordings"),
        (("nothing.safetensors",), "found no file 'nothing.safetensors'"),
        (("r.safetensors", "--sizes", "3"), "--sizes: found 3, expected divisors of the 8 experts, 2"),
        (("r.safetensors", "--sizes", "1"), "--sizes: found 1, expected divisors of the 8 experts, 2"),
        (("r.safetensors", "--ranks", "0"), "--ranks: found 0, expected more than 0"),
        (("r.safetensors", "--ranks", "3"), "--ranks: found 3, expected a divisor of the 8 experts"),
        (("r.safetensors", "--size", "3"), "did you mean --sizes?"),
        (("r.safetensors", "--to", "b.safetensors"), "expected one .jsonl for a .safetensors, or one back"),
        (("x.jsonl", "--to", "b.safetensors"), "found no file"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path, flags, message):
    recording(0).save(tmp_path / "r.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["report", *flags, "--out", "page.html"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len(error.splitlines()) == 1
