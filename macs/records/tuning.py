"""How a bound on the step is split among layers: each layer's bound by target, and the damage measured.

Shapes: N targets, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import expect
from ..config import MACSConfig

TENSORS = ("targets", "bounds", "damage")


@dataclass(frozen=True)
class Tuning:
    """Splits that were verified by measuring them on requests that they were not made from.

    targets float64 [N], falling: mean over layers of the busiest rank's rows over the mean rank's of the
    router's choice. bounds float64 [N, L]: ``target_load`` of every layer, the same in all where no split was
    better. damage float64 [N, 3]: KL in nats to the model without a bound, at the answers' tokens: the mean
    over requests and its 95 % interval. policy: what it was measured with; ranks: expert-parallel ranks;
    tokens: of a rank in a batch; requests: of the half that verified.
    """

    targets: Tensor
    bounds: Tensor
    damage: Tensor
    policy: str
    ranks: int
    tokens: int
    requests: int

    def __post_init__(self) -> None:
        count = len(self.targets)
        expect("tuning.targets", self.targets, (None,), (torch.float64,))
        expect("tuning.bounds", self.bounds, (count, None), (torch.float64,))
        expect("tuning.damage", self.damage, (count, 3), (torch.float64,))
        if not count or bool((self.targets.diff() >= 0).any()):
            raise ValueError(f"tuning.targets: found {self.targets.tolist()}, expected them falling")
        for name in ("targets", "bounds"):
            value = getattr(self, name)
            if not bool(((value > 0) & (value < 1e6)).all()):
                raise ValueError(f"tuning.{name}: found {value.min():g} to {value.max():g}, expected above 0")

    def bounds_at(self, target: float) -> tuple[Tensor, bool] | None:
        """Every layer's bound for a target, float64 [L], and whether it was verified: between two verified
        targets it is interpolated and was not; beyond all there is none."""
        place = self._place(target)
        if place is not None:
            return self.bounds[place], True
        below = int((self.targets > target).sum())
        if below in (0, len(self.targets)):
            return None
        high, low = self.targets[below - 1], self.targets[below]
        part = float((target - low) / (high - low))
        return self.bounds[below] + part * (self.bounds[below - 1] - self.bounds[below]), False

    def damage_at(self, target: float) -> float | None:
        """The mean KL that was verified for a target; none where the target was not."""
        place = self._place(target)
        return None if place is None else float(self.damage[place, 0])

    def _place(self, target: float) -> int | None:
        """Where a target is among the verified ones, if it is."""
        same = ((self.targets - target).abs() < 1e-9).nonzero()
        return int(same[0, 0]) if len(same) else None

    def target_within(self, max_kl: float) -> float:
        """The smallest verified target whose damage is at most ``max_kl``.

        Raises:
            ValueError: none is.
        """
        within = self.targets[self.damage[:, 0] <= max_kl]
        if not len(within):
            least = float(self.damage[:, 0].min())
            raise ValueError(
                f"config.max_kl: found {max_kl:g}, expected {least:.3g} or more, the least damage that the "
                "profile's tuning verified for any target"
            )
        return float(within.min())

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps beside the ``header``."""
        return {f"tuning_{name}": getattr(self, name).contiguous() for name in TENSORS}

    def header(self) -> dict[str, Any]:
        """What a file keeps of it as plain values."""
        return {name: value for name, value in asdict(self).items() if name not in TENSORS}

    @classmethod
    def of(cls, header: Any, tensors: Mapping[str, Tensor]) -> Tuning:
        """From what a file kept; a ``ValueError`` names what is not as it should be."""
        wanted = {name: kind for name, kind in cls.__annotations__.items() if name not in TENSORS}
        if not isinstance(header, dict) or set(header) != set(wanted):
            raise ValueError(f"tuning: its header must have the fields {', '.join(wanted)}")
        for name, kind in wanted.items():
            value = header[name]
            if type(value).__name__ != kind:
                raise ValueError(f"tuning.{name}: found {value!r}, expected {kind}")
        given: dict[str, Any] = {name: tensors[f"tuning_{name}"] for name in TENSORS}
        return cls(**given, **header)


def target_of(config: MACSConfig, tuning: Tuning | None) -> float | None:
    """``target_load``, or the one that a tuning verified for ``max_kl``; none under ``capacity_factor``."""
    if config.max_kl is None:
        return config.target_load
    assert tuning is not None  # ``Runtime.use`` has refused settings that need one
    return tuning.target_within(config.max_kl)
