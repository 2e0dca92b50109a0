"""Settings: ranges, names, files, presets."""

import json
from dataclasses import fields

import pytest

from macs import PRESETS, MACSConfig

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
"""A few lines of YAML that stand for gigabytes."""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity_facter": 1.0}, "unknown field 'capacity_facter'; did you mean 'capacity_factor'?"),
        ({"capacity_factor": 0.0}, "config.capacity_factor: found 0.0, expected a value from 0.001 to 1e+06"),
        ({"capacity_factor": "1"}, "config.capacity_factor: found '1', expected a number"),
        ({"capacity_factor": True}, "config.capacity_factor: found True, expected a number"),
        ({"capacity_factor": float("nan")}, "config.capacity_factor: found nan"),
        ({"capacity_factor": float("inf")}, "config.capacity_factor: found inf"),
        (
            {"level": "ranks"},
            "config.level: found 'ranks', expected one of expert, rank; did you mean 'rank'?",
        ),
        ({"reroute": None}, "config.reroute: found None"),
        ({"drop_padding": 1}, "config.drop_padding: found 1, expected true or false"),
        ({"scope": "group"}, "config.scope: this setting is gone: one capacity for the whole group"),
        ({"basis": "tokens"}, "config.basis: this setting is gone: no measurement or paper asked"),
        ({"priority": "weight"}, "config.priority: 'weight' is gone: the weight alone"),
        ({"similarity": "profile"}, "config.similarity: 'profile' is gone: no measured matrix"),
        ({"min_tokens": 1.5}, "config.min_tokens: found 1.5, expected a whole number"),
        ({"reroute_rounds": 0}, "config.reroute_rounds: found 0, expected a value from 1 to 16"),
        ({"max_drop": 1.1}, "config.max_drop: found 1.1, expected a value from 0 to 1"),
        ({"preset": "papers"}, "unknown preset 'papers'; did you mean 'paper'?"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ValueError, match="config") as caught:
        MACSConfig.from_dict(values)
    assert message in str(caught.value)


def test_optional_bounds_may_be_absent():
    assert MACSConfig(max_drop=None, max_load_factor=None).max_drop is None


def test_one_bound_takes_the_place_of_the_other():
    assert (MACSConfig().target_load, MACSConfig().capacity_factor) == (1.05, None)
    assert MACSConfig(capacity_factor=1.2).target_load is None
    bounded = MACSConfig.from_dict({"preset": "paper", "target_load": 1.1})
    assert (bounded.target_load, bounded.capacity_factor) == (1.1, None)
    assert bounded.updated(capacity_factor=2.0).target_load is None
    assert bounded.updated(level="rank").target_load == 1.1
    for both in (
        lambda: MACSConfig(capacity_factor=1.2, target_load=1.1),
        lambda: MACSConfig.from_dict({"capacity_factor": 1.2, "target_load": 1.1}),
    ):
        with pytest.raises(
            ValueError, match=r"target_load 1\.1 beside capacity_factor 1\.2, expected one of"
        ):
            both()


def test_a_preset_is_a_base_for_changes():
    config = MACSConfig.from_dict({"preset": "fast", "capacity_factor": 1.2})
    assert config.level == "rank" and config.capacity_factor == 1.2
    paper = MACSConfig.preset("paper")
    assert (paper.capacity_factor, paper.modality_strength, paper.weighting) == (1.0, 0.5, "entropy")
    assert (paper.cost, paper.priority, paper.level, paper.reroute) == ("weight", "score", "expert", "rank")
    assert all(MACSConfig.preset(name) for name in PRESETS)


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"macs.{suffix}"
    text = (
        json.dumps({"capacity_factor": 1.5, "max_drop": None})
        if suffix == "json"
        else "capacity_factor: 1.5\n"
    )
    path.write_text(text)
    assert MACSConfig.from_file(path) == MACSConfig(capacity_factor=1.5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("macs.json", "{", "not valid JSON"),
        ("macs.yaml", "a: [", "not valid YAML"),
        ("macs.yaml", "- 1", "found list at the top, expected settings by name"),
        ("macs.json", "[1]", "found list at the top, expected settings by name"),
        ("macs.json", '{"capacity_factor": 1' + "0" * 400 + "}", "found a number of 1329 bits"),
        ("macs.yaml", "capacity_factor: 1" + "0" * 400, "found a number of 1329 bits"),
        ("macs.json", "[" * 30000, "found more than 32 levels"),
        ("macs.json", '{"a":' * 200 + "1" + "}" * 200, "found more than 32 levels"),
        ("macs.yaml", "[" * 3000, "found more than 32 levels"),
        ("macs.yaml", "1: 2", "found the key 1, expected a name"),
        ("macs.json", '{"cost": "one", "cost": "weight"}', "found the key 'cost' twice"),
        ("macs.yaml", "cost: one\ncost: weight", "found the key 'cost' twice"),
        ("macs.yaml", BOMB, "found the alias *a, expected values written out"),
        ("macs.json", '{"cost": "' + "x" * 3_000_000 + '"}', "found 3000012 bytes, expected settings"),
        ("macs.json", '{"cost": "' + "x" * 60_000 + '"}', "expected one of weight, one"),
        ("macs.json", '{"' + "x" * 60_000 + '": 1}', "unknown field"),
        ("macs.json", '{"capacity_factor": 1e999}', "found inf, expected a number"),
        ("macs.toml", "", "expected a .json, .yaml or .yml file"),
    ],
)
def test_files_that_are_no_config(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match="config") as caught:
        MACSConfig.from_file(path)
    assert message in str(caught.value) and len(str(caught.value)) < 2000


def test_an_empty_yaml_file_is_the_default(tmp_path):
    path = tmp_path / "macs.yaml"
    path.write_text("# nothing\n")
    assert MACSConfig.from_file(path) == MACSConfig()


def test_every_setting_says_what_it_is():
    assert all(setting.metadata["help"] for setting in fields(MACSConfig))


def test_the_least_step_follows_the_device_unless_it_is_given():
    assert MACSConfig().least_tokens("cpu") == 64 < MACSConfig().least_tokens("cuda")
    given = MACSConfig(min_tokens=7)
    assert given.least_tokens("cpu") == given.least_tokens("cuda") == 7


@pytest.mark.parametrize(
    "made",
    [
        lambda values: MACSConfig(**values),
        lambda values: MACSConfig().updated(**values),
        lambda values: MACSConfig.from_dict({"preset": "paper", **values}),
    ],
)
def test_a_former_name_is_taken_and_said(made, caplog):
    config = made({"target_straggler": 1.2})
    assert (config.target_load, config.capacity_factor) == (1.2, None)
    assert "config.target_straggler is called target_load now" in caplog.text
    with pytest.raises(ValueError, match="found it beside target_load, its new name"):
        made({"target_straggler": 1.2, "target_load": 1.0})
