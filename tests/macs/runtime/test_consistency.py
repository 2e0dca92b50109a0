"""Ranks that must run alike, over gloo: a difference is named, nobody hangs, no batch is taken for
another.
"""

import copy
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.ranks import on_ranks

import macs.runtime.state
from macs import MACSConfig, Profile, Runtime, Topology
from macs.adapters import CallReader, LayerAdapter, ModalityHook
from macs.records.profile import router_fingerprint
from macs.runtime.consistency import RankMismatch

pytestmark = pytest.mark.engine
TOKENS = 80
IDS = torch.ones(1, TOKENS, dtype=torch.int64)
SHORT = timedelta(seconds=4)
EXPERTS, TOP_K, HIDDEN = 8, 2, 16
ROUTER = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))


class Adapter(LayerAdapter):
    def router_weight(self):
        return ROUTER


class Layer(torch.nn.Module):
    """fails: raise between the plan and the exchange."""

    def __init__(self, runtime):
        super().__init__()
        group = dist.group.WORLD
        topology = Topology(EXPERTS, group.size(), sources=(group.rank(),))
        self.macs = runtime.add_layer(Adapter(topology, TOP_K, group))
        self.fails = False

    def forward(self, hidden):
        with self.macs.forward_pass(len(hidden), hidden.device, self.training) as acts:
            scores = (hidden @ ROUTER.T).softmax(1)
            weights, experts = scores.topk(TOP_K)
            if acts:
                tokens = self.macs.tokens(1, len(hidden), False, hidden.device)
                self.macs.plan(hidden, experts, weights, scores, tokens)
            if self.fails:
                raise RuntimeError("in the layer")
            total = hidden.sum(0)
            dist.all_reduce(total)
        return hidden + total


class Model(torch.nn.Module):
    def __init__(self, runtime, layers=3):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(runtime) for _ in range(layers))
        self.fails_before = None
        ModalityHook(self, CallReader(text_only=True))
        self.eval()

    def forward(self, input_ids):
        hidden = torch.randn(input_ids.numel(), HIDDEN, generator=torch.Generator().manual_seed(1))
        for index, layer in enumerate(self.layers):
            if self.fails_before == index:
                raise KeyError("between the layers")
            hidden = layer(hidden)
        return hidden


def profile():
    counts = torch.full((1, EXPERTS), 3, dtype=torch.int64)
    return Profile(counts, counts.clone(), (router_fingerprint(ROUTER),), TOP_K)


USES = {
    "policy": lambda runtime: runtime.use("token-drop", MACSConfig()),
    "profile": lambda runtime: runtime.use("macs", MACSConfig(), profile()),
    "config.target_load": lambda runtime: runtime.use("macs", MACSConfig(target_load=1.5)),
    "config.min_tokens": lambda runtime: runtime.use("macs", MACSConfig(min_tokens=8)),
    "config.level": lambda runtime: runtime.use("macs", MACSConfig(level="expert")),
}


@pytest.mark.parametrize("field", list(USES))
@pytest.mark.parametrize("ran", [False, True])
@on_ranks(2, timeout=60)
def test_what_use_gets_is_compared_before_it_takes_effect(field, ran):
    runtime = Runtime()
    model = Model(runtime)
    if ran:
        model(IDS)
    began = time.monotonic()
    change = USES[field] if dist.get_rank() == 1 else lambda runtime: runtime.use("macs", MACSConfig())
    with pytest.raises(RankMismatch, match=rf"the ranks \[0, 1\] .* different settings: {field}: .* on rank"):
        change(runtime)
    assert time.monotonic() - began < 10
    assert (runtime.policy, runtime.config, runtime.profile) == ("macs", MACSConfig(), None)
    model(IDS)  # as before


@on_ranks(2, timeout=60, patience=SHORT)
def test_a_use_of_one_rank_alone_is_withdrawn():
    runtime = Runtime()
    model = Model(runtime)
    model(IDS)
    if dist.get_rank() == 1:
        time.sleep(2 * SHORT.total_seconds())  # too late: rank 0 has given up
    with pytest.raises(RankMismatch, match=r"target_load: 1.05, 1.5|withdrawn after the timeout"):
        runtime.use("macs", MACSConfig(target_load=1.5))
    assert runtime.config == MACSConfig()
    if dist.get_rank() == 0:
        for again in (lambda: model(IDS), lambda: runtime.use("macs", MACSConfig(target_load=1.5))):
            with pytest.raises(RuntimeError, match="an earlier forward pass on rank 0"):
                again()


@on_ranks(2, timeout=60)
def test_after_a_difference_that_all_ranks_raised_serving_continues():
    runtime = Runtime()
    model = Model(runtime)
    runtime.enabled = dist.get_rank() == 0
    with pytest.raises(RankMismatch, match="enabled"):
        model(IDS)
    runtime.enabled = True
    assert model(IDS).shape == (TOKENS, HIDDEN)


@on_ranks(2, timeout=60)
def test_reports_without_a_step_are_an_error_on_every_rank():
    runtime = Runtime()
    model = Model(runtime)
    if dist.get_rank() == 0:  # memory for records, and none in it
        for layer in runtime.layers:
            layer.prepare(torch.device("cpu"))
    with pytest.raises(ValueError, match="no step was recorded"):
        runtime.reports(dist.group.WORLD)
    assert len(model.layers) == 3


SWITCHES = {
    "enabled": lambda runtime, model: setattr(runtime, "enabled", False),
    "calibrating": lambda runtime, model: runtime.start_calibration(),
    "training": lambda runtime, model: model.train(),
}


