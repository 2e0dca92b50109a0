"""MACS in models built by code that does not know of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple

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
    return _installed.add(_Installation(runtime, token_ids or {}, built))


def _replacements() -> Iterator[tuple[type, str, Any]]:
    """The engine's constructors of layers and models, wrapped."""
    yield TransformerLayer, "__init__", _wrapped(TransformerLayer, _build_layer)
    wrapped: list[type] = []
    for model in models():
        if not issubclass(model, tuple(wrapped)):
            wrapped.append(model)
            yield model, "__init__", _wrapped(model, _build_model)


class _Installation(NamedTuple):
    runtime: Runtime
    token_ids: dict[str, int]
    built: list[Any] | None


_installed: Patch[_Installation] = Patch(_replacements)

Construct = Callable[[], None]


def _wrapped(
    owner: type, around: Callable[[Construct, inspect.BoundArguments, _Installation], None]
) -> Callable[..., None]:
    """A class's constructor within ``around(construct, call, installation)``."""
    original: Callable[..., None] = vars(owner)["__init__"]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if _installed.current is None:  # kept by a caller after uninstalling
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        return around(lambda: original(*call.args, **call.kwargs), call, _installed.current)

    return init


def _build_layer(construct: Construct, call: inspect.BoundArguments, installed: _Installation) -> None:
    submodules = call.arguments["submodules"]
    mlp = macs_mlp(submodules.mlp, installed.runtime, call.arguments.get("pg_collection"))
    if mlp is not None:
        call.arguments["submodules"] = copy(submodules)
        call.arguments["submodules"].mlp = mlp
        if installed.built is not None:
            installed.built.append(call.args[0])
    construct()


def _build_model(construct: Construct, call: inspect.BoundArguments, installed: _Installation) -> None:
    construct()
    model, ids = call.args[0], dict(installed.token_ids)
    padding = ids.pop("padding_token_id", None)
    named = named_tokens(*(ids.get(f"{kind}_token_id") for kind in ("image", "video", "audio")))
    watch(model, known_tokens(model, named), padding)
