"""Megatron's routing trace (``--moe-routing-trace-path``) beside recordings of MACS's own.

A trace is JSON lines, one file a rank, one line for each call of a router: step, stage, block, layer, rank,
num_tokens, topk, top_indices. It knows neither modality nor weights nor how many experts there are; with
``--moe-routing-trace-capture-logits`` the logits lie in a file beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from macs import TEXT, Recording
from macs.files import check_output

DECODER = "decoder"
"""The block whose layers MACS plans; those that guess tokens ahead (``mtp``) are left out."""

MODALITY, WEIGHTS, EXPERTS, RANKS = "macs_modality", "macs_weights", "macs_experts", "macs_ranks"
"""What a trace that ``write_trace`` wrote has besides."""

LATER = EXPERTS, RANKS, "logit_offset", "logit_bytes"
"""Whole numbers that a record may have."""

Records = list[dict[str, Any]]


def is_trace(path: Path) -> bool:
    """Whether a file is read as a trace: by its name."""
    return path.suffix in (".jsonl", ".json")


def read_trace(path: Path, experts: int | None = None, ranks: int | None = None) -> Recording:
    """A rank's trace as a recording.

    Tokens are text where the trace does not say; weights are even where it has no logits, else the logits'
    softmax over the chosen, as scores are its over all. Layers are numbered from 0, in their order.

    Args:
        path: the ``.jsonl`` file.
        experts: how many each layer has; none: as many as the logits have, or as the trace says that
            ``write_trace`` wrote.
        ranks: expert-parallel ranks of the run; none: as the trace says, or 1. It is 1 where they do not
            divide the experts.

    Raises:
        ValueError: a line is no record of a trace, which is named, or the records do not fit together.
    """
    found = _records(path)
    return _recording(path, found, calls_of(found), experts, ranks)


def _records(path: Path) -> Records:
    """Those of the layers that MACS plans, their lists as arrays."""
    found: Records = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                one = json.loads(line) if line.strip() else None
                if one is not None and one.get("block", DECODER) == DECODER:
                    found.append(_record(one))
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                raise ValueError(f"trace {path}, line {number}: found no record: {error!r}") from error
    if not any(one["num_tokens"] for one in found):
        raise ValueError(f"trace {path}: found no record of block {DECODER!r} with tokens")
    return found


def _record(one: dict[str, Any]) -> dict[str, Any]:
    """A record: top_indices int16 [T, k], and where it has them modality int8 [T], weights float16 [T, k]."""
    for name in ("step", "layer", "num_tokens", "topk", *(name for name in LATER if name in one)):
        if type(one[name]) is not int or one[name] < 0:
            raise ValueError(f"{name}: found {str(one[name])[:50]!r}, expected a whole number")
    count, top_k = one["num_tokens"], one["topk"]
    shapes = {"top_indices": (count, top_k), MODALITY: (count,), WEIGHTS: (count, top_k)}
    kinds = {"top_indices": np.int16, MODALITY: np.int8, WEIGHTS: np.float16}
    for name in shapes.keys() & {"top_indices", *one}:
        given = np.array(one[name], np.float64) if count else np.empty(shapes[name])
        if given.shape != shapes[name]:
            raise ValueError(f"{name}: found shape {given.shape}, expected {shapes[name]}")
        with np.errstate(invalid="ignore"):
            one[name] = given.astype(kinds[name])
        if not (np.array_equal(one[name], given) if name != WEIGHTS else bool((given >= 0).all())):
            raise ValueError(f"{name}: found a number that cannot be one of them")
    return one


def calls_of(records: Records) -> int:
    """Most calls of a layer in a step."""
    return max(Counter((one["step"], one["layer"]) for one in records).values())


def _recording(path: Path, found: Records, calls: int, experts: int | None, ranks: int | None) -> Recording:
    """The recording of a trace; calls: ``calls_of`` over all traces of the run, to number steps alike."""
    often: Counter[tuple[int, int]] = Counter()
    for one in found:  # a layer's second call in a step, as of another microbatch, is a step of its own
        one["again"] = often[one["step"], one["layer"]]
        often[one["step"], one["layer"]] += 1
    layers = sorted({one["layer"] for one in found})
    found = [one for one in found if one["num_tokens"]]
    try:
        tensors = _tensors(path, found, layers, calls)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"trace {path}: its records do not fit together: {error}") from error
    if "scores" in tensors:
        experts = experts or tensors["scores"].shape[1]
    experts = experts or max((one[EXPERTS] for one in found if EXPERTS in one), default=None)
    if experts is None:
        raise ValueError(
            f"trace {path}: found nothing that says how many experts a layer has, and "
            f"{int(tensors['experts'].max())} as the largest index; expected --experts"
        )
    ranks = ranks or found[0].get(RANKS, 1)
    return Recording(experts, 1 if experts % ranks else ranks, tensors, f"trace {path}")


def _tensors(path: Path, found: Records, layers: list[int], calls: int) -> dict[str, Tensor]:
    """As ``Recording`` has them."""

    def joined(name: str) -> Tensor | None:
        """A field of all tokens, which every record has, or none."""
        if not any(name in one for one in found):
            return None
        return torch.from_numpy(np.concatenate([one[name] for one in found]))

    chosen, modality, weights = joined("top_indices"), joined(MODALITY), joined(WEIGHTS)
    assert chosen is not None
    tensors = {
        "layers": torch.tensor([layers.index(one["layer"]) for one in found], dtype=torch.int32),
        "steps": torch.tensor([one["step"] * calls + one["again"] for one in found]),
        "counts": torch.tensor([one["num_tokens"] for one in found]),
        "experts": chosen,
        "weights": torch.full(chosen.shape, 1 / chosen.shape[1], dtype=torch.float16),
        "modality": torch.full((len(chosen),), TEXT, dtype=torch.int8) if modality is None else modality,
    }
    if any("logit_offset" in one for one in found):
        scores = _logits(path, found).float().softmax(1)
        gates = scores.gather(1, chosen.long().clamp(min=0))
        tensors |= {"scores": scores.half(), "weights": (gates / gates.sum(1, keepdim=True)).half()}
    if weights is not None:
        tensors["weights"] = weights
    return tensors


def _logits(path: Path, found: Records) -> Tensor:
    """Of all tokens of these records, bfloat16 [N, E]."""
    beside = path.with_name(f"logits_rank{found[0]['rank']}.bin")
    if not beside.is_file():
        raise ValueError(f"found logits in them, but no file {beside}")
    data, parts = np.memmap(beside, dtype=np.uint8, mode="r"), []
    for one in found:
        first, size = one["logit_offset"], one["logit_bytes"]
        if first + size > len(data):
            raise ValueError(f"{beside} ends before the logits of step {one['step']}")
        parts.append(data[first : first + size].reshape(one["num_tokens"], -1))
    return torch.from_numpy(np.concatenate(parts)).view(torch.bfloat16)


def write_trace(recording: Recording, path: Path, rank: int = 0) -> None:
    """A recording as a trace, for tools that read Megatron's; with modality and weights in fields of its own,
    which ``read_trace`` reads. Scores are left out."""
    check_output(path, "trace")
    with path.open("w") as file:
        for one in recording.records:
            record = {
                "step": one.step,
                "stage": "pre_dispatch",
                "block": DECODER,
                "layer": one.layer,
                "rank": rank,
                "num_tokens": len(one.modality),
                "topk": recording.top_k,
                "top_indices": one.experts.tolist(),
                MODALITY: one.modality.tolist(),
                WEIGHTS: one.weights.tolist(),
                EXPERTS: recording.num_experts,
                RANKS: recording.num_ranks,
            }
            file.write(json.dumps(record) + "\n")


def load_recordings(
    paths: Sequence[Path], experts: int | None = None, ranks: int | None = None
) -> list[Recording]:
    """Recordings of the ranks of one run, in the order given: files of MACS's own, or Megatron's traces.

    experts, ranks: of a layer, and of the run, where traces do not say; by default as many ranks as files.
    """
    ranks = ranks or (len(paths) if len(paths) > 1 else None)
    traces = {path: _records(path) for path in paths if is_trace(path)}
    calls = max(map(calls_of, traces.values()), default=1)
    found = [
        _recording(path, traces[path], calls, experts, ranks) if path in traces else Recording.load(path)
        for path in paths
    ]
    kinds = {(one.num_experts, one.top_k) for one in found}
    if len(kinds) != 1:
        raise ValueError(
            f"recordings: found (experts, k) of {sorted(kinds)}, expected the same in every file; --experts "
            "says how many a trace's layers have"
        )
    return found
