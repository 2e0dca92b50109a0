"""Megatron's routing trace (``--moe-routing-trace-path``) beside recordings of MACS's own.

A trace is JSON lines, one file a rank, one line for each call of a router: step, stage, block, layer, rank,
num_tokens, topk, top_indices. It knows neither modality nor weights nor how many experts there are; with
``--moe-routing-trace-capture-logits`` the logits lie in a file beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from macs import TEXT, Recording
from macs.files import check_output
from macs.tokens import MODALITIES

DECODER = "decoder"
"""The block whose layers MACS plans; those that guess tokens ahead (``mtp``) are left out."""

MODALITY, WEIGHTS, EXPERTS, RANKS = "macs_modality", "macs_weights", "macs_experts", "macs_ranks"
"""What a trace that ``write_trace`` wrote has besides."""

WHOLE = {  # the least and the largest of every number of a record
    "step": (0, 2**53),
    "layer": (0, 2**20),
    "num_tokens": (0, 2**31),
    "topk": (1, 2**10),
    "rank": (0, 2**20),
    "logit_offset": (0, 2**53),
    "logit_bytes": (1, 2**53),
    EXPERTS: (1, 2**15 - 1),
    RANKS: (1, 2**15 - 1),
}
NEEDED = "step", "layer", "num_tokens", "topk", "top_indices"
OPTIONAL = MODALITY, WEIGHTS, "logit_offset"
"""Of all records of a trace, or of none."""


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
        ValueError: a line is no record of a trace; file and line are named.
    """
    return _recording(path, found := _records(path), calls_of(found), experts, ranks)


Records = list[tuple[int, dict[str, Any]]]  # with the numbers of their lines


def _records(path: Path) -> Records:
    """Those of the layers that MACS plans."""
    found = [one for one in _lines(path) if one[1]["block"] == DECODER]
    if not found:
        raise ValueError(f"trace {path}: found no record of block {DECODER!r}")
    return found


def calls_of(records: Records) -> int:
    """Most calls of a layer in a step."""
    return max(Counter((one["step"], one["layer"]) for _, one in records).values())


def _recording(path: Path, found: Records, calls: int, experts: int | None, ranks: int | None) -> Recording:
    """The recording of a trace; calls: ``calls_of`` over all traces of the run, to number steps alike."""
    first = found[0][1]
    often: Counter[tuple[int, int]] = Counter()
    for number, record in found:
        if record["topk"] != first["topk"]:
            raise _wrong(path, number, f"found {record['topk']} experts a token, expected {first['topk']}")
        for name in OPTIONAL:
            if (name in record) != (name in first):
                raise _wrong(path, number, f"found {name} in some of the records, expected it in all or none")
        # A layer's second call in a step, as of another microbatch, is a step of its own.
        record["again"] = often[record["step"], record["layer"]]
        often[record["step"], record["layer"]] += 1
    layers = sorted({record["layer"] for _, record in found})
    records = [record for _, record in found if record["num_tokens"]]
    if not records:
        raise ValueError(f"trace {path}: found no token in any record")
    flat = torch.from_numpy(np.concatenate([one["top_indices"] for one in records]))
    tensors = {
        "layers": torch.tensor([layers.index(one["layer"]) for one in records], dtype=torch.int32),
        "steps": torch.tensor([one["step"] * calls + one["again"] for one in records], dtype=torch.int64),
        "counts": torch.tensor([one["num_tokens"] for one in records], dtype=torch.int64),
        "experts": flat,
        "weights": torch.full(flat.shape, 1 / first["topk"], dtype=torch.float16),
        "modality": torch.full((len(flat),), TEXT, dtype=torch.int8),
    }
    if MODALITY in first:
        tensors["modality"] = torch.from_numpy(np.concatenate([one[MODALITY] for one in records]))
    if "logit_offset" in first:
        scores = _logits(path, found).float().softmax(1)
        experts = experts or scores.shape[1]
        tensors["scores"] = scores.half()
        gates = scores.gather(1, flat.long().clamp(min=0))
        tensors["weights"] = (gates / gates.sum(1, keepdim=True)).half()
    if WEIGHTS in first:
        tensors["weights"] = torch.from_numpy(np.concatenate([one[WEIGHTS] for one in records])).half()
    experts = experts or max((one[EXPERTS] for one in records if EXPERTS in one), default=None)
    if experts is None:
        raise ValueError(
            f"trace {path}: found nothing that says how many experts a layer has, and {int(flat.max())} as "
            "the largest index; expected --experts"
        )
    ranks = ranks or first.get(RANKS, 1)
    return Recording(experts, 1 if experts % ranks else ranks, tensors, f"trace {path}")


