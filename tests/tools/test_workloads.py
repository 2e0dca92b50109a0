"""Workloads: the rules they follow, and recordings played back."""

from dataclasses import replace

import pytest
import torch
from support.cases import AnyAdapter

from macs import IMAGE, TEXT, MACSConfig, Modality, Recording, Runtime, Topology, modality
from macs_tools.common import workloads
from macs_tools.common.workloads import SHAPES, WORKLOADS, draw, features

SHAPE = replace(SHAPES["tiny"], tokens=512)
RANKS = 4


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_batch_is_what_a_router_would_make_of_its_logits(name):
    batch = draw(name, SHAPE, 1, 2, RANKS)
    assert torch.equal(batch.experts, batch.experts.sort(1).values)
    assert int((batch.experts.diff(dim=1) == 0).sum()) == 0
    torch.testing.assert_close(batch.scores.sum(1), torch.ones(SHAPE.tokens))
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(SHAPE.tokens))
    scores = batch.logits.softmax(1)
    weights, experts = scores.topk(SHAPE.top_k, 1)
    assert torch.equal(experts.sort(1).values, batch.experts)
    weights = (weights / weights.sum(1, keepdim=True)).gather(1, experts.argsort(1))
    torch.testing.assert_close(weights, batch.weights)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_batch_is_its_seed_step_and_ranks_own(name):
    first = draw(name, SHAPE, 1, 2, RANKS, seed=5)
    assert torch.equal(first.scores, draw(name, SHAPE, 1, 2, RANKS, seed=5).scores)
    for others in ((2, 2, RANKS, 5), (1, 3, RANKS, 5), (1, 2, RANKS, 6)):
        assert not torch.equal(first.scores, draw(name, SHAPE, *others[:3], seed=others[3]).scores)


def shares(name, step=0):
    """What part of the assignments every expert gets, all ranks together."""
    experts = torch.cat([draw(name, SHAPE, step, rank, RANKS).experts for rank in range(RANKS)])
    return experts.flatten().bincount(minlength=SHAPE.experts) / experts.numel()


def test_text_is_even_or_its_hot_experts_rotate():
    quarter = SHAPE.experts // 4
    assert shares("uniform").amax() < 1.3 / SHAPE.experts
    for step, first in ((0, 0), (2, 0), (3, quarter), (9, 3 * quarter), (12, 0)):
        assert shares("rotating", step)[first : first + quarter].sum() > 0.75


def test_the_multimodal_workloads_lean_as_their_names_say():
    def visual(name, rank=0, step=0):
        return float((draw(name, SHAPE, step, rank, RANKS).ids != TEXT).float().mean())

    assert visual("image-flood") == pytest.approx(0.9, abs=0.01)
    busiest = {name: float(shares(name).view(RANKS, -1).sum(1).amax()) * RANKS for name in WORKLOADS}
    assert busiest["uniform"] < busiest["image-flood"] < busiest["hot-rank"]
    assert busiest["hot-rank"] == float(shares("hot-rank").view(RANKS, -1).sum(1)[-1]) * RANKS > 1.5
    flat = features(draw("image-flood", SHAPE, 0, 0, RANKS), 64, 0, 0)
    text = features(draw("uniform", SHAPE, 0, 0, RANKS), 64, 0, 0)
    assert float(torch.corrcoef(flat).mean()) > 0.1 > float(torch.corrcoef(text).mean())


def test_served_traffic_is_as_uneven_as_what_was_published():
    """Prompts of 36, 76 and 96 % visual tokens; over 16 ranks of 128 experts 2.6 to 5.1 times the mean."""
    shape = replace(SHAPES["qwen3-vl-30b-a3b"], tokens=2048)
    batches = [draw("served", shape, 0, rank, 16) for rank in range(16)]
    of_expert = torch.cat([one.experts for one in batches]).flatten().bincount(minlength=128)
    of_rank = of_expert.view(16, -1).sum(1).double()
    assert float(of_rank.max() / of_rank.mean()) == pytest.approx(2.8, abs=0.1)
    visual = torch.cat([one.ids for one in batches]) != TEXT
    assert 0.6 < float(visual.double().mean()) < 0.9


def test_an_unknown_workload_is_named():
    with pytest.raises(ValueError, match="workload: found 'W9', expected one of uniform"):
        draw("W9", SHAPE, 0, 0, RANKS)


@pytest.mark.parametrize("with_scores", [False, True])
def test_a_recording_is_played_back(tmp_path, with_scores):
    drawn = [[draw("image-flood", SHAPE, step, rank, 2) for rank in range(2)] for step in range(2)]
    for rank in range(2):
        runtime = Runtime(MACSConfig(min_tokens=0))
        topology = Topology(SHAPE.experts, 2, sources=(rank,))
        layer = runtime.add_layer(AnyAdapter(lambda: torch.eye(SHAPE.experts), topology, SHAPE.top_k))
        with runtime.record_routing(tmp_path / f"{rank}", scores=with_scores):
            for step in range(2):
                batch = drawn[step][rank]
                with modality(Modality.of(batch.ids[None])):
                    tokens = layer.tokens(1, SHAPE.tokens, False, torch.device("cpu"))
                layer.plan(features(batch, 8, 0, 0), batch.experts, batch.weights, batch.scores, tokens)
    recordings = [Recording.load(tmp_path / str(rank)) for rank in range(2)]
    found = workloads.replay(recordings, 0)
    for step in range(2):
        for rank in range(2):
            mine, own = found[step][rank], drawn[step][rank]
            assert torch.equal(mine.experts, own.experts) and torch.equal(mine.ids, own.ids)
            torch.testing.assert_close(mine.weights, own.weights, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(mine.scores.sum(1), torch.ones(SHAPE.tokens))
            least = mine.scores.gather(1, mine.experts).amin(1)
            others = mine.scores.scatter(1, mine.experts, 0.0).amax(1)
            assert bool((others <= least * 1.001).all())
            if with_scores:
                torch.testing.assert_close(mine.scores, own.scores, atol=1e-3, rtol=2e-3)
    assert int((found[0][0].ids == IMAGE).sum()) > 0
    with pytest.raises(ValueError, match="layer 7 has no step that all 2 files have"):
        workloads.replay(recordings, 7)
