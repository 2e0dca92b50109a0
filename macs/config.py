"""Every setting of MACS, its range and its meaning, in one frozen dataclass."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .files import read_mapping
from .steps.weighting import WEIGHTINGS

logger = logging.getLogger(__name__)


def _setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    optional: bool = False,
    whole: bool = False,
) -> Any:
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "optional": optional}
    metadata["whole"] = whole or (isinstance(default, int) and not isinstance(default, bool))
    return field(default=default, metadata=metadata)


TARGET_LOAD = 1.05
"""The bound where none is given."""

BOUNDS = ("target_load", "max_kl", "capacity_factor")
"""The settings that say how much a rank may take, of which one is given."""


MIN_TOKENS = {"cpu": 64, "gpu": 1024}
"""Tokens of a rank below which a plan is taken to cost more than it wins. On a GPU: where, at the costs that
the simulator states of an H100, a plan launched eagerly breaks even at Qwen3-VL-30B-A3B's layers over 8 ranks
with a busiest rank of 1.2 (docs/performance.md). On a CPU: a decoding batch, not a prompt."""


RENAMED: dict[str, str] = {"target_straggler": "target_load"}
"""Former names of settings, which are accepted, with a word about it: a bound may be below the mean, where no
rank straggles."""

RETIRED: dict[str, str] = {
    "basis": "no measurement or paper asked for capacities as shares of the weighted load",
    "bias": "biases are by threshold, as in the paper; nothing asked for the calibrated value itself",
    "conserve": "no measurement or paper asked for rescaled capacities",
    "renormalize": "scaling the surviving weights back made no difference (docs/quality-defaults.md)",
    "scope": "one capacity for the whole group's tokens gained nothing (docs/quality-defaults.md); every "
    "source rank plans its own",
}
"""Settings that are gone, and why."""

RETIRED_CHOICES: dict[tuple[str, str], str] = {
    ("priority", "weight"): "the weight alone was never better than its product with the score",
    ("similarity", "profile"): "no measured matrix has anything to win, for none at all is as good as the "
    "router's rows (docs/quality-defaults.md)",
}
"""Choices of settings that are gone, and why."""


def _by_new_name(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, under the names that settings have now."""
    for old in values.keys() & RENAMED.keys():
        new = RENAMED[old]
        if values.get(new) is not None:
            raise ValueError(f"config.{old}: found it beside {new}, its new name; expected one of them")
        logger.warning("config.%s is called %s now", old, new)
        values = {new: values[old], **{name: one for name, one in values.items() if name not in (old, new)}}
    return values


