"""Megatron's routing trace (``--moe-routing-trace-path``) beside recordings of MACS's own.

A trace is JSON lines, one file a rank, one line for each call of a router: step, stage, block, layer, rank,
num_tokens, topk, top_indices. It knows neither modality nor weights nor how many experts there are; with
``--moe-routing-trace-capture-logits`` the logits lie in a file beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from macs import TEXT, Recording
from macs.files import check_output

DECODER = "decoder"
"""The block whose layers MACS plans; those that guess tokens ahead (``mtp``) are left out."""

FIELDS = {"step": int, "layer": int, "num_tokens": int, "topk": int, "top_indices": list}
KINDS, WEIGHTS, EXPERTS = "macs_kinds", "macs_weights", "macs_experts"
"""What a trace that ``write_trace`` wrote has besides."""


def is_trace(path: Path) -> bool:
    """Whether a file is read as a trace: by its name."""
    return path.suffix in (".jsonl", ".json")


def read_trace(path: Path, experts: int | None = None, ranks: int = 1) -> Recording:
    """A rank's trace as a recording.

    Tokens are text where the trace does not say; weights are even where it has no logits, else the logits'
    softmax over the chosen, as scores are its over all. Layers are numbered from 0, in their order.

    Args:
        path: the ``.jsonl`` file.
        experts: how many each layer has; none: as many as the logits have, or as the trace says that
            ``write_trace`` wrote.
        ranks: expert-parallel ranks of the run; 1 is said where they do not divide the experts.

    Raises:
        ValueError: a line is no record of a trace; it is named.
    """
    found = [record for record in _lines(path) if record.get("block", DECODER) == DECODER]
    if not found:
        raise ValueError(f"trace {path}: found no record of block {DECODER!r}")
    top_k = found[0]["topk"]
    chosen: list[np.ndarray] = []
    often: Counter[tuple[int, int]] = Counter()
    for record in found:
        chosen.append(
            _indices(f"trace {path}: step {record['step']}, layer {record['layer']}", record, top_k)
        )
        # A layer's second call in a step, as of another microbatch, is a step of its own.
        record["again"] = often[record["step"], record["layer"]]
        often[record["step"], record["layer"]] += 1
    calls = max(often.values())
    numbers = sorted({record["layer"] for record in found})
    found = [record for record in found if record["num_tokens"]]
    if not found:
        raise ValueError(f"trace {path}: found no token in any record")
    flat = torch.from_numpy(np.concatenate(chosen))
    tensors = {
        "layers": torch.tensor([numbers.index(one["layer"]) for one in found], dtype=torch.int32),
        "steps": torch.tensor([one["step"] * calls + one["again"] for one in found], dtype=torch.int64),
        "counts": torch.tensor([one["num_tokens"] for one in found], dtype=torch.int64),
        "experts": flat,
        "weights": torch.full(flat.shape, 1 / top_k, dtype=torch.float16),
        "modality": torch.full((len(flat),), TEXT, dtype=torch.int8),
    }
    weighed = all(WEIGHTS in one for one in found)
    if weighed:
        values = [row for one in found for row in one[WEIGHTS]]
        tensors["weights"] = torch.from_numpy(_rows(f"trace {path}: {WEIGHTS}", values, top_k)).half()
    if all(KINDS in one for one in found):
        kinds = [kind for one in found for kind in one[KINDS]]
        tensors["modality"] = torch.tensor(kinds, dtype=torch.int8)
    if all("logit_offset" in one for one in found):
        scores = _logits(path, found).float().softmax(1)
        experts = experts or scores.shape[1]
        tensors["scores"] = scores.half()
        if not weighed:
            gates = scores.gather(1, flat.long().clamp(min=0))
            tensors["weights"] = (gates / gates.sum(1, keepdim=True)).half()
    told = {one[EXPERTS] for one in found if isinstance(one.get(EXPERTS), int)}
    experts = experts or max(told, default=None)
    if experts is None:
        raise ValueError(
            f"trace {path}: found nothing that says how many experts a layer has, and {int(flat.max())} as "
            "the largest index; expected --experts"
        )
    return Recording(experts, 1 if experts % ranks else ranks, tensors, f"trace {path}")


def _rows(name: str, rows: list[Any], width: int) -> np.ndarray:
    """Numbers [N, width] of a list of lists."""
    if not all(isinstance(row, list) and len(row) == width for row in rows):
        raise ValueError(f"{name}: found rows that are not of {width} numbers each")
    found = np.array(rows, dtype=object).reshape(-1, width)
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in found.flat):
        raise ValueError(f"{name}: found something that is no number")
    return found.astype(np.float64)


def _indices(name: str, record: dict[str, Any], top_k: int) -> np.ndarray:
    """A record's experts, int16 [tokens, k]; what else it has of tokens is of as many."""
    if record["topk"] != top_k or top_k < 1:
        raise ValueError(f"{name}: found {record['topk']} experts a token, expected {max(1, top_k)}")
    found = _rows(name, record["top_indices"], top_k)
    if len(found) != record["num_tokens"]:
        raise ValueError(f"{name}: found {len(found)} tokens, expected {record['num_tokens']}")
    if not ((found == found.round()) & (found >= -1) & (found < 2**15)).all():
        raise ValueError(f"{name}: found an index that is no expert's")
    for own, kind in ((KINDS, int), (WEIGHTS, list)):
        values = record.get(own, [])
        if own in record and not (isinstance(values, list) and len(values) == len(found)):
            raise ValueError(f"{name}: found {own} of other tokens than it has")
        if not all(isinstance(one, kind) for one in values):
            raise ValueError(f"{name}: found something else than {kind.__name__} in {own}")
    return found.astype(np.int16)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"trace {path}: line {number} is no JSON: {error}") from error
            for name, kind in FIELDS.items():
                if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                    raise ValueError(
                        f"trace {path}: line {number} has no {name} ({kind.__name__}), which every record of "
                        "Megatron's routing trace has"
                    )
            yield record


