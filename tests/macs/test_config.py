"""Settings: ranges, names, files, presets."""

import copy
import pickle

import pytest

from macs import PRESETS, MACSConfig
from macs.config import settings


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
            "unknown level 'ranks'; did you mean 'rank'? Valid: expert, rank",
        ),
        ({"reroute": None}, "unknown reroute None"),
        ({"spare_text": 1}, "config.spare_text: found 1, expected true or false"),
        ({"priority": "weight"}, "unknown field 'priority'"),
        ({"min_tokens": 1.5}, "config.min_tokens: found 1.5, expected a whole number"),
        ({"max_drop": 1.1}, "config.max_drop: found 1.1, expected a value from 0 to 1"),
        ({"preset": "papers"}, "unknown preset 'papers'; did you mean 'fast'?"),
        ({"preset": "paper"}, "found 'paper', which is a policy; expected policy = 'paper'"),
        ({"preset": "padded"}, "found 'padded', which is a policy; expected policy = 'padded'"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ValueError, match="config") as caught:
        MACSConfig.from_dict(values)
    assert message in str(caught.value)


def test_one_bound_takes_the_place_of_the_other():
    assert (MACSConfig().target_load, MACSConfig().capacity_factor) == (1.05, None)
    assert MACSConfig(capacity_factor=1.2).target_load is None
    bounded = MACSConfig.from_dict({"preset": "fast", "target_load": 1.1})
    assert (bounded.target_load, bounded.capacity_factor) == (1.1, None)
    assert bounded.updated(capacity_factor=2.0).target_load is None
    assert bounded.updated(level="expert").target_load == 1.1
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
    safe = MACSConfig.preset("safe")
    assert (safe.target_load, safe.max_drop, safe.spare_text, safe.reroute) == (1.2, 0.01, True, "group")
    assert all(MACSConfig.preset(name) for name in PRESETS)


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        (
            "json",
            '{"capacity_factor": 1.5, "max_drop": null}',
            MACSConfig(capacity_factor=1.5, max_drop=None),
        ),
        ("yaml", "capacity_factor: 1.5\n", MACSConfig(capacity_factor=1.5)),
        ("yml", "# nothing\n", MACSConfig()),
    ],
)
def test_files(tmp_path, suffix, text, expected):
    path = tmp_path / f"macs.{suffix}"
    path.write_text(text)
    assert MACSConfig.from_file(path) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("macs.json", "{", "not valid json"),
        ("macs.yaml", "a: [", "not valid yaml"),
        ("macs.yaml", "- 1", "found '[1]', expected settings by name"),
        ("macs.json", "[1]", "found '[1]', expected settings by name"),
        ("macs.json", "[" * 30000, "not valid json"),
        ("macs.yaml", "1: 2", "expected settings by name"),
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


def test_every_setting_has_a_help_text():
    assert all(setting.metadata["help"] for setting in settings())


def test_the_least_step_follows_the_device_unless_it_is_given():
    assert MACSConfig().least_tokens("cpu") == 64 < MACSConfig().least_tokens("cuda")
    given = MACSConfig(min_tokens=7)
    assert given.least_tokens("cpu") == given.least_tokens("cuda") == 7


@pytest.mark.parametrize("preset", [["paper"], {"safe": 1}, 3])
def test_a_preset_that_is_no_name_is_refused(preset):
    with pytest.raises(ValueError, match=r"unknown preset .* Valid: fast, safe"):
        MACSConfig.from_dict({"preset": preset})


def test_settings_are_copied_and_pickled():
    given = MACSConfig(target_load=1.2)
    assert pickle.loads(pickle.dumps(given)) == given == copy.deepcopy(given)
