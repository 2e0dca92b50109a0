"""The ``"macs"`` block of a DeepSpeed config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from macs import POLICIES, TOKEN_IDS, MACSConfig, Profile
from macs.config import RENAMED, check_name
from macs.files import check_output
from macs.serving.exporter import check_port
from macs.serving.logs import FORMATS

EXPERT_PARALLEL = "expert_parallel"
MACS = "macs"
MODALITIES = ("auto", "manual", "text")


@dataclass(frozen=True)
class MACSBlock:
    """A ``"macs"`` block, read. Its fields, beside every field of ``MACSConfig`` and ``preset``:

    enabled             False leaves DeepSpeed exactly as it is
    policy              "macs" or a baseline, see ``macs.build_policy``
    profile             path of a calibration profile
    modality            "auto": visual tokens are found in what the model is called with, by the token
                        ids below or those in the model's config, or by ``mm_token_type_ids``;
                        "manual": the script sets ``macs.modality`` around its calls; "text": the model
                        has no modality but text. Padding is told by the calls in any case
    image_token_id, video_token_id, audio_token_id, padding_token_id
    sequence_major      hidden states are [S, B, D] in ``deepspeed.moe.layer.MoE``, not [B, S, D]
    second_expert_sampling  with k = 2, keep the noise the gate is configured to choose its second
                        expert with; otherwise the choice is deterministic
    record              path of a file for what the routers chose, written when the process ends; see
                        ``macs.Recording``
    metrics_port        serve Prometheus metrics on this port and, in other processes, on it + LOCAL_RANK
    metrics_address     where to listen; this machine alone, if it is not given
    log_format          write MACS's log to stderr, as "text" or as lines of "json"
    virtual_ranks       plan, in one process, as so many expert-parallel ranks would
    given               the fields of ``MACSConfig`` and ``preset``, as they are written
    """

    enabled: bool = True
    policy: str = "macs"
    profile: str | os.PathLike[str] | None = None
    modality: str = "auto"
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    padding_token_id: int | None = None
    sequence_major: bool = False
    second_expert_sampling: bool = False
    record: str | os.PathLike[str] | None = None
    metrics_port: int | None = None
    metrics_address: str | None = None
    log_format: str | None = None
    virtual_ranks: int = 1
    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: MACSBlock | Mapping[str, Any]) -> MACSBlock:
        """From the block as it is written; an unknown or misspelt field names the nearest valid one."""
        if isinstance(values, MACSBlock):
            return values
        if not isinstance(values, Mapping):
            raise ValueError(f"config.macs: expected a mapping of field to value; found {values!r}")
        own = tuple(one.name for one in fields(cls) if one.name != "given")
        settings = tuple(one.name for one in fields(MACSConfig))
        for name in values.keys() - RENAMED.keys():
            check_name("macs field", name, (*own, "preset", *settings))
        return cls(
            **{name: value for name, value in values.items() if name in own},
            given={name: value for name, value in values.items() if name not in own},
        )

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> None:
            raise ValueError(f"config.macs.{name}: found {getattr(self, name)!r}, expected {expected}")

        for name in ("enabled", "sequence_major", "second_expert_sampling"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "true or false")
        check_name("macs policy", self.policy, tuple(POLICIES))
        check_name("macs modality", self.modality, MODALITIES)
        for name in TOKEN_IDS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                refuse(name, "a token id")
        count = self.virtual_ranks
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            refuse("virtual_ranks", "a number of ranks, 1 or more")
        if self.metrics_port is not None:
            check_port("config.macs.metrics_port", self.metrics_port)
        if self.metrics_address is not None and (
            self.metrics_port is None or not isinstance(self.metrics_address, str)
        ):
            refuse("metrics_address", "an address, beside a metrics_port")
        if self.log_format is not None:
            check_name("macs log_format", self.log_format, FORMATS)
        for name in ("profile", "record"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                refuse(name, "a path")
        if self.record is not None:
            check_output(self.record, "config.macs.record")
        self.settings()  # an error in it is told here

    def settings(self, preset: str | None = None) -> MACSConfig:
        """The settings given, laid over their own preset, or, where they name none, over this one."""
        default = {} if preset is None else {"preset": preset}
        return MACSConfig.from_dict({**default, **self.given})

    def load_profile(self) -> Profile | None:
        """The profile at ``profile``; an error names the field if there is none."""
        if self.profile is None:
            return None
        if not Path(self.profile).is_file():
            raise ValueError(f"config.macs.profile: found no file {str(self.profile)!r}")
        return Profile.load(self.profile)


def take_block(config: Mapping[str, Any]) -> tuple[dict[str, Any], MACSBlock | None]:
    """A DeepSpeed config without its MACS block, and the block; the config passed in stays as it is.

    The block is at the top, or in ``expert_parallel``; in both places is an error.
    """
    rest = dict(config)
    found = [rest.pop(MACS)] if MACS in rest else []
    inner = rest.get(EXPERT_PARALLEL)
    if isinstance(inner, Mapping) and MACS in inner:
        rest[EXPERT_PARALLEL] = {name: value for name, value in inner.items() if name != MACS}
        found.append(inner[MACS])
    if len(found) > 1:
        raise ValueError("config.macs: found both at the top and in expert_parallel, expected one of them")
    return rest, MACSBlock.of(found[0]) if found else None
