"""The settings of MACS: range, default and meaning of each, in one frozen dataclass."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .files import read_mapping
from .steps.weighting import WEIGHTINGS


def _setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
) -> Any:
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "low": low, "high": high, "whole": whole},
    )


TARGET_LOAD = 1.05
"""``target_load`` where no bound is given."""

BOUNDS = ("target_load", "max_kl", "capacity_factor")
"""Settings that bound the load, of which one is given."""

MIN_TOKENS = {"cpu": 64, "gpu": 1280}
"""Tokens of a rank below which a plan costs more than it saves. On a GPU: the break-even of an eager plan for
Qwen3-VL-30B-A3B's layers over 8 H100s with a load of 1.5; at 1.2 it is 3488 (docs/when.md).
On a CPU: a decoding batch, not a prompt."""


@dataclass(frozen=True)
class MACSConfig:
    """Settings of a policy; an invalid one is a ``ValueError`` that names the field.

    Symbols in brackets are the paper's (MACS, arXiv 2605.05225). The range and choices of a field are in its
    ``metadata``. A policy may fix some of them (``Policy.fixed``).
    """

    target_load: float | None = _setting(
        None,
        "largest rank's rows over the mean of the router's choice: capacities are the largest that keep to "
        "it, in every batch",
        low=1e-3,
        high=1e6,
    )
    split: str = _setting(
        "uniform",
        "uniform: target_load holds for every layer; tuned: for their mean, split among them by the "
        "profile's tuning (macs tune)",
        choices=("uniform", "tuned"),
    )
    max_kl: float | None = _setting(
        None,
        "instead of target_load: the smallest target whose KL, in nats, the profile's tuning verified to be "
        "at most this; implies split = tuned",
        low=0.0,
        high=1e3,
    )
    capacity_factor: float | None = _setting(
        None,
        "[gamma] instead of target_load: capacity of an expert, or of a rank's experts together, over its "
        "even share of the load",
        low=1e-3,
        high=1e6,
    )
    level: str = _setting(
        "rank",
        "expert: each expert has a capacity; rank: the experts of a rank share one (reroute = rank then "
        "finds no capacity; use group)",
        choices=("expert", "rank"),
    )
    weighting: str = _setting(
        "distinct",
        "semantic weight of a visual token: "
        + "; ".join(f"{name}: {one.purpose}" for name, one in WEIGHTINGS.items()),
        choices=tuple(WEIGHTINGS),
    )
    visual_weight: float = _setting(
        0.2,
        "weight of a visual token under weighting = constant, of a mean one under distinct; text weighs 1",
        low=1e-4,
        high=1.0,
    )
    reroute: str = _setting(
        "none",
        "where an assignment goes that does not fit: an expert of its rank, of the group, or nowhere",
        choices=("rank", "group", "none"),
    )
    max_drop: float | None = _setting(
        None,
        "largest share of combine weight that may be dropped; takes precedence over target_load",
        low=0.0,
        high=1.0,
    )
    compensation: str = _setting(
        "tuned",
        "what replaces a dropped assignment's expert output: none: nothing; visual, all: the profile's "
        "estimate of it, for visual tokens or for all; tuned: as the profile's tuning verified it where "
        "split = tuned, otherwise none",
        choices=("none", "visual", "all", "tuned"),
    )
    spare_text: bool = _setting(
        False,
        "text is never dropped or rerouted; where text alone exceeds target_load, the limit is exceeded and "
        "counted as unmet",
    )
    min_tokens: int | None = _setting(
        None,
        "a rank with fewer valid tokens does not plan, as in decoding ("
        + ", ".join(f"{count} on a {kind.upper()}" for kind, count in MIN_TOKENS.items())
        + ", if not given)",
        low=0,
        high=2**31,
        whole=True,
    )
    bound_given: bool = field(init=False, repr=False, default=True)
    """False where ``target_load`` is the default: a policy may have a default bound of its own."""

    def __new__(cls, *args: Any, **given: Any) -> MACSConfig:
        for name in given:
            check_name("field", name, tuple(setting.name for setting in settings()))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for setting in settings():
            _check(setting, getattr(self, setting.name))
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if len(given) > 1:
            values = " beside ".join(f"{name} {getattr(self, name)!r}" for name in given)
            raise ValueError(
                f"config.{given[-1]}: found {values}, expected one of them: each limits the load"
            )
        if not given:
            object.__setattr__(self, "target_load", TARGET_LOAD)
            object.__setattr__(self, "bound_given", False)
        if self.max_kl is not None:
            object.__setattr__(self, "split", "tuned")
        if self.split == "tuned" and self.capacity_factor is not None:
            raise ValueError(
                f"config.split: found 'tuned' beside capacity_factor {self.capacity_factor!r}, expected "
                "target_load or max_kl, which a tuning splits"
            )

    def least_tokens(self, device_type: str) -> int:
        """``min_tokens``, or its default on a device of that ``torch.device.type``."""
        if self.min_tokens is not None:
            return self.min_tokens
        return MIN_TOKENS["cpu" if device_type == "cpu" else "gpu"]

    def as_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return {setting.name: getattr(self, setting.name) for setting in settings()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MACSConfig:
        """A config from plain values; ``preset`` names the preset they are laid over."""
        if not isinstance(values, Mapping):
            raise ValueError(f"config: expected a mapping of field to value; found {type(values).__name__}")
        values = dict(values)
        preset = values.pop("preset", None)
        base = cls() if preset is None else cls.preset(preset)
        return base.updated(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> MACSConfig:
        """A config from a ``.json``, ``.yaml`` or ``.yml`` file."""
        return cls.from_dict(read_mapping(path))

    @classmethod
    def preset(cls, name: str) -> MACSConfig:
        """A named set of settings; see ``PRESETS``."""
        if name in ("paper", "padded"):
            raise ValueError(f"config.preset: found {name!r}, which is a policy; expected policy = {name!r}")
        check_name("preset", name, tuple(PRESETS))
        return cls(**PRESETS[name])

    def updated(self, **values: Any) -> MACSConfig:
        """A copy with some fields changed; an unknown field names the nearest valid one.

        Of ``BOUNDS``, naming one replaces the others.
        """
        given = [name for name in BOUNDS if values.get(name) is not None]
        if len(given) == 1:
            values = {**values, **dict.fromkeys(BOUNDS), given[0]: values[given[0]]}
            if given[0] == "capacity_factor" or self.max_kl is not None:
                values.setdefault("split", "uniform")  # a split goes with the bound that was split
        elif not self.bound_given:
            values.setdefault("target_load", None)
        return replace(self, **values)


def settings() -> list[Field[Any]]:
    """The fields of ``MACSConfig`` that a user sets."""
    return [setting for setting in fields(MACSConfig) if setting.init]


PRESETS: dict[str, dict[str, Any]] = {
    # The tightest bound there is: every rank computes the mean.
    "fast": {"capacity_factor": 1.0},
    # A loose bound that gives way to quality; overflow is rerouted before it is dropped.
    "safe": {"target_load": 1.2, "max_drop": 0.01, "spare_text": True, "reroute": "group"},
}
"""Named sets of settings, laid over the defaults. The defaults pool capacity per rank, count it in rows and
put text first, because that bounds the step itself (docs/results.md). They drop what does not fit:
rerouting changed no answer that was measured and is a third of a plan (docs/results.md)."""


def check_name(what: str, name: Any, valid: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` that names the nearest valid name unless ``name`` is one."""
    if isinstance(name, str) and name in valid:
        return
    nearest = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)
    raise ValueError(
        f"config: unknown {what} {name!r}; did you mean {nearest[0]!r}? Valid: {', '.join(valid)}"
    )


def _check(setting: Field[Any], value: Any) -> None:
    name, metadata = f"config.{setting.name}", setting.metadata
    optional = setting.default is None or setting.default is MISSING
    if value is None and optional:
        return
    if metadata["choices"]:
        check_name(setting.name, value, metadata["choices"])
        return
    if isinstance(setting.default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name}: found {value!r}, expected true or false")
        return
    whole, low, high = metadata["whole"], metadata["low"], metadata["high"]
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) < math.inf:
        expected = "a whole number" if whole else "a number"
        raise ValueError(f"{name}: found {value!r}, expected {expected} from {low:g} to {high:g}")
    if not low <= value <= high:
        raise ValueError(f"{name}: found {value!r}, expected a value from {low:g} to {high:g}")
