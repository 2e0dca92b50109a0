"""Group scope on small mocked process groups, and the promise of no host synchronisation."""

import pytest
import torch
from hypothesis import given
from support.cases import configs, routings

from macs import IMAGE, LayerRecorder, MACSConfig, Modality, Planner, Topology, build_policy
from macs.policies import POLICIES


class MockedGroup:
    """A group of a given size in which this process has a given rank."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def inputs(rank, count):
    generator = torch.Generator().manual_seed(rank)
    scores = (torch.rand(count, 8, generator=generator) + torch.tensor([3.0, 2, 0, 0, 0, 0, 0, 0])).softmax(1)
    weights, experts = scores.topk(2)
    tokens = Modality.of(torch.rand(1, count, generator=generator) < 0.5).batch_major()
    return torch.randn(count, 4, generator=generator), experts, weights, scores, tokens


def plans_of_group(monkeypatch, config, counts):
    """The plans of every rank of a mocked group; each rank makes one gather of one small table."""
    size = len(counts)
    sent = {}

    def planner(rank):
        topology = Topology(8, size, sources=(rank,))
        return Planner(config, topology, 2, group=MockedGroup(rank, size))

    def collect(rank):
        def gather(output, packed, group):
            assert packed.dtype == torch.int64
            assert packed.shape == (1, 3 + 2 * 8)
            assert rank not in sent, "one gather a plan"
            sent[rank] = packed.clone()
            output.zero_()

        return gather

    for rank, count in enumerate(counts):
        monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", collect(rank))
        planner(rank).plan(*inputs(rank, count))

    def answer(output, packed, group):
        assert torch.equal(packed, sent[group.rank()])
        output.copy_(torch.cat([sent[rank] for rank in range(size)]))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", answer)
    return [planner(rank).plan(*inputs(rank, count)) for rank, count in enumerate(counts)]


@pytest.mark.parametrize("level", ["expert", "rank"])
@pytest.mark.parametrize("counts", [[40, 40], [60, 0], [5, 70, 0, 30]])
def test_the_group_shares_its_capacity(monkeypatch, level, counts):
    config = MACSConfig(capacity_factor=1.0, scope="group", level=level, reroute="none", min_tokens=0)
    plans = plans_of_group(monkeypatch, config, counts)
    after = sum(plan.statistics.load_after for plan in plans)
    before = sum(plan.statistics.load_before for plan in plans)
    limit = -(-sum(counts) * 2 // 8)  # the even share, rounded up
    if level == "rank":
        of = torch.arange(8) // (8 // len(counts))
        pools = torch.zeros(len(counts), dtype=torch.int64)
        after, before = pools.index_add(0, of, after), pools.index_add(0, of, before)
        limit = -(-sum(counts) * 2 // len(counts))
    # Nobody wants more than is there, nobody gets more than there is, and nothing is left unused.
    assert after.tolist() == before.clamp(max=limit).tolist()


def test_the_groups_total_decides_whether_it_plans(monkeypatch):
    for least, planned in ((100, 1), (101, 0)):
        config = MACSConfig(scope="group", min_tokens=least)
        for plan in plans_of_group(monkeypatch, config, [99, 1]):
            assert int(plan.statistics.planned) == planned


def on_meta(value):
    return value.to("meta")


@pytest.mark.parametrize("name", POLICIES)
@given(case=routings(config=configs()))
def test_planning_reads_nothing_on_the_host(name, case):
    """On the meta device there are shapes but no values: reading one, or a shape that depends on
    one, is an error. What passes here has static shapes and no host synchronisation."""
    tokens = type(case.tokens)(**{name: on_meta(value) for name, value in vars(case.tokens).items()})
    arguments = [on_meta(value) for value in (case.hidden, case.experts, case.weights, case.scores)]
    policy = build_policy(name, case.config, case.topology, case.top_k)
    plan = policy.plan(*arguments, tokens)
    assert plan.experts.shape == (len(case.hidden), policy.slots)
    routing_map, probs = plan.as_map(case.topology.num_experts)
    assert routing_map.shape == probs.shape == case.scores.shape
    LayerRecorder(case.topology, case.top_k, steps=2).record(plan.statistics)


def test_laying_out_tokens_reads_nothing_on_the_host():
    modality = Modality.of(torch.full((3, 5), IMAGE, dtype=torch.int8, device="meta"))
    assert modality.sequence_major().kinds.shape == modality.batch_major(3).source.shape == (15,)
