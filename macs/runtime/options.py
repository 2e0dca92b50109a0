"""Options of a launch beside the settings: one reader for command-line flags and for config blocks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..config import PRESETS, MACSConfig, check_name, settings
from ..files import check_output, rank_and_world, read_mapping
from ..policies import POLICIES
from ..records.profile import Profile
from ..records.prometheus import check_port, serve_metrics
from ..records.recording import rank_path
from .hooks import TOKEN_IDS
from .launch import ProcessError, exit_on_sigterm
from .runtime import Runtime

Self = TypeVar("Self", bound="Options")


def _option(help: str, kind: type = str) -> Any:
    return field(default=None, metadata={"help": help, "kind": kind})


@dataclass(frozen=True)
class Options:
    """What flags and config blocks have in common; an invalid value is a ``ValueError`` that names it.

    virtual_ranks: plan, in one process, as so many expert-parallel ranks would; not a command-line flag.
    given: settings and ``preset``, by name, as they were given.
    """

    policy: str | None = _option("one of " + ", ".join(POLICIES))
    config: str | None = _option("settings, a .json or .yaml file; other settings are laid over it")
    profile: str | None = _option("a profile that macs tune wrote")
    calibrate: str | None = _option(
        "plan nothing, count assignments by expert and modality, and write a profile to this file at the end"
    )
    record: str | None = _option("write the routers' choices to this file at the end, for macs report")
    metrics_port: int | None = _option(
        "serve Prometheus metrics on this port, and in other processes on it + LOCAL_RANK", int
    )
    metrics_address: str | None = _option("where to serve metrics (localhost if not given)")
    image_token_id: int | None = _option("input id of image tokens", int)
    video_token_id: int | None = _option("input id of video tokens", int)
    audio_token_id: int | None = _option("input id of audio tokens", int)
    padding_token_id: int | None = _option("input id of padding", int)
    virtual_ranks: int = 1
    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The options, without ``given``."""
        return tuple(option.name for option in fields(cls) if option.name != "given")

    @classmethod
    def of(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """From plain values, options and settings together; an unknown name names the nearest valid one."""
        if not isinstance(values, Mapping):
            raise ValueError(f"config.macs: expected a mapping of field to value; found {values!r}")
        known = (*cls.names(), "preset", *(setting.name for setting in settings()))
        for name in values:
            check_name("macs field", name, known)
        return cls(
            **{name: value for name, value in values.items() if name in cls.names()},
            given={name: value for name, value in values.items() if name not in cls.names()},
        )

    def __post_init__(self) -> None:
        if self.policy is not None:
            check_name("macs policy", self.policy, tuple(POLICIES))
        for name in TOKEN_IDS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                self.refuse(name, "a token id")
        for name in ("config", "profile", "record", "calibrate"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                self.refuse(name, "a path")
        for name in ("record", "calibrate"):
            if getattr(self, name) is not None:  # made absolute: a script may change the directory
                path = check_output(getattr(self, name), f"config.macs.{name}")
                object.__setattr__(self, name, str(path))
        if self.metrics_port is not None:
            check_port("config.macs.metrics_port", self.metrics_port)
        elif self.metrics_address is not None:
            self.refuse("metrics_address", "a metrics_port beside it")
        if self.calibrate is not None:
            for name in ("policy", "profile", "record"):
                if getattr(self, name) is not None:
                    self.refuse(name, "none beside calibrate, which plans nothing")
        count = self.virtual_ranks
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            self.refuse("virtual_ranks", "a number of ranks, 1 or more")
        self.settings()

    def refuse(self, name: str, expected: str) -> None:
        """Raise a ``ValueError`` for an option."""
        raise ValueError(f"config.macs.{name}: found {getattr(self, name)!r}, expected {expected}")

    @property
    def token_ids(self) -> dict[str, Any]:
        """The token ids given, as arguments of ``attach_modality``."""
        return {name: getattr(self, name) for name in TOKEN_IDS if getattr(self, name) is not None}

    def settings(self) -> MACSConfig:
        """The settings given, over those of ``config``, over those of the preset, over the defaults."""
        values = {} if self.config is None else read_mapping(self.config)
        if "preset" in self.given:
            values["preset"] = self.given["preset"]
        given = {name: value for name, value in self.given.items() if name != "preset"}
        return MACSConfig.from_dict(values).updated(**given)

    def runtime(self, default_policy: str = "macs") -> Runtime:
        """The runtime, with its profile loaded, its metrics served, and recording or calibration started."""
        profile = None
        if self.profile is not None:
            if not Path(self.profile).is_file():
                self.refuse("profile", "a file that macs tune wrote")
            profile = Profile.load(self.profile)
        runtime = Runtime(
            self.settings(),
            policy=self.policy or default_policy,
            profile=profile,
            virtual_ranks=self.virtual_ranks,
        )
        split, tuning = runtime.config.split, None if profile is None else profile.tuning
        if split != "tuned" and tuning is not None and tuning.policy == runtime.policy:
            runtime.warn_once(
                f"MACS: split is {split!r}: the loads by layer and compensation of the profile's tuning are "
                "not used; set split to 'tuned' to serve with them"
            )
        if self.metrics_port is not None:
            try:
                server = serve_metrics(runtime, self.metrics_port, address=self.metrics_address)
            except ValueError as error:  # the port of this process; others have theirs
                raise ProcessError(str(error)) from error
            if not self.metrics_port:
                rank = rank_and_world()[0]
                print(f"MACS: metrics of rank {rank} on port {server.port}", file=sys.stderr)
        if self.calibrate is not None or self.record is not None:
            exit_on_sigterm()
        if self.calibrate is not None:
            runtime.start_calibration()
        if self.record is not None:
            runtime.start_routing()
        return runtime

    def finish(self, runtime: Runtime) -> None:
        """Write what was recorded or calibrated, when the script ends."""
        if self.record is not None:
            runtime.save_routing(self.record)
        if self.calibrate is not None:
            save_profile(runtime, Path(self.calibrate))


def save_profile(runtime: Runtime, path: Path) -> None:
    """Write what all ranks counted to one file; where the process group is closed by now, what this rank
    counted to a file with the rank in its name."""
    try:
        mine: Profile | None = runtime.measured_profile()
    except ValueError:
        mine = None  # a pipeline stage may have no MoE layer
    parts, (rank, world) = [mine], rank_and_world()
    if dist.is_available() and dist.is_initialized():
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    elif world > 1:
        path, rank = rank_path(path), 0
    counted = [part for part in parts if part is not None]
    if not counted:
        raise ValueError(f"calibrate {path}: no MoE layer saw a token")
    if rank == 0:
        profile = Profile.merged(counted)
        profile.save(path)
        print(f"MACS: profile of {profile.num_layers} layers in {path}", file=sys.stderr)


def add_flags(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Add a flag for every option and setting, each behind ``prefix``, such as "--moe-macs"."""
    group = parser.add_argument_group("macs", "modality-aware capacity scaling of MoE layers at inference")
    group.add_argument(prefix, action="store_true", help="plan every MoE layer with MACS")
    for option in fields(Options):
        if option.metadata:
            metadata, flag = option.metadata, f"{prefix}-{option.name.replace('_', '-')}"
            choices = tuple(POLICIES) if option.name == "policy" else None
            group.add_argument(flag, type=metadata["kind"], choices=choices, help=metadata["help"])
    group.add_argument(f"{prefix}-preset", choices=tuple(PRESETS), help="a named set of settings")
    defaults = MACSConfig()
    for setting in settings():
        metadata, default = setting.metadata, getattr(defaults, setting.name)
        options: dict[str, Any] = {"help": f"{metadata['help']} (default: {default})".replace("%", "%%")}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif metadata["choices"]:
            options["choices"] = metadata["choices"]
        else:
            options["type"] = int if metadata["whole"] else float
        group.add_argument(f"{prefix}-{setting.name.replace('_', '-')}", default=None, **options)


def options_of(arguments: argparse.Namespace, prefix: str) -> Options | None:
    """The options of a parsed command line; none without the flag ``prefix`` itself, when no other flag may
    be given."""
    start = prefix.lstrip("-").replace("-", "_")
    given = {
        name.removeprefix(start + "_"): value
        for name, value in vars(arguments).items()
        if name.startswith(start + "_") and value is not None
    }
    if getattr(arguments, start):
        return Options.of(given)
    if given:
        flags = ", ".join(f"{prefix}-{name.replace('_', '-')}" for name in given)
        raise ValueError(f"found {flags} without {prefix}, which turns MACS on")
    return None