def _logits(path: Path, records: Sequence[dict[str, Any]]) -> Tensor:
    """Of all tokens of these records, bfloat16 [N, E]."""
    if not isinstance(records[0].get("rank"), int):
        raise ValueError(f"trace {path}: found logits in its records, and no rank that says in which file")
    beside = path.with_name(f"logits_rank{records[0]['rank']}.bin")
    if not beside.is_file():
        raise ValueError(f"trace {path}: found logits in its records, but no file {beside}")
    data, parts = np.memmap(beside, dtype=np.uint8, mode="r"), []
    for record in records:
        part = data[record["logit_offset"] :][: record["logit_bytes"]]
        if len(part) != record["logit_bytes"]:
            raise ValueError(f"trace {path}: {beside} ends before step {record['step']}")
        if record["num_tokens"] < 1 or len(part) % (2 * record["num_tokens"]):
            raise ValueError(f"trace {path}: step {record['step']}: found logits of no whole tokens")
        parts.append(torch.from_numpy(part.copy()).view(torch.bfloat16).view(record["num_tokens"], -1))
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
                KINDS: one.modality.tolist(),
                WEIGHTS: one.weights.tolist(),
                EXPERTS: recording.num_experts,
            }
            file.write(json.dumps(record) + "\n")


def load_recordings(
    paths: Sequence[Path], experts: int | None = None, ranks: int | None = None
) -> list[Recording]:
    """Recordings of the ranks of one run, in the order given: files of MACS's own, or Megatron's traces.

    experts, ranks: of a layer, and of the run, where traces do not say; by default as many ranks as files.
    """
    found = [
        read_trace(path, experts, ranks or len(paths)) if is_trace(path) else Recording.load(path)
        for path in paths
    ]
    kinds = {(one.num_experts, one.top_k) for one in found}
    if len(kinds) != 1:
        raise ValueError(
            f"recordings: found (experts, k) of {sorted(kinds)}, expected the same in every file; --experts "
            "says how many a trace's layers have"
        )
    return found
