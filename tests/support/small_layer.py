"""An engine's layer in small: plans what it gets, then exchanges something with its group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from macs import Runtime, Topology
from macs.adapters import LayerAdapter

EXPERTS, TOP_K, HIDDEN = 8, 2, 16
ROUTER = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))


class Adapter(LayerAdapter):
    def router_weight(self) -> torch.Tensor:
        return ROUTER


class Layer(nn.Module):
    """fails: raise between the plan and the exchange."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        group = dist.group.WORLD
        topology = Topology(EXPERTS, group.size(), sources=(group.rank(),))
        self.macs = runtime.add_layer(Adapter(topology, TOP_K, group))
        self.fails = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.macs.forward_pass(len(hidden), hidden.device, self.training):
            scores = (hidden @ ROUTER.T).softmax(1)
            weights, experts = scores.topk(TOP_K)
            if not self.training and self.macs.acts_on(len(hidden), hidden.device):
                tokens = self.macs.tokens(1, len(hidden), False, hidden.device)
                self.macs.plan(hidden, experts, weights, scores, tokens)
            if self.fails:
                raise RuntimeError("in the layer")
            total = hidden.sum(0)
            dist.all_reduce(total)
        return hidden + total
