"""Building models with MACS that are built by code which knows nothing of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import copy
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from macs import Runtime
from macs.serving.hooks import named_kinds
from macs.serving.installed import Installed

from .compat import models
from .hooks import known_token_kinds, watch
from .spec import macs_mlp


def install(runtime: Runtime, token_ids: dict[str, int] | None = None) -> Callable[[], None]:
    """Build every transformer layer with MACS from now on; returns a function that undoes it.

    Of several installations the last one acts; they may be undone in any order.

    ``token_ids``: arguments of ``attach_modality``, for every model built; where they and the model say
    nothing, the mask is left to ``macs.modality``.
    """
    return _installed.add((runtime, token_ids or {}))


def _put() -> Callable[[], None]:
    """Put the constructors of layers and models over the engine's."""
    undo = [_wrap(TransformerLayer, _build_layer)]
    wrapped: list[type] = []
    for model in models():
        if not issubclass(model, tuple(wrapped)):
            undo.append(_wrap(model, _build_model))
            wrapped.append(model)

    def take_away() -> None:
        for one in reversed(undo):
            one()

    return take_away


_installed: Installed[tuple[Runtime, dict[str, int]]] = Installed(_put)


def _wrap(owner: type, around: Callable[..., None]) -> Callable[[], None]:
    """Put ``around(original, call)`` in the place of a class's constructor; returns how to undo it."""
    original: Callable[..., None] = vars(owner)["__init__"]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if _installed.current is None:  # somebody kept this constructor
            return original(self, *args, **kwargs)
        return around(original, signature.bind(self, *args, **kwargs), *_installed.current)

    owner.__init__ = init  # type: ignore[misc]

    def undo() -> None:
        owner.__init__ = original  # type: ignore[misc]

    return undo


def _build_layer(
    original: Callable[..., None], call: inspect.BoundArguments, runtime: Runtime, token_ids: dict[str, int]
) -> None:
    submodules = call.arguments["submodules"]
    mlp = macs_mlp(submodules.mlp, runtime, call.arguments.get("pg_collection"))
    if mlp is not None:
        call.arguments["submodules"] = copy(submodules)
        call.arguments["submodules"].mlp = mlp
    original(*call.args, **call.kwargs)


def _build_model(
    original: Callable[..., None], call: inspect.BoundArguments, runtime: Runtime, token_ids: dict[str, int]
) -> None:
    original(*call.args, **call.kwargs)
    model = call.args[0]
    ids = dict(token_ids)
    padding = ids.pop("padding_token_id", None)
    named = named_kinds(*(ids.get(f"{kind}_token_id") for kind in ("image", "video", "audio")))
    watch(model, known_token_kinds(model, named), padding)