def _wrong(path: Path, number: int, what: str) -> ValueError:
    return ValueError(f"trace {path}, line {number}: {what}")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and record of every line, checked by itself."""
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, _record(json.loads(line, object_pairs_hook=_once))
                except (ValueError, RecursionError) as error:
                    raise _wrong(path, number, str(error) or type(error).__name__) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"found a name twice among {', '.join(name for name, _ in pairs)}")
    return found


def _record(record: Any) -> dict[str, Any]:
    """A record, its lists as arrays: top_indices int16 [T, k], modality int8 [T], weights float64 [T, k]."""
    if not isinstance(record, dict):
        raise ValueError(f"found {type(record).__name__}, expected a record of Megatron's routing trace")
    for name in NEEDED:
        if name not in record:
            raise ValueError(f"found no {name}, which every record of Megatron's routing trace has")
    for name, (low, high) in WHOLE.items():
        value = record.get(name, low)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(
                f"{name}: found {str(value)[:50]!r}, expected a whole number from {low} to {high}"
            )
    count, top_k = record["num_tokens"], record["topk"]
    record.setdefault("block", DECODER)
    chosen = _numbers("top_indices", record["top_indices"], (count, top_k), -1, 2**15 - 1, True)
    inside = np.sort(chosen, 1)
    if bool(((inside[:, 1:] == inside[:, :-1]) & (inside[:, 1:] >= 0)).any()):
        raise ValueError("top_indices: found a token with an expert twice")
    record["top_indices"] = chosen.astype(np.int16)
    if MODALITY in record:
        modality = _numbers(MODALITY, record[MODALITY], (count,), 0, MODALITIES - 1, True)
        record[MODALITY] = modality.astype(np.int8)
    if WEIGHTS in record:
        record[WEIGHTS] = _numbers(WEIGHTS, record[WEIGHTS], (count, top_k), 0, 65504, False)
    if ("logit_offset" in record) != ("logit_bytes" in record):
        raise ValueError("found one of logit_offset and logit_bytes, expected both or none")
    return record


def _numbers(
    name: str, values: Any, shape: tuple[int, ...], low: float, high: float, whole: bool
) -> np.ndarray:
    """Numbers of a list, or of a list of lists, of this shape: float64, finite, in a range."""
    try:
        found = np.array(values if values else np.empty(shape), dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: found something else than numbers in rows of one length") from error
    if found.shape != shape:
        raise ValueError(f"{name}: found shape {list(found.shape)}, expected {list(shape)}")
    if not bool(((found >= low) & (found <= high) & (not whole or found == found.round())).all()):
        raise ValueError(f"{name}: found a number outside {low} to {high}" + " or not whole" * whole)
    return found


def _logits(path: Path, records: Records) -> Tensor:
    """Of all tokens of these records, bfloat16 [N, E]."""
    rank = records[0][1].get("rank")
    if rank is None:
        raise _wrong(path, records[0][0], "found logits, and no rank that says in which file")
    beside = path.with_name(f"logits_rank{rank}.bin")
    if not beside.is_file():
        raise ValueError(f"trace {path}: found logits in its records, but no file {beside}")
    data, parts, taken = np.memmap(beside, dtype=np.uint8, mode="r"), [], []
    for number, record in records:
        if not record["num_tokens"]:
            continue
        first, size = record["logit_offset"], record["logit_bytes"]
        if first + size > len(data):
            raise _wrong(path, number, f"{beside} ends before its logits")
        if size % (2 * record["num_tokens"]):
            raise _wrong(path, number, f"found logits of {size} bytes, which are no whole tokens")
        taken.append((first, first + size, number))
        part = torch.from_numpy(data[first : first + size].copy()).view(torch.bfloat16)
        part = part.view(record["num_tokens"], -1)
        if not bool(part.isfinite().all()):
            raise _wrong(path, number, "found a logit that is not finite")
        parts.append(part)
    taken.sort()
    for (_, end, _), (begin, _, number) in pairwise(taken):
        if begin < end:
            raise _wrong(path, number, "found logits that overlap another record's")
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(
            f"trace {path}: found logits of {sorted(widths)} experts, expected one number of them"
        )
    return torch.cat(parts)


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