class _TakesFormerNames(type):
    """Of a class whose settings may be given by their former names."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        return super().__call__(*args, **_by_new_name(values))


@dataclass(frozen=True)
class MACSConfig(metaclass=_TakesFormerNames):
    """Settings of the planner; an invalid one is a ``ValueError`` that names the field.

    Symbols in brackets are the paper's (MACS, arXiv 2605.05225). A field's range and choices are
    in its ``metadata``, where command lines and tests find them too.
    """

    target_load: float | None = _setting(
        None,
        "most rows of a rank, over the even share: each rank's capacities are the largest that keep to "
        f"it, found anew for every batch ({TARGET_LOAD} where capacity_factor is not given either)",
        low=1e-3,
        high=1e6,
        optional=True,
    )
    split: str = _setting(
        "uniform",
        "what target_load says of each layer: the same of all, or of their mean, split among them as the "
        "profile's tuning found best (macs tune)",
        choices=("uniform", "tuned"),
    )
    max_kl: float | None = _setting(
        None,
        "in the place of target_load: the smallest target whose damage, as the profile's tuning verified it, "
        "is at most this KL in nats; takes split = tuned",
        low=0.0,
        high=1e3,
        optional=True,
    )
    capacity_factor: float | None = _setting(
        None,
        "[gamma] instead of target_load: capacity of an expert, or of a rank's experts together, "
        "over its even share of the load",
        low=1e-3,
        high=1e6,
        optional=True,
    )
    modality_strength: float = _setting(
        0.0, "[rho] how far capacity follows the batch's visual ratio", low=0.0, high=2.0
    )
    bias_threshold: float = _setting(
        0.1, "[tau] visual share of an expert, beyond one half, that makes it biased", low=0.0, high=0.5
    )
    min_capacity: float = _setting(1.0, "least capacity of an expert, in tokens", low=0.0, high=1e9)

    weighting: str = _setting(
        "distinct",
        "semantic weight of a visual token: "
        + "; ".join(f"{name}: {one.purpose}" for name, one in WEIGHTINGS.items()),
        choices=tuple(WEIGHTINGS),
    )
    entropy_sharpness: float = _setting(
        1.0,
        "[delta] steepness of the weight in the normalised entropy or distinctness",
        low=-100.0,
        high=100.0,
    )
    normalization: str = _setting(
        "batch",
        "the tokens among which entropy is normalised: a source rank's batch, or one image",
        choices=("batch", "image"),
    )
    visual_weight: float = _setting(
        0.2,
        "the weight of a visual token under weighting = constant, of the usual one under distinct",
        low=1e-4,
        high=1.0,
    )
    cost: str = _setting(
        "one",
        "what an assignment takes from a capacity: its token's weight, or one",
        choices=("weight", "one"),
    )
    priority: str = _setting(
        "product",
        "priority in admission: the router's score, or its product with the token's weight",
        choices=("score", "product"),
    )
    level: str = _setting(
        "rank",
        "what has a capacity: each expert, or the pooled experts of each rank (a full rank then has "
        "no room for reroute = rank; take group)",
        choices=("expert", "rank"),
    )
    reroute: str = _setting(
        "none",
        "where an overflowing assignment may go: an expert of its rank, of the group, or nowhere",
        choices=("rank", "group", "none"),
    )
    reroute_rounds: int = _setting(2, "proposals a token may make, one after the other", low=1, high=16)
    similarity: str = _setting(
        "router",
        "how alike two experts are: by their router rows, or all the same",
        choices=("router", "none"),
    )

    min_tokens: int | None = _setting(
        None,
        "with fewer valid tokens of a rank the layer is bypassed, as in decoding ("
        + ", ".join(f"{count} on a {kind.upper()}" for kind, count in MIN_TOKENS.items())
        + ", where none is given)",
        low=0,
        high=2**31,
        optional=True,
        whole=True,
    )
    max_drop: float | None = _setting(
        None,
        "largest share of combine weight that may be dropped; takes precedence over target_load",
        low=0.0,
        high=1.0,
        optional=True,
    )
    max_load_factor: float | None = _setting(
        None,
        "hard bound on a rank's rows, over the even share of all assignments; it and a target beside it take "
        "precedence over max_drop",
        low=1e-3,
        high=1e6,
        optional=True,
    )
    spare_text: bool = _setting(
        False,
        "text is neither dropped nor rerouted: where it alone exceeds the bound, the bound gives way, and is "
        "counted as unmet",
    )
    drop_padding: bool = _setting(False, "send padding tokens to no expert at all")

    def __post_init__(self) -> None:
        for setting in fields(self):
            _check(setting.name, getattr(self, setting.name), setting.default, setting.metadata)
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if len(given) > 1:
            found = " beside ".join(f"{name} {getattr(self, name)!r}" for name in given)
            raise ValueError(
                f"config.{given[-1]}: found {found}, expected one of them: they say how much a rank may take"
            )
        if not given:
            object.__setattr__(self, "target_load", TARGET_LOAD)
        if self.max_kl is not None:
            object.__setattr__(self, "split", "tuned")
        if self.split == "tuned" and self.capacity_factor is not None:
            raise ValueError(
                f"config.split: found 'tuned' beside capacity_factor {self.capacity_factor!r}, expected "
                "target_load or max_kl: a tuning splits these"
            )

    def least_tokens(self, device_type: str) -> int:
        """``min_tokens``, or what stands for it on a device of that ``torch.device.type``."""
        return (
            MIN_TOKENS["cpu" if device_type == "cpu" else "gpu"]
            if self.min_tokens is None
            else self.min_tokens
        )

    @property
    def pools_rows(self) -> bool:
        """Whether capacities are the bound on the rows of the ranks, and follow nothing else."""
        return self.capacity_factor is None and (self.level, self.cost) == ("rank", "one")

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
        """A config from a ``.json``, ``.yaml`` or ``.yml`` file (YAML needs pyyaml)."""
        return cls.from_dict(read_mapping(path))

    @classmethod
    def preset(cls, name: str) -> MACSConfig:
        """A named set of settings; see ``PRESETS``."""
        check_name("preset", name, tuple(PRESETS))
        return cls(**PRESETS[name])

    def updated(self, **values: Any) -> MACSConfig:
        """A copy with some fields changed; an unknown field names the nearest valid one.

        Of ``BOUNDS``, naming one takes the place of the others.
        """
        values = _by_new_name(values)
        for name in values:
            check_name("field", name, tuple(setting.name for setting in fields(self)))
        given = [name for name in BOUNDS if values.get(name) is not None]
        if len(given) == 1:
            values = {**values, **dict.fromkeys(BOUNDS), given[0]: values[given[0]]}
            if given[0] == "capacity_factor" or self.max_kl is not None:
                values.setdefault("split", "uniform")  # what was tuned went with the bound that it split
        return replace(self, **values)


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's method as published: entropy weights, per-expert capacity of weighted load that
    # follows modality, rerouting within the rank.
    "paper": {
        "capacity_factor": 1.0,
        "modality_strength": 0.5,
        "weighting": "entropy",
        "visual_weight": 0.5,
        "cost": "weight",
        "priority": "score",
        "level": "expert",
        "reroute": "rank",
    },
    # The defaults at the tightest bound there is: every rank computes the mean.
    "fast": {"capacity_factor": 1.0},
    # A loose bound with a floor under quality, for which overflow is rerouted before it is dropped.
    "safe": {"target_load": 1.2, "max_drop": 0.01, "spare_text": True, "reroute": "group"},
    # For engines that pad every expert to the fullest one (DeepSpeed's MoE layer): each expert by
    # itself, with more proposals so that overflow finds room elsewhere.
    "padded": {"capacity_factor": 1.2, "level": "expert", "reroute": "group", "reroute_rounds": 4},
}
"""Named sets of settings, laid over the defaults. The defaults pool capacity per rank and count it in
rows, text first: that bounds the step itself (docs/quality-defaults.md). They drop what does not fit:
rerouting it changed no answer that was measured, and is a third of a plan (docs/quality.md)."""


def check_name(kind: str, name: Any, valid: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` unless ``name`` is one of the valid ones; it names the nearest, or says why a
    setting is gone."""
    if name in valid:
        return
    if name in RETIRED:
        raise ValueError(f"config.{name}: this setting is gone: {RETIRED[name]}; leave it out")
    nearest = difflib.get_close_matches(str(name)[:100], valid, n=1, cutoff=0.0)
    name = name if len(str(name)) <= 100 else str(name)[:100] + "..."
    raise ValueError(
        f"config: unknown {kind} {name!r}; did you mean {nearest[0]!r}? Valid: {', '.join(valid)}"
    )


