"""Recordings: the routers' choices in a real run, in a safetensors file, for reports and benchmarks.

Shapes: M records, one for every recorded call of a layer; N tokens of all records.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..files import rank_and_world, save_tensors
from ..tokens import MODALITIES, Tokens

FORMAT = "macs-routing-2"
OVERHEAD = 2048
"""Bytes of a record beside its tensors, about."""

logger = logging.getLogger(__name__)


class RoutingRecorder:
    """Collects the choices of the routers of a model's MACS layers, before planning.

    max_bytes: memory after which nothing is added. every: record one in so many steps of each layer. scores:
    keep the scores of all experts too, in half precision (2 E bytes a token); without them, a replay makes
    them up. Every record is copied to the host, which synchronises: do not time a run that records.
    """

    def __init__(self, *, max_bytes: int = 1 << 28, every: int = 1, scores: bool = False) -> None:
        if min(max_bytes, every) < 1:
            raise ValueError(f"record: found max_bytes {max_bytes} and every {every}, expected 1 or more")
        self.max_bytes = max_bytes
        self.every = every
        self.scores = scores
        self._bytes = 0
        self._full = False
        self._shape: tuple[int, int] | None = None
        self._steps: dict[int, int] = {}
        self._records: list[tuple[int, int, dict[str, Tensor]]] = []

    def __len__(self) -> int:
        return len(self._records)

    def observe(self, layer: int, experts: Tensor, weights: Tensor, scores: Tensor, tokens: Tokens) -> None:
        """One call of a layer: as ``Planner.plan`` has them. Padding is left out."""
        step = self._steps.get(layer, 0)
        self._steps[layer] = step + 1
        if self._full or step % self.every:
            return
        shape = experts.shape[1], scores.shape[1]
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ValueError(
                f"record: layer {layer} has (k, E) = {shape}, expected {self._shape} as in the layers "
                "before: the layers of a recording are alike"
            )
        valid = tokens.valid
        kept = {
            "experts": experts[valid].to(torch.int16),
            "weights": weights.detach()[valid].half(),
            "modality": tokens.modality[valid],
        }
        if self.scores:
            kept["scores"] = scores.detach()[valid].half()
        if not len(kept["modality"]):
            return
        size = OVERHEAD + sum(tensor.nbytes for tensor in kept.values())
        if self._bytes + size > self.max_bytes:
            self._full = True  # for good: what is there has no gaps but those of ``every``
            logger.warning("MACS: the recording is full (%d bytes); nothing more is added", self._bytes)
            return
        self._bytes += size
        self._records.append((layer, step, {name: tensor.cpu() for name, tensor in kept.items()}))

    def save(self, path: str | Path, num_ranks: int) -> Path | None:
        """Write this rank's file, PATH itself where it is alone, else PATH with its rank in the name.

        Returns what was written; None, with a warning, if nothing was recorded.
        """
        path = rank_path(Path(path))
        if not self._records:
            logger.warning("MACS: nothing was recorded for %s; was a batch of min_tokens or more run?", path)
            return None
        layers, steps, parts = zip(*self._records, strict=True)
        tensors = {
            "layers": torch.tensor(layers, dtype=torch.int32),
            "steps": torch.tensor(steps, dtype=torch.int64),
            "counts": torch.tensor([len(part["modality"]) for part in parts], dtype=torch.int64),
        }
        tensors |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert self._shape is not None
        Recording(self._shape[1], num_ranks, tensors).save(path)
        return path


def rank_path(path: Path) -> Path:
    """``a/b.x`` on the only rank, ``a/b.rank3.x`` on rank 3 of several."""
    rank, world = rank_and_world()
    return path if world == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


@dataclass(frozen=True)
class RoutingRecord:
    """One call of a layer: experts int64 [T, k] (-1: none), weights float32 [T, k], modality int8
    [T], and scores float32 [T, E] where they were recorded."""

    layer: int
    step: int
    experts: Tensor
    weights: Tensor
    modality: Tensor
    scores: Tensor | None


@dataclass(frozen=True)
class Recording:
    """A file of ``RoutingRecorder.save``, of one rank.

    tensors, on the CPU: layers int32 [M], steps int64 [M], counts int64 [M] (tokens of each record); of all
    tokens, experts int16 [N, k] (-1: none), weights float16 [N, k], modality int8 [N], and scores float16
    [N, E] where they were recorded. A ``ValueError`` if they do not fit together.
    """

    num_experts: int
    num_ranks: int
    tensors: Mapping[str, Tensor]
    name: str = "recording"

    def __post_init__(self) -> None:
        experts, last = self.tensors["experts"], self.num_experts - 1
        sizes = {len(self.tensors[name]) for name in ("weights", "modality")}
        if not len(experts) or sizes | {int(self.tensors["counts"].sum())} != {len(experts)}:
            raise ValueError(f"{self.name}: its records do not add up to its {len(experts)} tokens")
        if self.num_experts % self.num_ranks:
            raise ValueError(
                f"{self.name}: found {self.num_experts} experts on {self.num_ranks} ranks, expected as many "
                "on each"
            )
        if not bool(self.tensors["modality"].clamp(0, MODALITIES - 1).eq(self.tensors["modality"]).all()):
            raise ValueError(f"{self.name}: found modality ids outside 0..{MODALITIES - 1}")
        if not bool(self.tensors["weights"].isfinite().all()):
            raise ValueError(f"{self.name}: found weights that are not finite")
        if int(experts.min()) < -1 or int(experts.max()) > last:
            raise ValueError(f"{self.name}: found experts outside -1..{last}")
        inside = experts.sort(1).values
        if bool(((inside[:, 1:] == inside[:, :-1]) & (inside[:, 1:] >= 0)).any()):
            raise ValueError(f"{self.name}: found a token with an expert twice")

    @property
    def top_k(self) -> int:
        return self.tensors["experts"].shape[1]

    @cached_property
    def records(self) -> tuple[RoutingRecord, ...]:
        """One by one; counts over all of them are faster on ``tensors``."""
        tensors = self.tensors
        sizes = tensors["counts"].tolist()
        scores = tensors["scores"].float().split(sizes) if "scores" in tensors else [None] * len(sizes)
        rows = zip(
            tensors["layers"].tolist(),
            tensors["steps"].tolist(),
            tensors["experts"].long().split(sizes),
            tensors["weights"].float().split(sizes),
            tensors["modality"].split(sizes),
            scores,
            strict=True,
        )
        return tuple(RoutingRecord(*row) for row in rows)

    def part(self, chosen: Tensor) -> Recording:
        """Some of the records, bool [M], in their order; at least one."""
        tokens = chosen.repeat_interleave(self.tensors["counts"])
        of_records = ("layers", "steps", "counts")
        kept = {name: one[chosen if name in of_records else tokens] for name, one in self.tensors.items()}
        return Recording(self.num_experts, self.num_ranks, kept, self.name)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """From a file; a ``ValueError`` if it is damaged or of another format."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("macs", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"recording {path}: not a recording: {error}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(
                f"recording {path}: found header {str(header)[:200]}, expected format {FORMAT!r}"
            )
        try:
            return cls(header["num_experts"], header["num_ranks"], tensors, f"recording {path}")
        except KeyError as error:
            raise ValueError(f"recording {path}: found no {error}") from error

    def save(self, path: str | Path) -> None:
        """Write what ``load`` reads."""
        header = {"format": FORMAT, "num_experts": self.num_experts, "num_ranks": self.num_ranks}
        save_tensors(dict(self.tensors), path, {"macs": json.dumps(header)})
