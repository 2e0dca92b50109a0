"""The parts of the gate that need no second process."""

import types

import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import MOELayer, TopKGate, top1gating, top2gating, topkgating
from hypothesis import given
from hypothesis import strategies as st
from support.cases import AnyAdapter, busy
from torch import nn

import macs
from deepspeed_macs import MACSTopKGate
from deepspeed_macs.gate import dense_routes, loads_of, places_of
from macs import Runtime, Topology


def gate_of(k, experts=4, policy="macs", **settings):
    torch.manual_seed(0)
    gate = TopKGate(8, experts, k).eval()
    runtime = Runtime(busy(**{"min_tokens": 0, **settings}), policy=policy)
    layer = runtime.add_layer(AnyAdapter(lambda: gate.wg.weight, Topology(experts), k))
    MACSTopKGate.adopt(gate, layer, sequence_major=False, sampling=False)
    return gate


@given(experts=st.integers(2, 6), tokens=st.integers(0, 12), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_places_number_every_experts_rows(experts, tokens, k, seed):
    chosen = torch.randint(-1, experts, (tokens, k), generator=torch.Generator().manual_seed(seed))
    for route_major in (False, True):
        slots = places_of(chosen, experts, route_major)
        seen = dict.fromkeys(range(experts), 0)
        order = [(t, j) for j in range(k) for t in range(tokens)] if route_major else None
        for t, j in order or [(t, j) for t in range(tokens) for j in range(k)]:
            expert = int(chosen[t, j])
            if expert < 0:
                assert slots[t, j] == 0
            else:
                assert slots[t, j] == seen[expert]
                seen[expert] += 1
        assert loads_of(chosen, experts).tolist() == [seen[e] for e in range(experts)]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_with_capacity_for_all_the_routes_are_the_engines(k):
    gate, x = gate_of(k, capacity_factor=1e6), torch.randn(20, 8)
    logits = x @ gate.wg.weight.t()
    stock = {
        1: lambda sparse: top1gating(logits, 1, 0, drop_tokens=False, use_rts=False, sparse_routes=sparse),
        2: lambda sparse: top2gating(
            logits, 1, 0, drop_tokens=False, top2_2nd_expert_sampling=False, sparse_routes=sparse
        ),
        3: lambda sparse: topkgating(logits, 3, 1, 0, drop_tokens=False, sparse_routes=sparse),
    }[k]
    for sparse in (True, False):
        for ours, theirs in zip(gate(x, None, sparse), stock(sparse), strict=True):
            if torch.is_tensor(theirs):
                assert ours.dtype == theirs.dtype or ours.dim() == 0
                assert torch.equal(ours.to(theirs.dtype), theirs)
            else:
                assert ours == theirs


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("policy", ["macs", "expanded-drop"])
def test_dense_and_sparse_routes_agree(k, policy):
    gate, x = gate_of(k, policy=policy, capacity_factor=0.6), torch.randn(20, 8)
    _, rows, experts, indices, slots, weights, counts = gate(x, None, True)
    auxiliary, combine, mask, dense_counts = gate(x)
    assert combine.shape == (20, experts, int(rows)) and mask.dtype == torch.bool
    assert torch.equal(mask, combine != 0) and torch.equal(counts, dense_counts)
    assert (indices < 0).any() and auxiliary.dim() == 0
    rebuilt = torch.zeros_like(combine)
    for route in range(len(indices)):
        for token in range(20):
            if indices[route, token] >= 0:
                rebuilt[token, indices[route, token], slots[route, token]] += weights[route, token]
    assert torch.equal(rebuilt, combine)
    assert (mask.sum(0) <= 1).all()  # no two tokens in one row


def test_rows_are_the_largest_kept_load():
    gate = gate_of(2, capacity_factor=0.5)
    _, rows, _, indices, *_ = gate(torch.randn(20, 8), None, True)
    assert int(rows) == int(torch.bincount(indices[indices >= 0]).max()) <= 5


@pytest.mark.parametrize("k", [1, 2, 3])
def test_unused_tokens_do_not_affect_the_plan(k):
    gate, x = gate_of(k, capacity_factor=0.5), torch.randn(24, 8)
    used = (torch.arange(24) % 3 > 0).long()
    report = gate.macs.recorder
    *_, indices, _, _, _ = gate(x, used, True)
    assert float(report.read().tokens[0]) == 16
    if k == 1:
        assert (indices[:, used == 0] == -1).all()  # the engine sends them nowhere
    else:
        assert (indices[:, used == 0] >= 0).all()  # it routes them, and so they stay
    assert (indices[:, used == 1] == -1).any()
    for form in (used.bool(), used.float(), used.view(4, 6)):
        assert torch.equal(gate(x, form, True)[3], indices)


@pytest.mark.parametrize("k", [1, 2])
def test_tutel_gets_its_routes(monkeypatch, k):
    """A stand-in for ``tutel.moe`` with the contract that ``MOELayer`` uses."""

    class Dispatcher:
        def __init__(self, num_experts, capacity, model_dim, dispatch_dtype):
            self.experts, self.dim = num_experts, model_dim

        def update(self, indices, locations, gates, capacity):
            self.routes = list(zip(indices, locations, gates, strict=True))
            self.capacity = capacity
            for index, location, gate in self.routes:
                assert index.dtype == location.dtype == torch.int32 and gate.dtype == torch.float32
                assert index.is_contiguous() and location.is_contiguous() and gate.is_contiguous()
                assert (location < capacity).all()

        def encode(self, x):
            rows = x.new_zeros(self.experts * self.capacity, self.dim)
            for index, location, _ in self.routes:
                for token in torch.nonzero(index >= 0)[:, 0].tolist():
                    rows[int(index[token]) * self.capacity + int(location[token])] = x[token]
            return rows

        def decode(self, rows):
            out = rows.new_zeros(len(self.routes[0][0]), self.dim)
            for index, location, gate in self.routes:
                for token in torch.nonzero(index >= 0)[:, 0].tolist():
                    out[token] += gate[token] * rows[int(index[token]) * self.capacity + int(location[token])]
            return out

    tutel = types.SimpleNamespace(
        fast_dispatcher=Dispatcher, fast_cumsum_sub_one=lambda mask: torch.cumsum(mask, 0) - 1
    )
    monkeypatch.setattr(sharded_moe, "tutel_moe", tutel, raising=False)
    experts = sharded_moe_experts()
    gate = gate_of(k, capacity_factor=0.6)
    plain, with_tutel = (MOELayer(gate, experts, "ep_size_1", 1, 4, use_tutel=False).eval() for _ in range(2))
    with_tutel.use_tutel = True
    x = torch.randn(2, 10, 8)
    assert torch.allclose(plain(x, None), with_tutel(x, None), atol=1e-6)


def sharded_moe_experts():
    from deepspeed.moe.experts import Experts

    torch.manual_seed(1)
    return Experts(nn.Linear(8, 8), 4)


def test_a_mask_of_another_size_is_an_error():
    gate = gate_of(2)
    with (
        macs.modality(torch.zeros(2, 11, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"modality mask: found shape \(2, 11\), 22 tokens; the layer has 20"),
    ):
        gate(torch.randn(20, 8), None, True)


def test_the_mask_follows_either_layout():
    gate = gate_of(2)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    seen = []
    gate.macs.on_plan(lambda event: seen.append(event.tokens))
    with macs.modality(mask):
        gate(torch.randn(6, 8), None, True)
        gate.sequence_major = True
        gate(torch.randn(6, 8), None, True)
    assert seen[0].modality.tolist() == [1, 0, 0, 1, 1, 0]
    assert seen[1].modality.tolist() == [1, 1, 0, 1, 0, 0]
    assert seen[1].position.tolist() == [0, 3, 1, 4, 2, 5]


def test_dropped_routes_leave_no_trace():
    chosen = torch.tensor([[-1, 1], [0, -1]])
    weights = torch.tensor([[0.0, 0.25], [0.5, 0.0]])
    dense = dense_routes(chosen, places_of(chosen, 2, True), weights, 2, 1)
    assert dense.tolist() == [[[0.0], [0.25]], [[0.5], [0.0]]]


def test_gates_are_adopted_in_place():
    gate = TopKGate(8, 4, 2)
    before = dict(gate.state_dict())
    weight = gate.wg.weight
    runtime = Runtime()
    layer = runtime.add_layer(AnyAdapter(lambda: gate.wg.weight, Topology(4), 2))
    MACSTopKGate.adopt(gate, layer, sequence_major=False, sampling=False)
    assert gate.wg.weight is weight and list(gate.state_dict()) == list(before)


def test_noise_chooses_experts_and_leaves_their_scores_alone():
    gate, x, seen = gate_of(2, capacity_factor=1e6), torch.randn(50, 8), []
    gate.macs.on_plan(seen.append)
    gate(x, None, True)
    gate.sampling = True
    gate(x, None, True)
    plain, noisy = seen
    assert not torch.equal(plain.experts, noisy.experts)
    assert torch.equal(plain.experts[:, 0], noisy.experts[:, 0])
    assert torch.equal(plain.scores, noisy.scores)
