"""Splits of a bound among layers: what a file keeps, what a target gives every layer, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from support.cases import AnyAdapter, build_policy
from support.estimates import profile_of

from macs import MACSConfig, Modality, Profile, Runtime, Topology, Tuning
from macs.adapters import Options
from macs.records.profile import router_fingerprint
from macs.records.prometheus import Collector
from macs.records.tuning import settings_of

ROUTERS = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def tuning(**changes):
    return Tuning(
        **{
            "target_loads": torch.tensor([1.0, 0.6], dtype=torch.float64),
            "layer_loads": torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.3]], dtype=torch.float64),
            "kl": torch.tensor([[0.01, 0.0, 0.02], [0.05, 0.04, 0.06]], dtype=torch.float64),
            "policy": "macs",
            "settings": settings_of(MACSConfig(), "macs"),
            "ranks": 4,
            "tokens": 100,
            "requests": 50,
            "compensation": ["none", "none"],
            **changes,
        }
    )


def profile(of=None):
    counts = torch.ones(3, 8, dtype=torch.int64)
    return Profile(
        counts, counts.clone(), tuple(router_fingerprint(one) for one in ROUTERS), 2, of or tuning()
    )


def runtime_of(config, ranks=4, **options):
    runtime = Runtime(config, profile=profile(), **options)
    # As a pipeline stage might number them.
    layers = [runtime.add_layer(AnyAdapter(lambda r=r: r, Topology(8, ranks), 2)) for r in reversed(ROUTERS)]
    return runtime, layers


def planned(layer):
    """The rows of the busiest rank over the even share, of a batch that leans to the first experts."""
    scores = (torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) - torch.arange(8) / 4).softmax(
        1
    )
    weights, experts = scores.topk(2, 1)
    tokens = Modality.of(torch.zeros(1, 256, dtype=torch.bool)).tokens()
    plan = layer.plan(torch.randn(256, 6), experts, weights, scores, tokens)
    rows = torch.bincount(plan.experts[plan.experts >= 0], minlength=8).view(4, 2).sum(1)
    return float(rows.max()) / 128


def test_a_file_keeps_it(tmp_path):
    path = tmp_path / "profile.safetensors"
    profile().save(path)
    found = Profile.load(path)
    assert found.tuning.header() == tuning().header() and found.digest == profile().digest
    assert all(torch.equal(found.tuning.tensors()[name], one) for name, one in tuning().tensors().items())
    plain = replace(profile(), tuning=None)
    plain.save(path)
    assert Profile.load(path).tuning is None and plain.digest != profile().digest


def test_every_layer_gets_its_bound_by_its_router():
    _, layers = runtime_of(MACSConfig(target_load=0.6, split="tuned", min_tokens=0))
    assert [layer.planner.config.target_load for layer in layers] == [0.3, 0.5, 1.0]
    assert [planned(layer) for layer in layers] == pytest.approx([0.3, 0.5, 1.0], abs=0.01)


def test_between_targets_it_is_interpolated_and_beyond_them_uniform(caplog):
    _, layers = runtime_of(MACSConfig(target_load=0.8, split="tuned", min_tokens=0))
    assert [layer.planner.config.target_load for layer in layers] == pytest.approx([0.65, 0.75, 1.0])
    assert "its split was not verified" in caplog.text
    _, layers = runtime_of(MACSConfig(target_load=0.5, split="tuned", min_tokens=0))
    assert [layer.planner.config.target_load for layer in layers] == [0.5] * 3
    assert "is beyond the tuning's 0.6 to 1; it holds for every layer" in caplog.text


def test_a_target_brings_its_compensation():
    """As it was verified; of a target between two, that of the lower; unless the settings say otherwise."""
    estimates = profile_of(ROUTERS, 2).compensation
    of = replace(profile(), compensation=estimates, tuning=tuning(compensation=["none", "visual"]))

    def tables(**settings):
        policy = settings.pop("policy", "macs")
        runtime = Runtime(MACSConfig(min_tokens=0, **settings), profile=of, policy=policy)
        layer = runtime.add_layer(AnyAdapter(lambda: ROUTERS[1], Topology(8, 4), 2))
        planned(layer)
        tables = layer.served.tables(torch.device("cpu"))
        return None if tables is None else tables.table_of.tolist()

    assert tables(target_load=1.0, split="tuned") is None and tables(target_load=0.6) is None
    assert tables(target_load=0.6, split="tuned") == tables(max_kl=0.05) == [-1, 0]
    assert tables(target_load=0.8, split="tuned") == [-1, 0]
    assert tables(target_load=0.5, split="tuned") is None  # beyond what was verified
    both = replace(of, tuning=tuning(compensation=["visual", "visual"]))
    above = MACSConfig(target_load=1.02, split="tuned", min_tokens=0)
    runtime = Runtime(above, profile=both)
    layer = runtime.add_layer(AnyAdapter(lambda: ROUTERS[1], Topology(8, 4), 2))
    planned(layer)
    assert not layer.served.compensates
    runtime.use("macs", above.updated(target_load=1.0), both)
    planned(layer)
    assert layer.served.compensates
    assert tables(target_load=1.0, compensation="all") == [0, 1]
    assert tables(target_load=0.6, split="tuned", compensation="none") is None
    assert tables(target_load=0.6, compensation="all", policy="paper") is None
    assert tables(target_load=0.6, compensation="all", policy="token-drop") == [0, 1]
    with pytest.raises(
        ValueError, match=r"profile.tuning: verified with compensation, and the profile has none"
    ):
        replace(of, compensation=None)
    with pytest.raises(
        ValueError, match=r"tuning.compensation: found \['some'\], expected 2 of none, visual"
    ):
        tuning(compensation=["some"])


def test_a_target_with_other_compensation_is_more_than_a_target():
    """A graph has captured the additions, or that there are none."""
    estimates = profile_of(ROUTERS, 2).compensation
    of = replace(profile(), compensation=estimates, tuning=tuning(compensation=["none", "visual"]))
    runtime = Runtime(MACSConfig(target_load=1.0, split="tuned", min_tokens=0), profile=of)
    layer = runtime.add_layer(AnyAdapter(lambda: ROUTERS[1], Topology(8, 4), 2))
    planned(layer)
    other = MACSConfig(target_load=0.6, split="tuned", min_tokens=0)
    layer.captured = True
    with pytest.raises(RuntimeError, match="captured"):
        runtime.use("macs", other, of)
    layer.captured = False
    runtime.use("macs", other, of)
    planned(layer)
    assert layer.served.compensates


def test_an_unused_tuning_logs_a_warning(tmp_path, caplog):
    profile().save(tmp_path / "profile")
    given = {"profile": str(tmp_path / "profile"), "target_load": 0.6}
    Options.of(given).runtime()
    assert caplog.text.count("split is 'uniform': the loads by layer and compensation of") == 1
    caplog.clear()
    Options.of({**given, "policy": "token-drop"}).runtime()
    Options.of({**given, "split": "tuned"}).runtime()
    assert "split is" not in caplog.text


def test_another_number_of_ranks_logs_a_warning(caplog):
    runtime_of(MACSConfig(target_load=0.6, split="tuned"), ranks=2)
    assert "was not verified for 2 expert-parallel ranks (tuned with 4)" in caplog.text
    with pytest.raises(ValueError, match=r"config.max_kl: found 2 expert-parallel ranks \(tuned with 4\)"):
        runtime_of(MACSConfig(max_kl=0.05), ranks=2)


def verified_kl_of(runtime):
    info = next(one for one in Collector(runtime).collect() if one.name == "macs")
    return info.samples[0].labels["verified_kl"]


OTHERS = {
    "weighting": "constant",
    "visual_weight": 1.0,
    "level": "expert",
    "reroute": "group",
    "max_drop": 0.1,
    "spare_text": True,
    "compensation": "none",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_kl_holds_for_the_settings_it_was_verified_with(name, caplog):
    """Others are refused under max_kl as soon as the runtime is made, and said to be unverified otherwise."""
    assert set(OTHERS) == set(settings_of(MACSConfig(), "macs"))
    with pytest.raises(ValueError, match=rf"config.max_kl: found {name} .* \(tuned with"):
        Runtime(MACSConfig(max_kl=0.05).updated(**{name: OTHERS[name]}), profile=profile())
    same, _ = runtime_of(MACSConfig(target_load=0.6, split="tuned", min_tokens=8))
    assert not caplog.text and verified_kl_of(same) == "0.05"
    runtime = Runtime(MACSConfig(target_load=0.6, split="tuned", **{name: OTHERS[name]}), profile=profile())
    assert f"was not verified for {name}" in caplog.text
    assert verified_kl_of(runtime) == ""


def test_what_is_fixed_by_a_policy_does_not_matter():
    """Whatever the user gives for what the policy replaces."""
    of = tuning(policy="paper", settings=settings_of(MACSConfig(), "paper"))
    config = MACSConfig(max_kl=0.05, weighting="constant", level="rank")
    assert Runtime(config, policy="paper", profile=profile(of)).config == config
    with pytest.raises(ValueError, match=r"found policy macs \(tuned with paper\), level rank \(tuned"):
        Runtime(config, profile=profile(of))


def test_a_switch_takes_effect_whole_or_not_at_all():
    """One of the routers was exchanged, as by a refit: no layer gets another limit."""
    runtime, layers = runtime_of(MACSConfig(target_load=1.0, split="tuned", min_tokens=0))
    before = [layer.planner.config.target_load for layer in layers]
    exchanged = torch.randn(8, 6)
    layers[-1].adapter.router_weight = lambda: exchanged
    with pytest.raises(ValueError, match="no layer of it was measured on a router with fingerprint"):
        runtime.use("macs", MACSConfig(target_load=0.6, split="tuned", min_tokens=0), runtime.profile)
    assert [layer.planner.config.target_load for layer in layers] == before == [1.0] * 3
    assert runtime.config.target_load == 1.0


def test_a_captured_layer_stays_on_its_side_of_the_mean():
    """With a target below 1 a step has one collective less."""
    runtime, layers = runtime_of(MACSConfig(target_load=1.0, min_tokens=0))
    planned(layers[0])
    layers[0].captured = True
    with pytest.raises(RuntimeError, match=r"captured a layer with target_load 1.0, found 0.9: expected"):
        runtime.use("macs", MACSConfig(target_load=0.9, min_tokens=0), runtime.profile)
    assert runtime.config.target_load == layers[0].planner.config.target_load == 1.0


def test_a_kl_finds_the_smallest_target():
    runtime, layers = runtime_of(MACSConfig(max_kl=0.05, min_tokens=0))
    assert runtime.config.split == "tuned"
    assert [layer.planner.config.target_load for layer in layers] == [0.3, 0.5, 1.0]
    runtime.use("macs", MACSConfig(max_kl=0.01, min_tokens=0), runtime.profile)
    assert [layer.planner.config.target_load for layer in layers] == [1.0] * 3
    with pytest.raises(ValueError, match=r"config.max_kl: found 0.001, expected 0.01 or more"):
        runtime.use("macs", MACSConfig(max_kl=0.001), runtime.profile)
    assert runtime.config.max_kl == 0.01


def test_another_target_reaches_a_planner_that_ran_in_inference_mode():
    planner = build_policy("macs", MACSConfig(), Topology(4, 2), 2)
    with torch.inference_mode():
        planner.constants(torch.device("cpu"))
    planner.update_target(0.5)
    (constants,) = planner._on_device.values()
    assert constants.target_load.tolist() == [0.5]


def test_another_target_alone_is_put_where_the_planner_reads_it():
    runtime, layers = runtime_of(MACSConfig(target_load=0.9, min_tokens=0))
    planners = [layer.planner for layer in layers]
    assert planned(layers[0]) == pytest.approx(0.9, abs=0.01)
    for layer in layers[:2]:  # the third one's limit is 1
        layer.captured = True  # a graph replays what these planners read
    runtime.use("macs", MACSConfig(target_load=0.6, split="tuned", min_tokens=0), runtime.profile)
    assert [layer.planner for layer in layers] == planners and not layers[0].recorder.started
    assert planned(layers[0]) == pytest.approx(0.3, abs=0.01)
    with pytest.raises(RuntimeError, match="captured"):
        runtime.use("macs", MACSConfig(target_load=0.6, reroute="group", min_tokens=0), runtime.profile)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: MACSConfig(split="tuned", capacity_factor=1.0), "config.split: found 'tuned' beside cap"),
        (lambda: MACSConfig(max_kl=0.1, target_load=1.0), "found target_load 1.0 beside max_kl 0.1"),
        (lambda: Runtime(MACSConfig(split="tuned")), "found 'tuned' and no profile, expected one that macs"),
        (
            lambda: Runtime(MACSConfig(max_kl=1.0), profile=replace(profile(), tuning=None)),
            "found 'tuned' and a profile without a tuning",
        ),
        (lambda: tuning(target_loads=torch.tensor([0.6, 1.0], dtype=torch.float64)), "expected them falling"),
        (lambda: tuning(kl=torch.tensor([[math.nan, 0, 0], [1, 0, 0]]).double()), "tuning.kl: found"),
        (lambda: tuning(kl=torch.tensor([[-1, 0, 0], [1, 0, 0]]).double()), "expected numbers of 0 or more"),
        (lambda: tuning(ranks=0), "tuning.ranks: found 0, expected 1 or more"),
        (lambda: tuning(settings={"level": "rank"}), "tuning.settings: found"),
        (
            lambda: profile(tuning(layer_loads=torch.ones(2, 5, dtype=torch.float64))),
            "profile.tuning: found 5 layers, expected 3",
        ),
    ],
)
def test_what_cannot_be_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_naming_one_bound_takes_the_place_of_the_others():
    config = MACSConfig(max_kl=0.1)
    assert (
        config.updated(target_load=0.8).max_kl is None and config.updated(target_load=0.8).split == "uniform"
    )
    assert config.updated(capacity_factor=1.0).split == "uniform"
    assert MACSConfig(target_load=0.8, split="tuned").updated(target_load=0.7).split == "tuned"
