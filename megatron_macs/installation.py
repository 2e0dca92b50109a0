"""MACS in models built by code that does not know of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import copy
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from macs.adapters import Patch, Runtime, named_tokens

from .compat import models
from .hooks import known_tokens, watch
from .spec import macs_mlp


def install(
    runtime: Runtime, token_ids: dict[str, int] | None = None, built: list[Any] | None = None
) -> Callable[[], None]:
    """Build every transformer layer with MACS from now on; returns a function that undoes it.

    Of several installations the last one acts; they may be undone in any order.

    ``token_ids``: arguments of ``attach_modality``, for every model built; if neither they nor the model name
    a modality's token, the mask is left to ``macs.modality``. ``built`` gets every layer that is built, where
    layers must outlive the code that builds them, as for a report at its end.
    """
    return _installed.add((runtime, token_ids or {}, built))


def _put() -> Callable[[], None]:
    """Wrap the engine's constructors of layers and models."""
    undo = [_wrap(TransformerLayer, _build_layer)]
    wrapped: list[type] = []
    for model in models():
        if not issubclass(model, tuple(wrapped)):
            undo.append(_wrap(model, _build_model))
            wrapped.append(model)

    def restore() -> None:
        for one in reversed(undo):
            one()

    return restore


_installed: Patch[tuple[Runtime, dict[str, int], list[Any] | None]] = Patch(_put)


def _wrap(owner: type, around: Callable[..., None]) -> Callable[[], None]:
    """Wrap a class's constructor in ``around(original, call)``; returns how to undo it."""
    original: Callable[..., None] = vars(owner)["__init__"]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if _installed.current is None:  # kept by a caller after uninstalling
            return original(self, *args, **kwargs)
        return around(original, signature.bind(self, *args, **kwargs), *_installed.current)

    owner.__init__ = init  # type: ignore[misc]

    def undo() -> None:
        owner.__init__ = original  # type: ignore[misc]

    return undo


def _build_layer(
    original: Callable[..., None],
    call: inspect.BoundArguments,
    runtime: Runtime,
    token_ids: dict[str, int],
    built: list[Any] | None,
) -> None:
    submodules = call.arguments["submodules"]
    mlp = macs_mlp(submodules.mlp, runtime, call.arguments.get("pg_collection"))
    if mlp is not None:
        call.arguments["submodules"] = copy(submodules)
        call.arguments["submodules"].mlp = mlp
        if built is not None:
            built.append(call.args[0])
    original(*call.args, **call.kwargs)


def _build_model(
    original: Callable[..., None],
    call: inspect.BoundArguments,
    runtime: Runtime,
    token_ids: dict[str, int],
    built: list[Any] | None,
) -> None:
    original(*call.args, **call.kwargs)
    model = call.args[0]
    ids = dict(token_ids)
    padding = ids.pop("padding_token_id", None)
    named = named_tokens(*(ids.get(f"{kind}_token_id") for kind in ("image", "video", "audio")))
    watch(model, known_tokens(model, named), padding)
