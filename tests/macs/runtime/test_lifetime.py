"""What lives how long: layers, copies, saved models, and router weights that change while serving."""

import copy
import gc
import io
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.cases import AnyAdapter
from torch import nn

import macs
from macs import MACSConfig, Profile, Runtime, Topology, modality
from macs.adapters import Owner
from macs.planner import router_similarity
from macs.runtime.patch import Patch

EXPERTS, TOP_K, HIDDEN, TOKENS = 8, 2, 16, 64
CONFIG = MACSConfig(target_load=1.0, min_tokens=0)


class Layer(nn.Module):
    """An engine's layer in small."""

    def __init__(self, runtime, experts=EXPERTS):
        super().__init__()
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        with torch.no_grad():
            self.router.weight.copy_(torch.randn(experts, HIDDEN, generator=torch.Generator().manual_seed(1)))
        self.macs = runtime.add_layer(AnyAdapter(self.rows, Topology(experts, 4), TOP_K))

    def rows(self):
        return self.router.weight

    @torch.no_grad()
    def forward(self, hidden):
        scores = self.router(hidden).softmax(1)
        weights, experts = scores.topk(TOP_K)
        tokens = self.macs.tokens(1, len(hidden), False, hidden.device)
        return self.macs.plan(hidden, experts, weights, scores, tokens)


def batch(seed=0):
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed)) + 0.5


def planned(layer):
    with modality(torch.zeros(1, TOKENS, dtype=torch.bool)):
        return layer(batch()).experts


def similarity_of(layer):
    (constants,) = layer.macs.planner._on_device.values()
    return constants.affinity


NEW = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(7))
RANK = torch.arange(EXPERTS) // 2
SIMILAR = router_similarity(NEW) * (RANK[:, None] == RANK)
"""As the planner of ``Layer`` has it under the paper's policy, which reroutes within a rank."""


def load(layer):
    layer.load_state_dict({"router.weight": NEW})


def write(layer):
    layer.router.weight.data.copy_(NEW)  # which leaves ``_version`` at what it was


def replace(layer):
    layer.router.weight = nn.Parameter(NEW.clone())


def swap(layer):
    layer.router.weight.data = NEW.clone()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", [load, replace, swap, write])
def test_refresh_puts_the_new_weights_similarity_in_place(change, inference):
    with torch.inference_mode(inference):
        layer = Layer(Runtime(CONFIG, policy="paper"))
        planned(layer)
        place = similarity_of(layer).data_ptr()
        change(layer)
        layer.macs.runtime.refresh()
    assert torch.equal(similarity_of(layer), SIMILAR)
    assert similarity_of(layer).data_ptr() == place  # where a captured graph reads it
    fresh = Layer(Runtime(CONFIG, policy="paper"))
    change(fresh)
    assert torch.equal(planned(layer), planned(fresh))


def test_refresh_fetches_what_an_engine_keeps_elsewhere():
    runtime, kept = Runtime(CONFIG, policy="paper"), torch.ones(EXPERTS, HIDDEN)
    layer = runtime.add_layer(
        AnyAdapter(lambda: kept, Topology(EXPERTS), TOP_K, refetch=lambda: kept.copy_(NEW))
    )
    layer.prepare(torch.device("cpu"))
    runtime.refresh()
    (constants,) = layer.planner._on_device.values()
    assert torch.equal(constants.affinity, router_similarity(NEW))


def test_a_runtime_keeps_no_deleted_models_layers():
    runtime = Runtime(CONFIG)
    first, second = Layer(runtime), Layer(runtime)
    assert [layer.index for layer in runtime.layers] == [0, 1]
    gone = weakref.ref(first), weakref.ref(first.macs)
    del first
    gc.collect()
    assert [one() for one in gone] == [None, None] and runtime.layers == [second.macs]


def test_copies_plan_alike_and_by_themselves():
    runtime = Runtime(CONFIG, policy="paper")
    layer = Layer(runtime)
    expected = planned(layer)
    copied = copy.deepcopy(layer)
    assert copied.macs is not layer.macs and copied.macs.runtime is runtime and len(runtime.layers) == 2
    assert torch.equal(planned(copied), expected)
    write(copied)
    runtime.refresh()
    assert torch.equal(similarity_of(copied), SIMILAR)
    assert not torch.equal(similarity_of(layer), SIMILAR)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_saved_layers_come_back_with_their_settings(way):
    layer = Layer(Runtime(CONFIG, policy="rank-balanced"))
    expected = planned(layer)
    if way == "pickle":
        restored = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        restored = torch.load(file, weights_only=False)
    runtime = restored.macs.runtime
    assert runtime is not layer.macs.runtime and runtime.layers == [restored.macs]
    assert (runtime.policy, runtime.config) == ("rank-balanced", CONFIG)
    assert torch.equal(planned(restored), expected)
    assert len(runtime.reports()[0].records) == 1


def test_layers_of_other_sizes_are_no_calibration():
    runtime = Runtime(CONFIG)
    kept = [Layer(runtime, 4), Layer(runtime, 8)]
    with pytest.raises(ValueError, match=r"found layers of 4, 8 experts \(as in PR-MoE\)"):
        runtime.measured_profile()
    assert len(kept) == 2


def test_what_is_no_profile_or_config_is_named():
    with pytest.raises(TypeError, match=r"Runtime\.use: found profile 5, expected a macs\.Profile"):
        Runtime(profile=5)
    with pytest.raises(TypeError, match=r"Runtime\.use: found profile 'a\.safetensors'"):
        Runtime().use("macs", CONFIG, "a.safetensors")
    with pytest.raises(TypeError, match=r"Runtime\.use: found config"):
        Runtime({"capacity_factor": 1.0})


def test_profiles_have_a_digest_of_all_that_is_in_them():
    counts = torch.ones(1, 4, dtype=torch.int64)
    made = [
        Profile(counts, counts, ("a",), 2),
        Profile(counts * 2, counts, ("a",), 2),
        Profile(counts, counts, ("b",), 2),
        Profile(counts, counts, ("a",), 1),
    ]
    assert len({one.digest for one in made}) == 4
    assert Profile(counts.clone(), counts.clone(), ("a",), 2).digest == made[0].digest
    assert macs.Runtime(profile=made[0]).settings(False)["profile"] == made[0].digest


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_installations_end_in_any_order(order):
    engine = SimpleNamespace(run="stock", other="stock")
    installed = Patch(lambda: [(engine, "run", "ours"), (engine, "other", "ours")])
    undo = [installed.add(number) for number in range(3)]
    left = [0, 1, 2]
    for one in order:
        assert engine.run == "ours" and installed.current == left[-1]
        left.remove(one)
        undo[one]()
        undo[one]()
    assert engine.run == engine.other == "stock" and installed.current is None
    end = installed.add(7)
    engine.other = "theirs, around ours"  # wrapped by somebody else since
    end()
    assert engine.run == "stock" and engine.other == "theirs, around ours"
    installed.add(8)  # ours is still there: once is enough
    assert engine.run == "ours" and engine.other == "theirs, around ours"


def test_an_installation_that_fails_changes_nothing():
    engine = SimpleNamespace(run="stock")

    def replacements():
        yield engine, "run", "ours"
        raise ValueError("no such class")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such class"):
            Patch(replacements).add(1)
    assert engine.run == "stock"


class Owning(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.owner = Owner(self)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_an_adapter_of_a_copy_refers_to_the_copy(copied):
    model = torch.nn.Sequential(Owning())
    other = copied(model)
    assert other[0].owner() is other[0] is not model[0] and model[0].owner() is model[0]
