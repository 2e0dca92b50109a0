"""The ``"macs"`` block of a DeepSpeed config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from macs.adapters import Options, check_name

EXPERT_PARALLEL = "expert_parallel"
MACS = "macs"
MODALITIES = ("auto", "manual", "text")


@dataclass(frozen=True)
class MACSBlock(Options):
    """A ``"macs"`` block: every option and setting of ``macs``, and these fields:

    enabled             False leaves DeepSpeed unchanged
    modality            "auto": visual tokens are found by the token ids given or those in the model's config,
                        or by ``mm_token_type_ids``; "manual": the script sets ``macs.modality`` around its
                        calls; "text": the model has no other modality. Padding is read from the calls in any
                        case
    sequence_major      hidden states are [S, B, D] in ``deepspeed.moe.layer.MoE``, not [B, S, D]
    second_expert_sampling  with k = 2, keep the noise with which the gate is configured to choose its second
                        expert; otherwise the choice is deterministic
    """

    enabled: bool = True
    modality: str = "auto"
    sequence_major: bool = False
    second_expert_sampling: bool = False

    def __post_init__(self) -> None:
        for name in ("enabled", "sequence_major", "second_expert_sampling"):
            if not isinstance(getattr(self, name), bool):
                self.refuse(name, "true or false")
        check_name("macs modality", self.modality, MODALITIES)
        super().__post_init__()

    @property
    def names_modality(self) -> bool:
        """Whether a token id of a modality is given."""
        return bool(self.token_ids.keys() - {"padding_token_id"})


def take_block(config: Mapping[str, Any]) -> tuple[dict[str, Any], MACSBlock | None]:
    """A DeepSpeed config without its MACS block, and the block; the config passed in stays as it is.

    The block is at the top, or in ``expert_parallel``; in both places is an error.
    """
    rest = dict(config)
    blocks = [rest.pop(MACS)] if MACS in rest else []
    inner = rest.get(EXPERT_PARALLEL)
    if isinstance(inner, Mapping) and MACS in inner:
        rest[EXPERT_PARALLEL] = {name: value for name, value in inner.items() if name != MACS}
        blocks.append(inner[MACS])
    if len(blocks) > 1:
        raise ValueError("config.macs: found both at the top and in expert_parallel, expected one of them")
    return rest, block_of(blocks[0]) if blocks else None


def block_of(macs: MACSBlock | Mapping[str, Any]) -> MACSBlock:
    """A block from itself or from plain values."""
    return macs if isinstance(macs, MACSBlock) else MACSBlock.of(macs)
