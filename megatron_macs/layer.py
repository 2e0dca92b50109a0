"""Megatron's MoE layer with MACS in its router and its dispatcher."""

from __future__ import annotations

from typing import Any

from megatron.core import utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from macs.adapters import (
    LayerAdapter,
    LayerRuntime,
    Owner,
    Policy,
    Runtime,
    TokenShard,
    Topology,
    current_modality,
)

from .compat import (
    INFERENCE_OPTIMIZED_SINCE,
    inference_optimized,
)
from .dispatcher import (
    Chunk,
    MACSAllGatherTokenDispatcher,
    MACSAlltoAllTokenDispatcher,
    MACSFlexTokenDispatcher,
)
from .router import MACSTopKRouter

DISPATCHERS = ("allgather", "alltoall", "flex")
FLEX_BACKENDS = ("deepep", "hybridep")


class MACSMoELayer(MoELayer):
    """``MoELayer`` that plans between routing and dispatch; made by ``with_macs``.

    Takes the base class's arguments and ``runtime``, which all MACS layers of a model share. A setting that
    cannot be honoured is a ``ValueError`` here, not in a forward pass. Weights and state dict are the base
    class's.
    """

    macs: LayerRuntime | None = None

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        runtime: Runtime,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        check_config(config, pg_collection)
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        if not isinstance(self.router, MACSTopKRouter):
            raise ValueError(
                f"MACSMoELayer: found router {type(self.router).__name__}, expected MACSTopKRouter; "
                "build the layer's spec with megatron_macs.with_macs"
            )
        if kwargs.get("is_mtp_layer"):
            return  # multi-token prediction: its calls have no mask, so the layer stays the engine's own
        self.macs = runtime.add_layer(MoELayerAdapter(self, pg_collection))
        self.router.macs = self.macs
        adopt(self.token_dispatcher, self.macs)
        if config.transformer_impl == "inference_optimized":
            # The layer uses one with an inference engine and the other without.
            adopt(self._inference_token_dispatcher, self.macs)

    def forward(self, hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [S, B, D] and the base class's other arguments -> what it returns."""
        if self.macs is None:
            return super().forward(hidden_states, *args, **kwargs)
        if hidden_states is None:  # the later calls of a layer that partial CUDA graphs call in three parts
            output = super().forward(None, *args, **kwargs)
            self.macs.done()
            return output
        count, continues = hidden_states.shape[:-1].numel(), False
        if self.config.mlp_chunks_for_prefill > 1:
            # The engine divides the hidden states of a prompt and calls the layer for each chunk.
            chunk = Chunk.of(hidden_states, self.token_dispatcher.chunk)
            self.token_dispatcher.chunk, continues = chunk, chunk.first > 0
        whole = "expert_compute" in self.fwd_execution_map
        within = self.macs.forward_pass if whole else self.macs.entering
        with within(count, hidden_states.device, self.training, continues) as acts:
            if acts and kwargs.get("padding_mask") is not None:
                refuse_unread_padding()
            return super().forward(hidden_states, *args, **kwargs)


class MoELayerAdapter(LayerAdapter):
    """``LayerAdapter`` of Megatron's MoE layer; pg_collection: its process groups."""

    def __init__(self, layer: MoELayer, pg_collection: Any) -> None:
        config = layer.config
        topology = Topology(
            num_experts=config.num_moe_experts,
            num_ranks=utils.get_pg_size(layer.ep_group),
            sources=(utils.get_pg_rank(layer.ep_group),),
        )
        group = pg_collection.tp_ep  # the ranks that share these experts
        super().__init__(topology, config.moe_router_topk, group)
        self.config = config
        self.owner = Owner(layer)
        self._replicas = utils.get_pg_rank(pg_collection.tp), utils.get_pg_size(pg_collection.tp)

    def plans_now(self) -> bool:
        """A static engine may pad the experts while it decodes, which leaves nothing to plan."""
        return not self.config.moe_pad_expert_input_to_capacity

    def router_weight(self) -> Tensor:
        return self.owner().router.weight

    def token_shard(self) -> TokenShard:
        """Megatron's static engine turns sequence parallelism off when it begins to serve."""
        index, parts = self._replicas if self.config.sequence_parallel else (0, 1)
        return TokenShard(index, parts)

    def refusal(self, policy: Policy) -> str | None:
        """Some dispatchers send k assignments a token; tensor-parallel ranks with the same tokens must make
        the same plan."""
        if not policy.adds_assignments:
            return None
        config, replicas = self.config, self._replicas[1] // self.token_shard().parts
        narrow = None
        if config.transformer_impl == "inference_optimized":
            narrow = "transformer_impl = 'inference_optimized'"
        if config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend == "deepep":
            narrow = "moe_flex_dispatcher_backend = 'deepep'"
        if narrow is not None:
            sends = f"{narrow} sends {config.moe_router_topk} assignments a token"
            return f"{sends}, and this policy may add to them"
        if replicas > 1:
            return (
                f"every rank would add experts of its own, but {replicas} tensor-parallel ranks hold the "
                "same tokens and must make the same plan; set sequence_parallel, which gives each its own"
            )
        return None

    def mixes_outputs(self) -> str | None:
        """Overlapped shared experts are added where the dispatcher combines."""
        config = self.config
        overlaps = config.transformer_impl == "inference_optimized" or config.moe_shared_expert_overlap
        if config.moe_shared_expert_intermediate_size is None or not overlaps:
            return None
        return (
            "found shared experts that are added as the dispatcher combines (moe_shared_expert_overlap, "
            "transformer_impl = 'inference_optimized'), expected neither while estimates are fitted"
        )


def refuse_unread_padding() -> None:
    """Refuse a padding mask that was not read where the model was called."""
    known = current_modality()
    if known is None or not known.states_valid:
        raise ValueError(
            "padding_mask: the model was called with one, and the current modality does not have it; "
            "expected attach_modality(model), which reads it, or macs.modality(mask, "
            "valid=~padding_mask) around the call"
        )


def adopt(dispatcher: Any, layer: LayerRuntime) -> None:
    """Turn one of the engine's dispatchers into ours, in place; groups, buffers and shared experts stay."""
    forms: dict[type, type] = {
        MoEAllGatherTokenDispatcher: MACSAllGatherTokenDispatcher,
        MoEAlltoAllTokenDispatcher: MACSAlltoAllTokenDispatcher,
        MoEFlexTokenDispatcher: MACSFlexTokenDispatcher,
    }
    inference = inference_optimized()
    if inference is not None:
        forms[inference.NCCLAllGatherDispatcher] = inference.MACSNCCLAllGatherDispatcher
        forms[inference.NVLSAllGatherVDispatcher] = inference.MACSNVLSAllGatherVDispatcher
    if type(dispatcher) not in forms:
        names = ", ".join(form.__name__ for form in forms)
        raise ValueError(f"token dispatcher: found {type(dispatcher).__name__}, expected one of {names}")
    dispatcher.__class__ = forms[type(dispatcher)]
    dispatcher.macs = layer


def check_config(config: TransformerConfig, pg_collection: Any) -> None:
    """Raise a ``ValueError`` that names the setting MACS cannot work with, and why."""

    def refuse(field: str, why: str) -> None:
        value = getattr(config, field)
        raise ValueError(f"{field} = {value!r} cannot be used with MACS: {why}")

    if config.num_moe_experts is None:
        raise ValueError("num_moe_experts is not set: MACS needs a model with experts")
    ep_size = utils.get_pg_size(pg_collection.ep)
    if config.num_moe_experts % ep_size:
        raise ValueError(
            f"num_moe_experts = {config.num_moe_experts} is not divisible by expert parallelism {ep_size}"
        )
    if config.moe_token_dispatcher_type not in DISPATCHERS:
        refuse("moe_token_dispatcher_type", f"expected one of {', '.join(DISPATCHERS)}")
    if config.moe_token_dispatcher_type == "flex":
        if config.moe_flex_dispatcher_backend not in FLEX_BACKENDS:
            refuse(
                "moe_flex_dispatcher_backend",
                f"expected one of {', '.join(FLEX_BACKENDS)}; others cannot express what is dropped",
            )
        if getattr(config, "moe_expert_rank_capacity_factor", None) is not None:
            refuse("moe_expert_rank_capacity_factor", "it drops what the plan keeps; use target_load")
    if config.moe_expert_capacity_factor is not None:
        refuse(
            "moe_expert_capacity_factor",
            "with it the router drops on its own, before MACS plans; use MACS's capacity_factor",
        )
    if config.moe_pad_expert_input_to_capacity:
        refuse("moe_pad_expert_input_to_capacity", "it needs moe_expert_capacity_factor")
    if config.moe_router_padding_for_quantization:
        refuse("moe_router_padding_for_quantization", "it adds rows after the plan")
    if config.moe_router_score_function not in ("softmax", "sigmoid"):
        refuse(
            "moe_router_score_function", "scores must lie between 0 and 1, as those of softmax and sigmoid do"
        )
    if config.moe_latent_size:
        refuse("moe_latent_size", "the dispatcher would see projected features, not the layer's input")
    if getattr(config, "moe_enable_routing_replay", False):
        refuse("moe_enable_routing_replay", "a replayed routing is not to be planned anew")
    if getattr(config, "batch_invariant_mode", False):
        refuse("batch_invariant_mode", "a plan depends on the whole batch")
    if config.moe_router_load_balancing_type in ("sinkhorn", "quantile_balancing"):
        refuse("moe_router_load_balancing_type", "its choice does not follow from the scores alone")
    if config.transformer_impl == "inference_optimized" and inference_optimized() is None:
        refuse("transformer_impl", f"MACS supports it from Megatron {INFERENCE_OPTIMIZED_SINCE} on")
    if config.context_parallel_size > 1:
        refuse("context_parallel_size", "it splits sequences, and with them the modality mask")
    graphs = "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope"
    parts = getattr(config, graphs, None)  # none: all
    captured = config.cuda_graph_impl != "none" and (not parts or "moe_preprocess" in str(parts))
    padded = getattr(config, "moe_pad_experts_for_cuda_graph_inference", False)
    inference = config.transformer_impl == "inference_optimized"
    if captured and config.moe_token_dispatcher_type == "alltoall" and not (padded or inference):
        refuse(
            graphs,
            "the number of rows sent is known only after the plan, inside what the graph captures",
        )
