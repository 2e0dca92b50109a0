"""vLLM's routers, with a plan between choice and dispatch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .layer import PlannedLayer


def reserve(router: Any) -> None:
    """Make a router one that may be planned: from vLLM 0.33 on this keeps kernels that route by themselves
    away, which are chosen while the model is built."""
    if not hasattr(type(router), "macs_layer"):
        stock: Any = type(router)
        router.__class__ = _planned(stock)


@cache
def _planned(stock: Any) -> Any:
    class Planned(stock):  # type: ignore[misc]
        macs_layer: PlannedLayer | None = None

        @property
        def supports_monolithic_kernels(self) -> bool:
            return False

        def _compute_routing(
            self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any, **given: Any
        ) -> tuple[Tensor, Tensor]:
            weights, ids = super()._compute_routing(hidden_states, router_logits, indices_type, **given)
            if self.macs_layer is None:
                raise RuntimeError(
                    "MACS: a MoE layer runs that was not found when the model was loaded; leave macs out of "
                    "--additional-config"
                )
            return self.macs_layer.route(hidden_states, router_logits, weights, ids)

    Planned.__name__ = Planned.__qualname__ = f"Planned{stock.__name__}"
    return Planned
