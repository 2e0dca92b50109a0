"""The config block: what it takes, where it is found, what it says of mistakes."""

import pytest
import torch

from deepspeed_macs import MACSBlock
from deepspeed_macs.config import block_of, take_block
from macs import MACSConfig, Profile


def test_a_block_is_its_own_fields_and_the_settings():
    block = MACSBlock.of({"capacity_factor": 1.3, "image_token_id": 7, "policy": "token-drop"})
    assert block.settings() == MACSConfig(capacity_factor=1.3)
    assert (block.image_token_id, block.policy, block.enabled) == (7, "token-drop", True)
    assert MACSBlock.of({"preset": "fast", "reroute": "none"}).settings() == MACSConfig.preset(
        "fast"
    ).updated(reroute="none")
    assert block_of(block) is block


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity_facter": 1}, "unknown macs field 'capacity_facter'; did you mean 'capacity_factor'?"),
        ({"image_tokenid": 1}, "unknown macs field 'image_tokenid'; did you mean 'image_token_id'?"),
        ({"enable": True}, "unknown macs field 'enable'; did you mean 'enabled'?"),
        ({"preset": "fastt"}, "unknown preset 'fastt'; did you mean 'fast'?"),
        ({"policy": "token_drop"}, "unknown macs policy 'token_drop'; did you mean 'token-drop'?"),
        ({"modality": "ids"}, "unknown macs modality 'ids'"),
        ({"enabled": "yes"}, "config.macs.enabled: found 'yes', expected true or false"),
        ({"image_token_id": -3}, "config.macs.image_token_id: found -3, expected a token id"),
        ({"image_token_id": True}, "config.macs.image_token_id: found True, expected a token id"),
        ({"virtual_ranks": 0}, "config.macs.virtual_ranks: found 0, expected a number of ranks"),
        ({"metrics_port": 70000}, "config.macs.metrics_port: found 70000, expected a number from 0 to 65535"),
        ({"metrics_address": "0.0.0.0"}, "macs.metrics_address: found '0.0.0.0', expected a metrics_port"),
        ({"profile": 3}, "config.macs.profile: found 3, expected a path"),
        (
            {"record": "/no/such/folder/file"},
            "config.macs.record: found no folder /no/such/folder",
        ),
        ({"capacity_factor": "big"}, "config.capacity_factor: found 'big', expected a number"),
        ([1], r"config.macs: expected a mapping of field to value; found \[1\]"),
        (True, "config.macs: expected a mapping of field to value; found True"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        MACSBlock.of(values)


def test_mistakes_are_named_also_in_a_block_made_by_hand():
    with pytest.raises(ValueError, match="unknown macs modality 'automatic'; did you mean 'auto'"):
        MACSBlock(modality="automatic")


def test_mistakes_are_named_also_where_macs_is_off():
    with pytest.raises(ValueError, match="did you mean 'capacity_factor'"):
        take_block({"macs": {"enabled": False, "capacity_facter": 1}})


def test_the_block_is_taken_out_of_either_place():
    config = {"dtype": "fp32", "macs": {"capacity_factor": 2.0}}
    rest, block = take_block(config)
    assert rest == {"dtype": "fp32"} and block.settings().capacity_factor == 2.0
    assert "macs" in config  # the user's own stays as it is
    inner = {"expert_parallel": {"enabled": True, "macs": {"capacity_factor": 3.0}}}
    rest, block = take_block(inner)
    assert rest == {"expert_parallel": {"enabled": True}} and block.settings().capacity_factor == 3.0
    assert "macs" in inner["expert_parallel"]
    assert take_block({"dtype": "fp32"}) == ({"dtype": "fp32"}, None)
    with pytest.raises(ValueError, match="found both at the top and in expert_parallel"):
        take_block({"macs": {}, **inner})


def test_profiles_are_read_from_their_path(tmp_path):
    path = tmp_path / "profile.safetensors"
    counts = torch.ones(1, 4, dtype=torch.int64)
    profile = Profile(visual=counts, text=2 * counts, fingerprints=("a",), top_k=2)
    profile.save(path)
    found = MACSBlock.of({"profile": str(path)}).runtime().profile
    assert torch.equal(found.visual, profile.visual)
    assert MACSBlock.of({}).runtime().profile is None
    with pytest.raises(ValueError, match=r"config.macs.profile: found '.*nothing', expected a file"):
        MACSBlock.of({"profile": str(tmp_path / "nothing")}).runtime()
