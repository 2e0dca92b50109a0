"""Profiles: how much of each modality every expert serves, measured once and kept in a file.

Shapes: L MoE layers, E experts. The file is safetensors with a JSON header.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import FLOATS, expect
from ..files import save_tensors
from ..tokens import Tokens
from .compensation import Compensation
from .tuning import Tuning

FORMAT = "macs-profile-2"


def router_fingerprint(router_weight: Tensor) -> str:
    """An identifier of a router.

    Taken over the weights in bfloat16, so that a model has one fingerprint in either precision.

    Args:
        router_weight: [E, D], any float dtype.

    Returns:
        16 hex digits.
    """
    expect("router_weight", router_weight, (None, None), FLOATS)
    numbers = router_weight.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16)
    shape = str(tuple(numbers.shape)).encode()
    return hashlib.sha256(shape + bytes(numbers.flatten().numpy().tobytes())).hexdigest()[:16]


@dataclass(frozen=True)
class Profile:
    """Which expert serves which modality, for every MoE layer of one model.

    visual, text: int64 [L, E], assignments of visual and of text tokens to each expert on the
    calibration set. fingerprints: L strings of ``router_fingerprint``. top_k: the router's k. tuning: the
    split of a load among these layers, compensation: estimates of their experts, if they were measured.
    """

    visual: Tensor
    text: Tensor
    fingerprints: tuple[str, ...]
    top_k: int
    tuning: Tuning | None = None
    compensation: Compensation | None = None

    def __post_init__(self) -> None:
        expect("profile.visual", self.visual, (None, None), (torch.int64,))
        layers, experts = self.visual.shape
        expect("profile.text", self.text, (layers, experts), (torch.int64,))
        for name, counts in (("visual", self.visual), ("text", self.text)):
            if bool((counts < 0).any()):
                raise ValueError(f"profile.{name}: found a negative count")
        if len(self.fingerprints) != layers:
            raise ValueError(
                f"profile.fingerprints: found {len(self.fingerprints)}, expected {layers}, one a layer"
            )
        if len(set(self.fingerprints)) != layers:
            raise ValueError(
                "profile: found layers with equal router weights, expected different ones: a profile finds "
                "its layers by them"
            )
        if not 1 <= self.top_k <= experts:
            raise ValueError(f"profile.top_k: found {self.top_k}, expected 1 to {experts}")
        if self.tuning is not None and self.tuning.layer_loads.shape[1] != layers:
            raise ValueError(
                f"profile.tuning: found {self.tuning.layer_loads.shape[1]} layers, expected {layers}"
            )
        given = self.compensation
        if given is not None and (len(given.mean), given.coefficients.shape[2]) != (layers, experts):
            raise ValueError(
                f"profile.compensation: found {len(given.mean)} layers of {given.coefficients.shape[2]} "
                f"experts, expected {layers} of {experts}"
            )
        if given is None and self.tuning is not None and set(self.tuning.compensation) != {"none"}:
            raise ValueError("profile.tuning: verified with compensation, and the profile has none")

    @property
    def num_layers(self) -> int:
        return self.visual.shape[0]

    @property
    def num_experts(self) -> int:
        return self.visual.shape[1]

    @functools.cached_property
    def digest(self) -> str:
        """An identifier of the profile's contents, 16 hex digits."""
        more, tensors = [], [self.visual, self.text]
        if self.tuning is not None:
            more.append(self.tuning.header())
            tensors += self.tuning.tensors().values()
        if self.compensation is not None:
            tensors += self.compensation.tensors().values()
        digest = hashlib.sha256(json.dumps([list(self.fingerprints), self.top_k, *more]).encode())
        for tensor in tensors:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def visual_preference(self) -> Tensor:
        """q_j = f_v / (f_v + f_t), float64 [L, E]: 1 serves visual tokens alone, 0 text alone.

        f_v(j), f_t(j): the share of all visual, of all text assignments of the layer that go to j.
        0.5 where an expert saw nothing, and in a layer that saw one modality alone, which is no
        evidence about its experts.
        """
        visual = self.visual.double() / self.visual.sum(1, keepdim=True).clamp(min=1)
        text = self.text.double() / self.text.sum(1, keepdim=True).clamp(min=1)
        both = visual + text
        seen = (both > 0) & (self.visual.sum(1, keepdim=True) > 0) & (self.text.sum(1, keepdim=True) > 0)
        return torch.where(seen, visual / both.clamp(min=1e-300), 0.5)

    def bias(self, threshold: float) -> Tensor:
        """The modality bias m_j of every expert, float64 [L, E]: -1, 0 or 1.

        +1 if q_j >= 0.5 + tau, -1 if q_j <= 0.5 - tau, else 0; tau: ``Policy.bias_threshold``.
        """
        preference = self.visual_preference()
        high = (preference >= 0.5 + threshold).double()
        low = (preference <= 0.5 - threshold).double()
        return high - low

    def row_of(self, router_weight: Tensor, top_k: int) -> int:
        """The row of this profile that was measured on this router; if there is none, a ``ValueError``.

        Rows are found by the router's fingerprint, so it does not matter how an engine numbers its
        layers or spreads them over pipeline stages.
        """
        experts = router_weight.shape[0]
        if experts != self.num_experts or top_k != self.top_k:
            raise ValueError(
                f"profile: measured with {self.num_experts} experts and top-{self.top_k}, the model has "
                f"{experts} experts and top-{top_k}; a profile is of one model, whose layers are alike"
            )
        fingerprint = router_fingerprint(router_weight)
        if fingerprint not in self.fingerprints:
            raise ValueError(
                f"profile: no layer of it was measured on a router with fingerprint {fingerprint}; "
                "it was measured on another model; run macs tune on this one"
            )
        return self.fingerprints.index(fingerprint)

    @staticmethod
    def merged(profiles: Sequence[Profile]) -> Profile:
        """One profile of several runs, ranks or pipeline stages of one model.

        Layers are matched by fingerprint, and counts of the same layer add up. A tuning and compensation
        belong to all layers of a model together, and are not kept.
        """
        counts: dict[str, list[Tensor]] = {}
        shapes = {(one.num_experts, one.top_k) for one in profiles}
        if len(shapes) != 1:
            raise ValueError(
                f"profile: found (experts, top-k) of {sorted(shapes)}, expected those of one model"
            )
        for one in profiles:
            for name, visual, text in zip(one.fingerprints, one.visual, one.text, strict=True):
                held = counts.setdefault(name, [torch.zeros_like(visual), torch.zeros_like(text)])
                counts[name] = [held[0] + visual, held[1] + text]
        return Profile(
            visual=torch.stack([visual for visual, _ in counts.values()]),
            text=torch.stack([text for _, text in counts.values()]),
            fingerprints=tuple(counts),
            top_k=profiles[0].top_k,
        )

    def drift(self, row: int, visual: Tensor, text: Tensor) -> tuple[float, float]:
        """How far a layer's traffic is from this profile, for visual and for text tokens, each 0..1.

        visual, text: assignments to each expert since, [E]. Half the sum of the differences of the
        experts' shares (total variation), less what counting so few independent assignments gives by
        chance; 0 where either side has none. Tokens of a picture are alike: compare hundreds of requests.
        """

        def moved(now: Tensor, then: Tensor) -> float:
            now, then = now.double().cpu(), then.double()
            if not bool(now.sum() > 0) or not bool(then.sum() > 0):
                return 0.0
            distance = (now / now.sum() - then / then.sum()).abs().sum() / 2
            # A count with mean n p misses it by sqrt(2 n p / pi) on average.
            chance = sum((2 * len(each) / (math.pi * each.sum())).sqrt() / 2 for each in (now, then))
            return max(0.0, float(distance - chance))

        return moved(visual, self.visual[row]), moved(text, self.text[row])

    def save(self, path: str | Path) -> None:
        """Write the profile to one safetensors file."""
        tensors = {"visual": self.visual.cpu().contiguous(), "text": self.text.cpu().contiguous()}
        header: dict[str, Any] = {"fingerprints": list(self.fingerprints), "top_k": self.top_k}
        if self.tuning is not None:
            tensors |= self.tuning.tensors()
            header["tuning"] = self.tuning.header()
        if self.compensation is not None:
            tensors |= self.compensation.tensors()
        save_tensors(tensors, path, {"format": FORMAT, "macs": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile; a ``ValueError`` for a file that is truncated or of another format."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"profile {path}: found no file, expected one that macs tune wrote")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"profile {path}: found format {metadata.get('format')!r}, expected {FORMAT!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"profile {path}: not a whole safetensors file: {error}") from error
        parts = {name.partition("_")[0] for name in tensors}
        try:
            header = json.loads(metadata["macs"])
            return cls(
                visual=tensors["visual"],
                text=tensors["text"],
                fingerprints=tuple(header["fingerprints"]),
                top_k=header["top_k"],
                tuning=Tuning.of(header.get("tuning"), tensors) if "tuning" in {*header, *parts} else None,
                compensation=Compensation.of(tensors) if "compensation" in parts else None,
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"profile {path}: expected what macs tune writes, found {error!r}") from error


class Calibration:
    """Counts on the device which modalities the experts of one layer serve, without synchronisation."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._counts: Tensor | None = None

    def observe(self, experts: Tensor, tokens: Tokens) -> None:
        """Count experts int64 [T, k] of the layer's tokens."""
        row = torch.where(tokens.valid, tokens.visual.long(), 2)[:, None]
        row = torch.where(experts >= 0, row, 2)
        cell = (row * self.num_experts + experts.clamp(min=0)).flatten()
        if self._counts is None:
            with torch.inference_mode(False):  # it outlives the engine's inference mode
                self._counts = torch.zeros(3 * self.num_experts, dtype=torch.int64, device=experts.device)
        self._counts.scatter_add_(0, cell, torch.ones_like(cell))

    def counts(self, device: torch.device | str = "cpu") -> Tensor:
        """Assignments of text [0] and visual [1] tokens, int64 [2, E]; zeros where none was observed."""
        if self._counts is None:
            return torch.zeros(2, self.num_experts, dtype=torch.int64, device=device)
        return self._counts.view(3, self.num_experts)[:2]
