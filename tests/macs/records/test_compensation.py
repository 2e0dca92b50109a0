"""The estimates that a profile keeps."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.estimates import profile_of

from macs import MACSConfig, Profile, Runtime
from macs.records.compensation import Compensation

EXPERTS, FEATURES, K = 5, 12, 2

ROUTERS = [torch.randn(EXPERTS, FEATURES, generator=torch.Generator().manual_seed(one)) for one in (1, 2)]


def test_a_file_keeps_it(tmp_path):
    kept = profile_of(ROUTERS, K)
    kept.save(tmp_path / "one.safetensors")
    loaded = Profile.load(tmp_path / "one.safetensors")
    assert loaded.compensation.rank == 3 and loaded.digest == kept.digest
    for name, tensor in kept.compensation.tensors().items():
        assert torch.equal(loaded.compensation.tensors()[name], tensor)
    changed = replace(kept.compensation, mean=kept.compensation.mean + 1)
    assert replace(kept, compensation=changed).digest != kept.digest
    assert replace(kept, compensation=None).digest != kept.digest


def test_what_does_not_fit_is_refused(tmp_path):
    kept = profile_of(ROUTERS, K)
    path = tmp_path / "one.safetensors"
    kept.save(path)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    del tensors["compensation_basis"]
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=r"KeyError.*compensation_basis"):
        Profile.load(path)
    one = kept.compensation
    with pytest.raises(
        ValueError, match=r"profile.compensation: found 1 layers of 5 experts, expected 2 of 5"
    ):
        replace(kept, compensation=Compensation(*(getattr(one, name)[:1] for name in vars(one))))
    with pytest.raises(ValueError, match=r"compensation.mean: found a number that is not finite"):
        replace(one, mean=one.mean / 0)
    with pytest.raises(
        ValueError, match="5 experts of 12 features, found a layer of 5 experts of 13 features"
    ):
        one.tables(0, "all", torch.zeros(EXPERTS, 13))


@pytest.mark.parametrize(
    ("profile", "found"), [(None, "no profile"), ("bare", "a profile without compensation")]
)
def test_settings_need_what_they_ask_for(profile, found):
    given = None if profile is None else replace(profile_of(ROUTERS, K), compensation=None)
    with pytest.raises(
        ValueError, match=rf"config.compensation: found 'visual' and {found}, expected one that"
    ):
        Runtime(MACSConfig(compensation="visual"), profile=given)


def test_tables_hold_the_modalities_of_the_scope():
    one = profile_of(ROUTERS, K).compensation
    for scope, table_of in (("visual", [-1, 0]), ("all", [0, 1])):
        tables = one.tables(1, scope, ROUTERS[1])
        assert tables.table_of.tolist() == table_of and len(tables.basis) == max(table_of) + 1
        assert torch.equal(tables.coefficients[-1], one.coefficients[1, 1])
