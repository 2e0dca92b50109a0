"""Two engines that serve, for the soak: requests, some of them malformed, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from tiny_vlm import data

import macs

from . import dynamic_engine as dynamic
from .deepspeed_ranks import padded_inputs, tiny_engine

POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("macs", {"target_load": 0.8}),
    ("vanilla", {}),
    ("token-drop", {"target_load": 1.05}),
    ("paper", {}),
    ("macs", {"preset": "safe", "target_load": 0.9}),
    ("rank-balanced", {"target_load": 1.05}),
)
MIN_TOKENS = 64


def config_of(settings: dict[str, Any]) -> Any:
    """One of the ``POLICIES``' settings."""
    return macs.MACSConfig.from_dict({"min_tokens": MIN_TOKENS, **settings})


class Megatron:
    """Megatron's dynamic engine around a small model: packed prompts, a paged cache."""

    def __init__(self, rank: int, port: int) -> None:
        self.runtime = macs.Runtime(config_of(POLICIES[0][1]), virtual_ranks=2)
        macs.serve_metrics(self.runtime, port)
        self.model = dynamic.build_model(self.runtime)
        with torch.no_grad():  # a token whose features are NaN
            self.model.embedding.word_embeddings.weight[dynamic.IMAGE - 1] = float("nan")
        self.engine = dynamic.build_engine(self.model)
        self.count = 0

    def requests(self, seed: int, bad: str | None = None) -> list[list[int]]:
        """Prompts with a run of image tokens in the middle, or none; the last may be of the bad client."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for length in torch.randint(30, 120, (4,), generator=generator).tolist():
            ids = torch.randint(1, dynamic.IMAGE - 1, (length,), generator=generator)
            if float(torch.rand(1, generator=generator)) < 0.7:
                ids[4 : 4 + length // 2] = dynamic.IMAGE
            found.append(ids.tolist())
        if bad == "nan":
            found[-1][2] = dynamic.IMAGE - 1
        if bad == "empty":
            found[-1] = []
        return found

    def answer(self, prompts: Sequence[list[int]]) -> list[list[int] | None]:
        """An empty prompt is refused here, as by a server: the engine itself ends with an assertion."""
        numbers = range(self.count, self.count + len(prompts))
        self.count += len(prompts)
        asked = {number: prompt for number, prompt in zip(numbers, prompts, strict=True) if prompt}
        said = dynamic.answers_of(self.engine, asked)
        return [said.get(number) for number in numbers]

    def send_wrong_mask(self) -> None:
        """Straight to a layer, with a mask of other tokens; MACS has to say so."""
        hidden = torch.zeros(80, 1, self.model.config.hidden_size)
        with macs.modality(macs.Modality.of(torch.zeros(1, 9, dtype=torch.int8))):
            try:
                self.model.decoder.layers[0].mlp(hidden)
            except ValueError as error:
                if "modality mask: found shape (1, 9)" in str(error):
                    return
        raise AssertionError("a mask of the wrong length was taken")


class DeepSpeed:
    """The trained tiny model under AutoEP, its experts on two processes, real pictures."""

    def __init__(self, rank: int, port: int) -> None:
        self.rank = rank
        block = {"target_load": 0.8, "min_tokens": MIN_TOKENS, "metrics_port": port}
        self.engine = tiny_engine(block)
        self.runtime = self.engine.macs

    def requests(self, seed: int, bad: str | None = None) -> dict[str, Any]:
        """A batch as a processor makes it: padded on the left, each rank's own."""
        samples = data.draw_samples(2 * seed + self.rank, "test", data.TASKS, 4)
        lengths = [100 if one.pixels is not None else 30 for one in samples]
        inputs = padded_inputs(samples, lengths)
        if bad == "nan" and inputs.get("pixel_values") is not None:
            inputs["pixel_values"] = (
                inputs["pixel_values"].clone().index_fill_(0, torch.tensor([0]), float("nan"))
            )
        if bad == "empty":
            texts = [row for row, one in enumerate(samples) if one.pixels is None]
            for row in texts[-1:]:
                inputs["input_ids"][row] = self.engine.module.config.text_config.pad_token_id
                inputs["attention_mask"][row] = 0
        if bad == "mask":
            inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, 3:]
        return inputs

    def answer(self, inputs: dict[str, Any]) -> list[list[int] | None]:
        """Ranks agree that all inputs are well-formed before any of them begins, as servers do: one that
        raised alone would leave the others in a collective."""
        good = torch.tensor(int(inputs["mm_token_type_ids"].shape == inputs["input_ids"].shape))
        dist.all_reduce(good, op=dist.ReduceOp.MIN)
        if not int(good):
            return [None] * len(inputs["input_ids"])
        out = self.engine.module.generate(
            **inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4, synced_gpus=True
        )
        return [row[inputs["input_ids"].shape[1] :].tolist() for row in out]

    def send_wrong_mask(self) -> None:
        if any(self.answer(self.requests(0, "mask"))):
            raise AssertionError("a mask of the wrong length was taken")
