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

Records = list[dict[str, Any]]


def is_trace(path: Path) -> bool:
    """Whether a file is read as a trace: by its name."""
    return path.suffix in (".jsonl", ".json")


def read_trace(path: Path, experts: int | None = None, ranks: int | None = None, calls: int = 1) -> Recording:
    """A rank's trace as a recording.

    Tokens are text where the trace does not say; weights are even where it has no logits, else the logits'
    softmax over the chosen, as scores are its over all. Layers are numbered from 0, in their order.

    Args:
        path: the ``.jsonl`` file.
        experts: how many each layer has; none: as many as the logits have, or as the trace says that
            ``write_trace`` wrote.
        ranks: expert-parallel ranks of the run; none: as the trace says, or 1. It is 1 where they do not
            divide the experts.
        calls: most calls of a layer in a step, over all traces of the run, so that they number steps alike.

    Raises:
        ValueError: a line is no record of a trace, which is named, or the records do not fit together.
    """
    found, own = _records(path)
    layers = sorted({one["layer"] for one in found})
    found = [one for one in found if one["num_tokens"]]
    try:
        tensors = _tensors(path, found, layers, max(calls, own))
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


def _records(path: Path) -> tuple[Records, int]:
    """Those of the layers that MACS plans, and the most calls of a layer in a step: the second, as of another
    microbatch, is a step of its own."""
    found: Records = []
    often: Counter[tuple[int, int]] = Counter()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            one = json.loads(line)
            if one.get("block", DECODER) != DECODER:
                continue
            given = np.array(one["top_indices"]).reshape(one["num_tokens"], one["topk"])
            one["top_indices"] = given.astype(np.int16)
            if not np.array_equal(one["top_indices"], given):
                raise ValueError("top_indices: found numbers that are no experts")
            place = one["step"], one["layer"]
            one["again"], often[place] = often[place], often[place] + 1
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"trace {path}, line {number}: found no record: {error!r}") from error
        found.append(one)
    if not any(one["num_tokens"] for one in found):
        raise ValueError(f"trace {path}: found no record of block {DECODER!r} with tokens")
    return found, max(often.values())


def _tensors(path: Path, found: Records, layers: list[int], calls: int) -> dict[str, Tensor]:
    """As ``Recording`` has them."""

    def joined(name: str) -> Tensor | None:
        """A field of all tokens, which every record has, or none."""
        if not any(name in one for one in found):
            return None
        return torch.from_numpy(np.concatenate([np.array(one[name]) for one in found]))

    chosen, modality, weights = joined("top_indices"), joined(MODALITY), joined(WEIGHTS)
    assert chosen is not None
    tensors = {
        "layers": torch.tensor([layers.index(one["layer"]) for one in found], dtype=torch.int32),
        "steps": torch.tensor([one["step"] * calls + one["again"] for one in found]),
        "counts": torch.tensor([one["num_tokens"] for one in found]),
        "experts": chosen,
        "weights": torch.full(chosen.shape, 1 / chosen.shape[1], dtype=torch.float16),
        "modality": torch.full((len(chosen),), TEXT, dtype=torch.int8),
    }
    if any("logit_offset" in one for one in found):
        scores = _logits(path, found).float().softmax(1)
        gates = scores.gather(1, chosen.long().clamp(min=0))
        tensors |= {"scores": scores.half(), "weights": (gates / gates.sum(1, keepdim=True)).half()}
    if modality is not None:
        tensors["modality"] = modality.to(torch.int8)
    if weights is not None:
        tensors["weights"] = weights.half()
    return tensors


def _logits(path: Path, found: Records) -> Tensor:
    """Of all tokens of these records, bfloat16 [N, E]."""
    beside = path.with_name(f"logits_rank{found[0]['rank']}.bin")
    if not beside.is_file():
        raise ValueError(f"found logits in them, but no file {beside}")
    data = np.memmap(beside, dtype=np.uint8, mode="r")
    parts = [
        data[one["logit_offset"] :][: one["logit_bytes"]].reshape(one["num_tokens"], -1) for one in found
    ]
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
    calls = max((_records(path)[1] for path in paths if is_trace(path)), default=1) if len(paths) > 1 else 1
    found = [
        read_trace(path, experts, ranks, calls) if is_trace(path) else Recording.load(path) for path in paths
    ]
    kinds = {(one.num_experts, one.top_k) for one in found}
    if len(kinds) != 1:
        raise ValueError(
            f"recordings: found (experts, k) of {sorted(kinds)}, expected the same in every file; --experts "
            "says how many a trace's layers have"
        )
    return found