def _check(name: str, value: Any, default: Any, metadata: Mapping[str, Any]) -> None:
    if value is None and metadata["optional"]:
        return
    value = value[:100] + "..." if isinstance(value, str) and len(value) > 100 else value
    if metadata["choices"]:
        if value not in metadata["choices"]:
            if (name, value) in RETIRED_CHOICES:
                raise ValueError(
                    f"config.{name}: {value!r} is gone: {RETIRED_CHOICES[name, value]}; expected one of "
                    + ", ".join(metadata["choices"])
                )
            nearest = difflib.get_close_matches(str(value), metadata["choices"], n=1, cutoff=0.0)[0]
            raise ValueError(
                f"config.{name}: found {value!r}, expected one of {', '.join(metadata['choices'])}; "
                f"did you mean {nearest!r}?"
            )
        return
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"config.{name}: found {value!r}, expected true or false")
        return
    whole = metadata["whole"]
    kinds = (int,) if whole else (int, float)
    low, high = metadata["low"], metadata["high"]
    if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) < math.inf:
        expected = "a whole number" if whole else "a number"
        raise ValueError(f"config.{name}: found {value!r}, expected {expected} from {low:g} to {high:g}")
    if not low <= value <= high:
        raise ValueError(f"config.{name}: found {value!r}, expected a value from {low:g} to {high:g}")
