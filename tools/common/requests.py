"""Requests from a folder or a file of JSON lines, and a Hugging Face model that answers them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


DEFAULT_QUESTION = "Describe this picture."


@dataclass(frozen=True)
class Request:
    """A text, perhaps about a picture."""

    text: str
    picture: Path | None = None


def read_requests(path: Path) -> list[Request]:
    """The requests of a folder or of a file of JSON lines; a bad one is a ``ValueError`` with its place."""
    if path.is_dir():
        pictures = sorted(one for one in path.rglob("*") if one.suffix.lower() in PICTURES)
        questions = {one.with_suffix("") for one in pictures}
        texts = [one for one in sorted(path.rglob("*.txt")) if one.with_suffix("") not in questions]
        beside = {one: one.with_suffix(".txt") for one in pictures}
        found = [
            Request(text.read_text() if text.is_file() else DEFAULT_QUESTION, one)
            for one, text in beside.items()
        ]
        found += [Request(one.read_text()) for one in texts]
    else:
        found = [
            _request(line, f"{path}, line {number}", path.parent)
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if line.strip()
        ]
    if not found:
        raise ValueError(f"--data: found no pictures and no texts in {path}")
    return found


def _request(line: str, place: str, folder: Path) -> Request:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(values, dict) or not values or not set(values) <= {"text", "image"}:
        raise ValueError(
            f"{place}: found {line.strip()[:80]}, expected fields text and image, or one of them"
        )
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{place}: field {name}: found {value!r}, expected a string")
    picture = None if "image" not in values else folder / values["image"]
    if picture is not None and not picture.is_file():
        raise ValueError(f"{place}: field image: found no file {picture}")
    return Request(values.get("text", DEFAULT_QUESTION), picture)


def opened(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a reader makes of a picture; an error names the file."""
    try:
        return reader(path)
    except OSError as error:
        raise ValueError(f"--data: {path}: not a picture: {error}") from error


@dataclass(frozen=True)
class Question:
    """A request with its picture open; nobody knows the right answer."""

    text: str
    picture: Any = None
    task: str = ""
    answer: None = None


def question_of(request: Request) -> Question:
    """Open a request's picture."""
    if request.picture is None:
        return Question(request.text)
    from PIL import Image

    return Question(request.text, opened(request.picture, lambda path: Image.open(path).convert("RGB")))


def load_model(path: Path, dtype: str) -> tuple[Any, Any]:
    """A checkpoint directory in Hugging Face format: the model, and its processor or tokenizer."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "vision_config"):
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        return model.eval(), transformers.AutoProcessor.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


class ProcessorEngine:
    """``generate`` of a model with a processor or tokenizer: chat template, left padding, a cache."""

    def __init__(self, model: Any, processor: Any, tokens: int) -> None:
        self.model, self.processor, self.tokens = model, processor, tokens
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def inputs_of(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """The model's arguments for a batch of prompts."""
        texts, padding = [one.text for one in questions], {"padding": True}
        templates = self.tokenizer.chat_template, getattr(self.processor, "chat_template", None)
        plain = templates == (None, None)
        if (plain or self.processor is self.tokenizer) and any(one.picture for one in questions):
            lacks = "chat template" if self.processor is not self.tokenizer else "vision"
            raise ValueError(f"--data: found a picture, expected texts alone: the model has no {lacks}")
        if plain:
            return self._moved(self.tokenizer(texts, **padding, return_tensors="pt"))
        contents: list[Any] = texts
        if self.processor is not self.tokenizer:
            pictures = [[] if one.picture is None else [one.picture] for one in questions]
            contents = [
                [*({"type": "image", "image": one} for one in shown), {"type": "text", "text": text}]
                for shown, text in zip(pictures, texts, strict=True)
            ]
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **(padding if self.processor is self.tokenizer else {"processor_kwargs": padding}),
        )
        return self._moved(inputs)

    def _moved(self, inputs: Any) -> dict[str, torch.Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
            if name != "token_type_ids"
        }

    @torch.inference_mode()
    def generate(self, questions: Sequence[Question], tokens: int | None = None) -> list[list[int]]:
        """Greedy answers of equally many tokens, so that ranks stay in step."""
        tokens = self.tokens if tokens is None else tokens
        inputs = self.inputs_of(questions)
        answers = self.model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
        )
        return answers[:, inputs["input_ids"].shape[1] :].tolist()

    def words(self, ids: Sequence[int]) -> str:
        """An answer as text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)