@pytest.mark.parametrize("field", list(SWITCHES))
@on_ranks(2, timeout=60, patience=SHORT)
def test_a_switch_of_one_rank_alone_raises_on_that_rank(field):
    runtime = Runtime()
    model = Model(runtime)
    model(IDS)
    if dist.get_rank() == 1:
        SWITCHES[field](runtime, model)
        with pytest.raises(RankMismatch, match=rf"rank 1 changed {field}: .* ranks \[0\] of its group"):
            model(IDS)
        dist.destroy_process_group()
    else:
        with pytest.raises(RuntimeError):  # the collective's timeout, or the other rank has left
            model(IDS)
        with pytest.raises(RuntimeError, match="an earlier forward pass on rank 0 ended before its last"):
            model(IDS)


@on_ranks(2)
def test_ranks_that_differ_from_the_first_pass_on_raise():
    macs.runtime.state.__version__, version = f"0.0.{dist.get_rank()}", macs.runtime.state.__version__
    try:
        with pytest.raises(RankMismatch, match=r"macs version: '0\.0\.\d' on rank"):
            Model(Runtime())(IDS)
    finally:
        macs.runtime.state.__version__ = version


@on_ranks(2)
def test_ranks_that_change_alike_go_on_and_a_steady_pass_asks_nothing():
    runtime, small = Runtime(), IDS[:, :3]
    model = Model(runtime)
    for step, ids in enumerate((IDS, small, IDS, small, IDS)):
        time.sleep(0.01 * dist.get_rank())
        if step == 1:
            runtime.use("macs", MACSConfig(target_load=1.2))
        if step == 2:
            runtime.enabled = False
        if step == 3:
            runtime.enabled = True
            runtime.use("token-drop", MACSConfig(target_load=1.2))
        model(ids)
    store = dist.distributed_c10d._get_default_store()
    runtime.use("macs", MACSConfig(target_load=0.9))
    before = store.num_keys()
    for _ in range(3):
        model(IDS)
        model(small)
    assert store.num_keys() == before > 0


@on_ranks(2, timeout=60)
def test_the_first_pass_may_be_too_small_to_plan_on_one_rank():
    model = Model(Runtime())
    for small in (0, 1):
        ids = IDS[:, :3] if dist.get_rank() == small else IDS
        assert model(ids).shape == (ids.numel(), HIDDEN)


@on_ranks(2)
def test_a_rank_that_is_late_after_a_switch_of_all_is_waited_for():
    """Of a switch alone, of MACS off and on, of calibration, of training and back."""
    runtime = Runtime()
    model = Model(runtime)
    time.sleep(1.5 * dist.get_rank())  # nor is one that is late to its first pass
    model(IDS)
    for number, switch in enumerate(
        (
            lambda: runtime.use("macs", MACSConfig(target_load=1.2)),
            lambda: setattr(runtime, "enabled", False),
            lambda: setattr(runtime, "enabled", True),
            runtime.start_calibration,
            runtime.stop_calibration,
            model.train,
            model.eval,
        )
    ):
        switch()
        time.sleep(0.3 * (dist.get_rank() == number % 2))
        assert model(IDS).shape == (TOKENS, HIDDEN)


@on_ranks(2, timeout=60)
def test_a_model_that_is_built_once_more_on_one_rank_goes_on():
    model = Model(Runtime())
    model(IDS)
    if dist.get_rank() == 1:
        model = Model(Runtime())
    started = time.monotonic()
    for _ in range(3):
        assert model(IDS).shape == (TOKENS, HIDDEN)
    assert time.monotonic() - started < SHORT.total_seconds()


@pytest.mark.parametrize("where", ["in a layer", "between layers", "before the first layer"])
@on_ranks(2, patience=timedelta(seconds=8))
def test_after_an_error_half_way_a_rank_sends_no_other_batch(where):
    model = Model(Runtime())
    model(IDS)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError):  # noqa: PT012 - rank 1 leaves at some collective of the two
            for _ in range(2):
                model(IDS)
        return
    model.layers[1].fails = where == "in a layer"
    model.fails_before = {"between layers": 2, "before the first layer": 0}.get(where)
    with pytest.raises(RuntimeError if where == "in a layer" else KeyError):
        model(IDS)
    model.layers[1].fails, model.fails_before = False, None
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"an earlier forward pass on rank 1 .* ranks \[0, 1\]"):
            model(IDS)


@on_ranks(2)
def test_an_error_after_the_last_layer_breaks_nothing_off():
    model = Model(Runtime())
    fails = model.register_forward_hook(lambda *_: [][0])
    with pytest.raises(IndexError):
        model(IDS)
    fails.remove()
    assert model(IDS).shape == (TOKENS, HIDDEN)


@on_ranks(2)
def test_without_a_store_nothing_is_compared():
    real = dist.distributed_c10d._get_default_store
    dist.distributed_c10d._get_default_store = lambda: None
    try:
        runtime = Runtime()
        model = Model(runtime)
        runtime.use("macs", MACSConfig(target_load=1.0 + dist.get_rank()))
        assert model(IDS).shape == (TOKENS, HIDDEN)
    finally:
        dist.distributed_c10d._get_default_store = real


@on_ranks(2)
def test_a_copied_model_is_compared_too():
    runtime = Runtime()
    model = Model(runtime)
    model(IDS)
    copied = copy.deepcopy(model)
    assert len(runtime.layers) == 6
    assert torch.equal(copied(IDS), model(IDS))
    assert all(layer.macs.consistency is not None for one in (model, copied) for layer in one.layers)
