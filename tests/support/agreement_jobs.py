"""Jobs for worker processes: ranks whose settings differ, and ranks that an error left in the middle."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import macs
from macs import MACSConfig, Profile, Runtime, Topology
from macs.runtime.consistency import RankConsistency
from support.cases import AnyAdapter

TOKENS, EXPERTS, TOP_K, HIDDEN = 80, 8, 2, 16


class Layer(torch.nn.Module):
    """An engine's layer in small: plans what it gets, then exchanges something with its group."""

    def __init__(self, runtime: Runtime, group: Any) -> None:
        super().__init__()
        self.register_buffer(
            "router", torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
        )
        own, size = dist.get_rank(group), dist.get_world_size(group)
        topology = Topology(EXPERTS, size, sources=(own,))
        self.macs = runtime.add_layer(AnyAdapter(self.rows, topology, TOP_K, group))
        self.fails = False

    def rows(self) -> torch.Tensor:
        return self.router

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.macs.forward_pass(len(hidden), hidden.device, self.training):
            scores = (hidden @ self.router.T).softmax(1)
            weights, experts = scores.topk(TOP_K)
            if not self.training and self.macs.acts_on(len(hidden), hidden.device):
                tokens = self.macs.tokens(1, len(hidden), False, hidden.device)
                self.macs.routing(hidden, experts, weights, scores, tokens)
            if self.fails:
                raise RuntimeError("in the layer")
            total = hidden.sum(0)
            dist.all_reduce(total, group=self.macs.group)
        return hidden + total


class Model(torch.nn.Module):
    def __init__(self, runtime: Runtime, layers: int = 3) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(runtime, dist.group.WORLD) for _ in range(layers))
        self.between: int | None = None
        macs.runtime.hooks.ModalityHook(self, macs.runtime.calls.CallReader(text_only=True))
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.randn(input_ids.numel(), HIDDEN, generator=torch.Generator().manual_seed(1))
        for index, layer in enumerate(self.layers):
            if self.between == index:
                raise KeyError("between the layers")
            hidden = layer(hidden)
        return hidden


IDS = torch.ones(1, TOKENS, dtype=torch.int64)


def profile_of(count: int) -> Profile:
    counts = torch.full((1, EXPERTS), count, dtype=torch.int64)
    fingerprint = macs.router_fingerprint(
        torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    )
    return Profile(counts, counts.clone(), (fingerprint,), TOP_K)


def change(runtime: Runtime, model: torch.nn.Module, kind: str) -> None:
    """Make this rank another than the others."""
    config = MACSConfig()
    if kind == "enabled":
        runtime.enabled = False
    elif kind == "calibrating":
        runtime.start_calibration()
    elif kind == "training":
        model.train()
    elif kind == "policy":
        runtime.use("token-drop", config)
    elif kind == "profile":
        runtime.use("macs", config, profile_of(3))
    elif kind == "macs version":
        macs.runtime.runtime.__version__ = "0.0.9"
        runtime._told = None
    else:
        value = {"level": "expert", "target_load": 1.5, "min_tokens": 8, "cost": "weight"}[kind]
        runtime.use("macs", config.updated(**{kind: value}))


def ranks_that_differ(kind: str, before_first: bool) -> Any:
    """Two passes; rank 1 changes something before the first or the second of them."""
    runtime = Runtime()
    model = Model(runtime)
    version, wait = macs.runtime.runtime.__version__, macs.runtime.consistency.WAIT
    macs.runtime.consistency.WAIT = timedelta(seconds=1)
    began = time.monotonic()
    try:
        if not before_first:
            model(IDS)
        if dist.get_rank() == 1:
            change(runtime, model, kind)
        for _ in range(3):
            model(IDS)
    except Exception as error:
        raise type(error)(f"{error} [after {time.monotonic() - began:.1f} s]") from error
    finally:
        macs.runtime.runtime.__version__, macs.runtime.consistency.WAIT = version, wait


def ranks_that_change_alike() -> dict[str, Any]:
    """Changes that all make, some milliseconds apart, in passes that are planned and in others."""
    runtime = Runtime()
    model = Model(runtime)
    small = IDS[:, :3]
    for step, ids in enumerate((IDS, small, IDS, small, IDS)):
        time.sleep(0.01 * dist.get_rank())
        if step == 1:
            runtime.use("macs", MACSConfig(target_load=1.2))
        if step == 2:
            runtime.enabled = False
        if step == 3:
            runtime.enabled = True
            runtime.use("token-drop", MACSConfig(target_load=1.2))
        model(ids)
    looks: list[float] = []
    agreement = model.layers[0].macs.agreement
    real = agreement._look
    agreement._look = lambda: looks.append(1.0) or real()
    model(IDS)
    model(small)
    began = time.perf_counter()
    for _ in range(100):
        real()
    return {"changes": agreement.changes, "looks": len(looks), "us": (time.perf_counter() - began) * 1e4}


def a_late_rank() -> bool:
    """A rank that is long in loading is waited for by the collective, not called a disagreement."""
    macs.runtime.consistency.WAIT, wait = timedelta(seconds=0.2), macs.runtime.consistency.WAIT
    try:
        model = Model(Runtime())
        if dist.get_rank() == 1:
            time.sleep(1.0)
        model(IDS)
        model(IDS)
        return model.layers[0].macs.agreement._compared
    finally:
        macs.runtime.consistency.WAIT = wait


def broken_off(where: str) -> list[str]:
    """Rank 1 fails in a pass and goes on with the next one; what each pass of it said."""
    runtime = Runtime()
    model = Model(runtime)
    model(IDS)
    if dist.get_rank() == 0:
        try:
            for _ in range(3):
                model(IDS)
        except RuntimeError:
            pass  # rank 1 has left the group
        return []
    said = []
    if where == "in a layer":
        model.layers[1].fails = True
    elif where == "between layers":
        model.between = 2
    elif where == "before the first layer":
        model.between = 0
    else:
        model.register_forward_hook(lambda *_: [][0])  # after the last one
    for _ in range(3):
        try:
            model(IDS)
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        model.layers[1].fails, model.between = False, None
        model._forward_hooks.clear()
        macs.runtime.hooks.ModalityHook(model, macs.runtime.calls.CallReader(text_only=True))
        if where == "after the last layer":
            break
    return said


def without_a_store() -> list[str]:
    """Groups whose backend has none: said once, and served."""
    real = dist.distributed_c10d._get_default_store
    dist.distributed_c10d._get_default_store = lambda: None
    macs.runtime.consistency._warned = False
    try:
        model = Model(Runtime())
        model(IDS)
        return [str(type(model.layers[0].macs.agreement._store).__name__)]
    finally:
        dist.distributed_c10d._get_default_store = real


def deep_copies() -> list[int]:
    """A copied model's layers agree among themselves."""
    import copy

    runtime = Runtime()
    model = Model(runtime)
    model(IDS)
    copied = copy.deepcopy(model)
    copied(IDS)
    model(IDS)
    agreements = {id(layer.macs.agreement) for one in (model, copied) for layer in one.layers}
    return [
        len(agreements),
        len(runtime.layers),
        isinstance(copied.layers[0].macs.agreement, RankConsistency),
    ]
