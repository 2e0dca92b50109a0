"""The split of a load among layers: ``target_load`` of each layer by target, and the KL it was verified with.

Shapes: N targets, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, float64

from ..checks import expect
from ..config import BOUNDS, MACSConfig
from ..policies import policy_of
from .compensation import SCOPES

TENSORS = ("target_loads", "layer_loads", "kl")


@dataclass(frozen=True)
class Tuning:
    """Splits verified on requests that they were not made from.

    target_loads float64 [N], falling: load, mean over layers. layer_loads float64 [N, L]: ``target_load`` of
    each layer, all equal where no split was better. kl float64 [N, 3]: KL in nats to the model without a
    bound at the answers' tokens, mean over requests and its 95 % interval. compensation [N]: the setting that
    was verified at each target. What it was measured with: policy; settings, as ``settings_of``; ranks:
    expert-parallel ranks; tokens: of a rank in a batch; requests: of the half that verified.
    """

    target_loads: Tensor
    layer_loads: Tensor
    kl: Tensor
    compensation: list[str]
    policy: str
    settings: dict[str, Any]
    ranks: int
    tokens: int
    requests: int

    def __post_init__(self) -> None:
        count = len(self.target_loads)
        expect("tuning.target_loads", self.target_loads, (None,), (float64,))
        expect("tuning.layer_loads", self.layer_loads, (count, None), (float64,))
        expect("tuning.kl", self.kl, (count, 3), (float64,))
        if not count or bool((self.target_loads.diff() >= 0).any()):
            raise ValueError(
                f"tuning.target_loads: found {self.target_loads.tolist()}, expected them falling"
            )
        for name in ("target_loads", "layer_loads"):
            value = getattr(self, name)
            if not bool(((value > 0) & (value < 1e6)).all()):
                raise ValueError(f"tuning.{name}: found {value.min():g} to {value.max():g}, expected above 0")
        if not bool(((self.kl >= 0) & (self.kl < torch.inf)).all()):
            raise ValueError(f"tuning.kl: found {self.kl.tolist()}, expected numbers of 0 or more")
        if len(self.compensation) != count or not set(self.compensation) <= set(SCOPES):
            raise ValueError(
                f"tuning.compensation: found {self.compensation}, expected {count} of {', '.join(SCOPES)}"
            )
        for name in ("ranks", "tokens", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"tuning.{name}: found {getattr(self, name)}, expected 1 or more")
        policy_of(self.policy)
        if settings_of(MACSConfig.from_dict(self.settings), self.policy) != self.settings:
            raise ValueError(f"tuning.settings: found {self.settings}, expected those of a policy in force")

    def differences(self, policy: str, config: MACSConfig, ranks: Iterable[int]) -> str:
        """What is not as it was when the KL was verified, in words; empty if nothing is."""
        found = {"policy": policy} | settings_of(config, policy)
        tuned = {"policy": self.policy} | self.settings
        names = [name for name in found if found[name] != tuned[name]]
        different = [f"{name} {found[name]} (tuned with {tuned[name]})" for name in names]
        other = sorted(set(ranks) - {self.ranks})
        different += [f"{count} expert-parallel ranks (tuned with {self.ranks})" for count in other]
        return ", ".join(different)

    def layer_loads_at(self, target: float) -> tuple[Tensor, bool] | None:
        """``target_load`` of every layer, float64 [L], and whether it was verified: between two verified
        targets it is interpolated, beyond them there is none."""
        index = self._index(target)
        if index is not None:
            return self.layer_loads[index], True
        below = int((self.target_loads > target).sum())
        if below in (0, len(self.target_loads)):
            return None
        high, low = self.target_loads[below - 1], self.target_loads[below]
        part = float((target - low) / (high - low))
        loads = self.layer_loads
        return loads[below] + part * (loads[below - 1] - loads[below]), False

    def compensation_at(self, target: float) -> str:
        """The compensation verified for a target; between two, that of the lower; beyond them none."""
        if self.layer_loads_at(target) is None:
            return "none"
        lower = int((self.target_loads > target + 1e-9).sum())
        return self.compensation[lower]

    def kl_at(self, target: float) -> float | None:
        """The mean KL verified for a target; none if it was not verified."""
        index = self._index(target)
        return None if index is None else float(self.kl[index, 0])

    def _index(self, target: float) -> int | None:
        same = ((self.target_loads - target).abs() < 1e-9).nonzero()
        return int(same[0, 0]) if len(same) else None

    def target_within(self, max_kl: float) -> float:
        """The smallest verified target with a KL of at most ``max_kl``.

        Raises:
            ValueError: there is none.
        """
        within = self.target_loads[self.kl[:, 0] <= max_kl]
        if not len(within):
            raise ValueError(
                f"config.max_kl: found {max_kl:g}, expected {float(self.kl[:, 0].min()):.3g} or more, the "
                "smallest KL that the profile's tuning verified for any target"
            )
        return float(within.min())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, as a file keeps them."""
        return {f"tuning_{name}": getattr(self, name).contiguous() for name in TENSORS}

    def header(self) -> dict[str, Any]:
        """The plain values, as a file keeps them."""
        return {name: value for name, value in asdict(self).items() if name not in TENSORS}

    @classmethod
    def of(cls, header: Any, tensors: Mapping[str, Tensor]) -> Tuning:
        """From what a file kept."""
        fields: dict[str, Any] = {name: tensors[f"tuning_{name}"] for name in TENSORS}
        return cls(**fields, **header)


def settings_of(config: MACSConfig, policy: str) -> dict[str, Any]:
    """The settings in force that a verified KL depends on: all but bounds, split and ``min_tokens``."""
    values = policy_of(policy).configured(config).as_dict()
    return {name: value for name, value in values.items() if name not in (*BOUNDS, "split", "min_tokens")}


def target_of(config: MACSConfig, tuning: Tuning | None) -> float | None:
    """``target_load``, or the one that a tuning verified for ``max_kl``; none under ``capacity_factor``."""
    if config.max_kl is None:
        return config.target_load
    assert tuning is not None  # ``Runtime.use`` has refused settings that need one
    return tuning.target_within(config.max_kl)


def compensation_of(config: MACSConfig, tuning: Tuning | None) -> str:
    """What is compensated under these settings: a name of ``SCOPES``."""
    if config.compensation != "tuned":
        return config.compensation
    target = target_of(config, tuning)
    if config.split != "tuned" or tuning is None or target is None:
        return "none"
    return tuning.compensation_at(target)


def tuned_config(config: MACSConfig, tuning: Tuning, row: int, warn: Callable[[str], None]) -> MACSConfig:
    """The settings with the ``target_load`` of the tuning's layer ``row``, and its ``compensation``.

    ``warn`` is called with a message where the target is not one that was verified; one beyond those holds
    for every layer.
    """
    target = target_of(config, tuning)
    assert target is not None
    loads = tuning.layer_loads_at(target)
    if loads is None:
        warn(
            f"MACS: target_load {target:g} is beyond the tuning's {float(tuning.target_loads[-1]):g} to "
            f"{float(tuning.target_loads[0]):g}; it holds for every layer"
        )
        return config.updated(target_load=target, split="uniform")
    if not loads[1]:
        warn(f"MACS: target_load {target:g} lies between verified ones; its split was not verified")
    return config.updated(
        target_load=float(loads[0][row]), split="uniform", compensation=compensation_of(config, tuning)
    )
