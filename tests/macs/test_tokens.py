"""The modality mask: what it accepts, how it travels, how it is laid out."""

import threading

import pytest
import torch

from macs import IMAGE, TEXT, VIDEO, Modality, modality
from macs.adapters import current_modality


def test_bool_masks_mean_images():
    found = Modality.of(torch.tensor([[True, False]]))
    assert found.ids.tolist() == [[IMAGE, TEXT]] and found.valid.all() and not found.exempt.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": torch.ones(3)}, ValueError, "modality mask: found shape (3,), expected (any, any)"),
        ({"mask": torch.ones(1, 3)}, TypeError, "modality mask: found torch.float32, expected torch.bool"),
        ({"mask": [[True]]}, TypeError, "modality mask: found list, expected a torch.Tensor"),
        (
            {"mask": torch.ones(1, 3, dtype=torch.bool), "valid": torch.ones(1, 2, dtype=torch.bool)},
            ValueError,
            "valid: found shape (1, 2), expected (1, 3)",
        ),
        (
            {"mask": torch.ones(1, 3, dtype=torch.bool), "exempt": torch.ones(1, 3)},
            TypeError,
            "exempt: found torch.float32, expected torch.bool",
        ),
        (
            {"mask": torch.ones(1, 3).bool(), "exempt": torch.ones(1, 3, device="meta").bool()},
            ValueError,
            "exempt: found on meta, expected on cpu",
        ),
        ({"mask": torch.tensor([[0, 256]])}, ValueError, "found ids 0 to 256, expected 0 to 3"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error) as caught:
        Modality.of(**arguments)
    assert message in str(caught.value)


def test_a_modality_is_complete():
    found = Modality.of(torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="already part of a Modality"), modality(found, exempt=found.valid):
        pass


def test_layouts():
    mask = torch.tensor([[IMAGE, TEXT, TEXT], [TEXT, VIDEO, VIDEO]])
    found = Modality.of(mask, valid=torch.tensor([[True] * 3, [True, True, False]]))
    batch, sequence = found.tokens(), found.tokens(True)
    assert batch.modality.tolist() == [1, 0, 0, 0, 2, 2] and batch.position.tolist() == [0, 1, 2, 3, 4, 5]
    # Megatron's order: token 0 of both sequences, then token 1, then token 2.
    assert sequence.modality.tolist() == [1, 0, 0, 2, 0, 2] and sequence.position.tolist() == [
        0,
        3,
        1,
        4,
        2,
        5,
    ]
    assert sequence.valid.tolist() == [True] * 5 + [False]
    assert sequence.visual.tolist() == [True, False, False, True, False, False]
    assert found.tokens() is batch  # made once for all layers


def test_sources_divide_the_sequences():
    found = Modality.of(torch.zeros(4, 2, dtype=torch.bool))
    assert found.tokens(sources=2).source.tolist() == [0] * 4 + [1] * 4
    assert found.tokens(True, 2).source.tolist() == [0, 0, 1, 1] * 2


def test_blocks_nest_and_end():
    first, second = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    assert current_modality() is None
    with modality(first):
        with modality(second):
            assert current_modality().ids.tolist() == [[1, 1]]
        with pytest.raises(ZeroDivisionError), modality(second):
            _ = 1 / 0
        assert current_modality().ids.tolist() == [[0, 0]]
    assert current_modality() is None


def test_threads_have_their_own():
    found = []
    with modality(torch.ones(1, 1, dtype=torch.bool)):
        thread = threading.Thread(target=lambda: found.append(current_modality()))
        thread.start()
        thread.join()
    assert found == [None]


def test_no_tokens_at_all():
    tokens = Modality.of(torch.zeros(0, 4, dtype=torch.bool)).tokens(True)
    assert tokens.modality.shape == (0,) and tokens.source.shape == (0,)
