"""Which token is which in every call of Megatron's models, and which expert is in service."""

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from types import SimpleNamespace

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from macs import IMAGE, TEXT
from megatron_macs.hooks import MegatronHook

JOBS = "support.megatron_tokens"


def test_padding_is_found_in_every_argument_that_marks_it(pool):
    found = pool.run(f"{JOBS}:padding_of_calls", 1)[0]
    for name, one in found.items():
        assert one == {"calls": 2, "kinds": True, "valid": True, "counted": [24.0, 24.0]}, name


def test_a_padding_mask_that_nobody_reads_is_an_error(pool):
    said = pool.run(f"{JOBS}:padding_that_nobody_read", 1)[0]
    assert "padding_mask: the model was called with one" in said and "attach_modality(model)" in said


@pytest.mark.parametrize(("chunks", "length"), [(2, 9), (3, 10), (4, 3)])
def test_chunks_may_be_cut_off_a_part_of_a_tensor(pool, chunks, length):
    found = pool.run(f"{JOBS}:chunks_of_a_slice", 1, chunks, length)[0]
    assert found == {"whole": True, "again": True, "uncut": True}


@pytest.mark.skipif(
    "tokens_per_sample" not in PackedSeqParams.__dataclass_fields__,
    reason="this Megatron folds no samples for its MoE layers",
)
def test_samples_in_a_row_are_sequences_of_their_own(pool):
    assert pool.run(f"{JOBS}:samples_in_a_row", 1) == [{"kinds": True, "valid": True}]


def test_a_model_may_pack_inside_what_came_padded(pool):
    assert pool.run(f"{JOBS}:packed_inside", 1, True, True) == [{"kinds": True, "valid": True}]
    (outer,) = pool.run(f"{JOBS}:packed_inside", 1, True, False)
    assert "use attach_modality on the model that is called with packed_seq_params too" in outer["error"]
    (inner,) = pool.run(f"{JOBS}:packed_inside", 1, False, True)
    assert "use attach_modality on the model that packs, too" in inner["error"]


@pytest.mark.parametrize("policy", ["macs", "rank-balanced", "expanded-drop"])
@pytest.mark.parametrize("groups", [False, True])
def test_experts_that_a_bias_takes_out_get_no_token(pool, policy, groups):
    for sent, rerouted, kept in pool.run(f"{JOBS}:disabled_experts", 2, policy, groups):
        assert sent == 0 and kept > 0
        assert rerouted > 0 or policy == "expanded-drop" or groups


def test_installations_end_in_any_order(pool):
    assert pool.run(f"{JOBS}:installed_in_any_order", 1) == [[True, True, True]]


def test_layers_may_be_copied(pool):
    assert pool.run(f"{JOBS}:copied_layers", 1)[0]["stock"]


def test_the_dynamic_engines_own_mask_is_used():
    """``DynamicInferenceContext.current_image_token_mask()`` of Megatron's main branch: -1 is text."""

    class Model(torch.nn.Module):
        config = SimpleNamespace(cuda_graph_impl="none")

        def forward(self, input_ids, inference_context=None):
            from macs.adapters import current_modality

            return current_modality()

    model = Model()
    hook = MegatronHook(model, {9: IMAGE}, None)
    context = SimpleNamespace(
        active_token_count=4,
        is_static_batching=lambda: False,
        current_image_token_mask=lambda: torch.tensor([[-1, 0, 1, -1, -1]]),
    )
    ids = torch.tensor([[9, 1, 1, 2, 0]])
    found = model(ids, inference_context=context)
    assert found.ids.tolist() == [[TEXT, IMAGE, IMAGE, TEXT, TEXT]]
    assert found.valid.tolist() == [[True] * 4 + [False]]
    context.current_image_token_mask = lambda: None  # a step without pictures
    assert model(ids, inference_context=context).ids.tolist() == [[IMAGE, TEXT, TEXT, TEXT, TEXT]]
    context.current_image_token_mask = lambda: torch.tensor([[0, -1]])
    with pytest.raises(ValueError, match=r"current_image_token_mask: found shape \(1, 2\)"):
        model(ids, inference_context=context)
    hook.remove()
