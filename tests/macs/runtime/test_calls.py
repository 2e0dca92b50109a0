"""What a call says of its tokens, in every way it can, and what takes precedence."""

import copy
import pickle
import types
from types import SimpleNamespace

import pytest
import torch
from support.cases import AnyAdapter
from torch import nn

import macs
from macs import IMAGE, Modality, Runtime, Topology, attach_modality, modality
from macs.adapters import current_modality
from macs.runtime.calls import CallReader, real_keys
from macs.runtime.hooks import ModalityHook
from macs.runtime.modality import Unreadable

IDS = torch.tensor([[0, 5, 1, 5], [5, 1, 2, 0]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
VALID = MASK.bool()
READER = CallReader({5: IMAGE}, padding_id=None)


def valid_of(given, reader=READER, **options):
    return reader.read({"input_ids": IDS, **given}, **options).valid


def causal(mask, right_way=True):
    """As attention takes it: [B, 1, S, S], True where a query looks at a key."""
    size = mask.shape[1]
    seen = torch.ones(size, size, dtype=torch.bool).tril() & mask.bool()[:, None, :]
    return (seen if right_way else ~seen)[:, None]


@pytest.mark.parametrize(
    ("given", "reader"),
    [
        ({"attention_mask": MASK}, READER),
        ({"attention_mask": causal(MASK)}, READER),
        ({"attention_mask": torch.where(causal(MASK), 0.0, float("-inf"))}, READER),
        ({"attention_mask": torch.where(causal(MASK), 0.0, torch.finfo(torch.float16).min)}, READER),
        ({"attention_mask": {"full_attention": causal(MASK), "sliding_attention": causal(MASK)}}, READER),
        ({"attention_mask": causal(MASK, False)}, CallReader({5: IMAGE}, masked_is_true=True)),
        ({"padding_mask": ~VALID}, READER),
        ({"attention_mask": torch.ones_like(MASK), "padding_mask": ~VALID}, READER),
        ({}, CallReader({5: IMAGE}, padding_id=0)),
        ({"attention_mask": MASK}, CallReader(text_only=True)),
        ({"attention_mask": MASK}, CallReader()),
        ({}, CallReader(padding_id=0)),
    ],
)
def test_padding_is_found_in_every_argument_that_marks_it(given, reader):
    assert valid_of(given, reader).equal(VALID)


def test_a_mask_that_comes_with_the_call_takes_precedence_over_ids():
    """An end-of-turn token that is the padding token too is no padding where the mask says so."""
    reader = CallReader({5: IMAGE}, padding_id=1)
    assert valid_of({"attention_mask": MASK}, reader).equal(VALID)
    assert valid_of({}, reader).equal(IDS != 1)


def test_a_block_takes_precedence_and_is_completed_by_the_calls_padding():
    mask = IDS == 1
    found = READER.read({"input_ids": IDS, "attention_mask": MASK}, Modality.of(mask, exempt=mask))
    assert found.ids.bool().equal(mask) and found.exempt.equal(mask) and found.valid.equal(VALID)
    stated = Modality.of(mask, valid=~mask)
    assert READER.read({"input_ids": IDS, "attention_mask": MASK}, stated).valid.equal(~mask)


def test_a_block_of_other_tokens_is_refused_where_nothing_else_gives_modality():
    outer = Modality.of(torch.ones(2, 3, dtype=torch.bool))
    given = {"input_ids": IDS, "attention_mask": MASK}
    assert CallReader().read(given, outer) is None  # the block stays, and the layers name its shape
    assert READER.read(given, outer).ids.equal((IDS == 5).to(torch.int8))  # here the ids tell


def test_embeddings_bring_their_padding_too():
    embeds = torch.randn(2, 4, 8)
    types_ = torch.tensor([[0, 1, 0, 2], [1, 0, 0, 0]])
    given = {"inputs_embeds": embeds, "attention_mask": MASK}
    found = READER.read({**given, "mm_token_type_ids": types_})
    assert found.ids.equal(types_.to(torch.int8)) and found.valid.equal(VALID)
    found = CallReader(text_only=True).read(given)
    assert not found.ids.any() and found.valid.equal(VALID)
    found = READER.read(given, Modality.of(types_))
    assert found.ids.equal(types_.to(torch.int8)) and found.valid.equal(VALID)
    unread = READER.read(given)
    assert isinstance(unread, Unreadable) and "inputs_embeds: found them" in unread.reason
    assert "set macs.modality(mask, valid=...) around the call" in unread.reason


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 4, 4)},
            "attention_mask: found shape (2, 4, 4), expected [B, S] or",
        ),
        ({"attention_mask": object()}, "attention_mask: found object"),
        ({"mm_token_type_ids": torch.ones(4)}, "mm_token_type_ids: found shape (4,)"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "packed sequences: found 2 rows of tokens"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask: found shape (2, 3)"),
        ({"attention_mask": torch.ones(2, 1, 3, 4)}, "attention_mask: found shape (2, 1, 3, 4)"),
        ({"padding_mask": torch.ones(2, 3)}, "padding_mask: found (2, 3), expected shape (2, 4)"),
        ({"padding_mask": True}, "padding_mask: found bool"),
    ],
)
def test_what_cannot_be_read_names_the_argument(given, message):
    found = READER.read({"input_ids": IDS, **given})
    assert isinstance(found, Unreadable) and message in found.reason


def Cache(length):
    """As a cache of Hugging Face's with so many tokens in it."""
    return SimpleNamespace(get_seq_length=lambda: length)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # transformers 5.17 and 5.24
@pytest.mark.parametrize("past", [None, 0, 2, torch.tensor(2)])
def test_a_mask_of_fixed_length_is_read_at_the_tokens_positions(past, name):
    """A static cache pads it: what is behind the tokens says nothing of them."""
    start = 0 if past is None else int(past)
    mask = torch.zeros(2, 12, dtype=torch.int64)
    mask[:, : start + 4] = 1
    mask[0, start] = 0
    types = torch.zeros(2, 12, dtype=torch.int64)
    types[1, start + 1] = 1
    given = {"attention_mask": mask, "mm_token_type_ids": types}
    if past is not None:
        given[name] = Cache(past)
    found = READER.read({"input_ids": IDS, **given})
    assert found.valid.tolist() == [[False, True, True, True], [True] * 4]
    assert found.ids.tolist() == [[0] * 4, [0, 1, 0, 0]]


@pytest.mark.parametrize("past", [7, torch.tensor(7)])
def test_types_as_wide_as_a_verified_draft_are_the_prompts(past):
    """Assisted decoding: as many tokens are verified as the prompt has; their ids tell."""
    types = torch.tensor([[0, 1, 1, 0]])
    given = {"input_ids": torch.tensor([[1, 2, 5, 1]]), "mm_token_type_ids": types}
    assert READER.read({**given, "past_key_values": Cache(past)}).ids.tolist() == [[0, 0, 1, 0]]
    assert READER.read({**given, "past_key_values": Cache(0)}).ids.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(("past", "ids"), [(0, [0, 1, 0, 0]), (1, [1, 0, 0, 0]), (5, [0, 0, 0, 0])])
def test_types_are_the_prompts_and_text_is_behind(past, ids):
    """As prompt-lookup decoding hands them on with every longer candidate."""
    given = {
        "input_ids": IDS[:1],
        "mm_token_type_ids": torch.tensor([[0, 1]]),
        "past_key_values": Cache(past),
    }
    assert READER.read(given).ids.tolist() == [ids]


def unattended(seen):
    """What engines do with queries that see nothing: they see everything."""
    return seen | ~seen.any(-1, keepdim=True)


@pytest.mark.parametrize("front", [0, 1, 3])
@pytest.mark.parametrize("window", [2, 99])
@pytest.mark.parametrize("open_", [False, True])
def test_padding_in_front_of_a_four_dimensional_mask(front, window, open_):
    size = 6
    mask = (torch.arange(size) >= front)[None]
    seen = causal(mask)
    index = torch.arange(size)
    seen &= (index[:, None] - index) < window
    assert real_keys(unattended(seen) if open_ else seen, (1, size)).equal(mask)


def test_a_four_dimensional_mask_over_a_cache_with_room_to_spare():
    seen = torch.zeros(2, 1, 2, 8, dtype=torch.bool)  # tokens 3 and 4 of each; the first has two of padding
    for query in range(2):
        seen[0, 0, query, 2 : 4 + query] = True
        seen[1, 0, query, 0 : 4 + query] = True
    assert real_keys(seen, (2, 2)).all()
    prefill = torch.zeros(1, 1, 3, 8, dtype=torch.bool)
    prefill[0, 0, 1, 1] = prefill[0, 0, 2, 1:3] = True
    assert real_keys(prefill, (1, 3)).tolist() == [[False, True, True]]
    assert real_keys(torch.ones(1, 1, 4, 4, dtype=torch.bool), (2, 4)).all()  # everybody looks at everybody


def Packed(ends, padded=None, total=None, sample=None):
    """As Megatron's ``PackedSeqParams``."""
    ends, padded = (None if one is None else torch.tensor(one).int() for one in (ends, padded))
    return SimpleNamespace(
        cu_seqlens_q=ends, cu_seqlens_q_padded=padded, total_tokens=total, tokens_per_sample=sample
    )


def test_packed_sequences_mark_their_padding():
    ids = torch.tensor([[5, 5, 5, 1, 0, 5, 5, 0]])
    found = READER.read({"input_ids": ids, "packed_seq_params": Packed([0, 3, 5], [0, 4, 6])})
    assert found.valid.tolist() == [[True, True, True, False, True, True, False, False]]
    found = READER.read({"input_ids": ids, "packed_seq_params": Packed([0, 2, 8])})
    assert found.valid.all()
    found = READER.read({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 2, 6])})
    assert found.valid.tolist() == [[True] * 6 + [False] * 2]
    found = READER.read({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]])})
    assert found.valid.all()


def test_samples_in_a_row_are_sequences_of_their_own():
    ids = torch.tensor([[5, 1, 5, 5, 1, 0]])
    found = READER.read({"input_ids": ids, "packed_seq_params": Packed([0, 6], sample=3)})
    assert found.ids.tolist() == [[1, 0, 1], [1, 0, 0]]
    outer = Modality.of(ids == 1, exempt=ids == 1)
    found = READER.read({"input_ids": ids, "packed_seq_params": Packed([0, 6], sample=2)}, outer)
    assert found.exempt.tolist() == [[False, True], [False, False], [True, False]]


def test_a_model_may_pack_inside_what_came_padded():
    outer = READER.read({"input_ids": IDS, "attention_mask": MASK})
    inner = READER.read({"packed_seq_params": Packed([0, 3, 6], [0, 4, 8], 8)}, outer)
    assert inner.ids.tolist() == [[1, 0, 1, 0, 1, 0, 0, 0]]
    assert inner.valid.tolist() == [[True] * 3 + [False] + [True] * 3 + [False]]
    assert READER.read({"packed_seq_params": Packed([0, 3, 6])}, outer).ids.tolist() == [[1, 0, 1, 1, 0, 0]]
    lost = READER.read({"packed_seq_params": Packed([0, 3, 4, 6])}, outer)
    assert isinstance(lost, Unreadable) and "found 3" in lost.reason


class Model(nn.Module):
    """Called as Hugging Face's models are; keeps what its layers would find."""

    def __init__(self, **config):
        super().__init__()
        self.config = types.SimpleNamespace(**config)
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        found = current_modality()
        self.seen = None if found is None else (found.ids.clone(), found.valid.clone())
        return self.layer(torch.ones(1, 2))

    def generate(self, ids, **kwargs):
        return self(ids, **kwargs)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def check_seen(model):
    kinds, valid = model.seen
    assert kinds.equal((IDS == 5).to(torch.int8)) and valid.equal(VALID)


@pytest.mark.parametrize("through", ["wrapper", "inside", "compiled"])
def test_hooks_sit_where_the_forward_passes(through):
    model = Model(image_token_id=5)
    whole = torch.compile(model, backend="eager") if through == "compiled" else Wrapper(Wrapper(model))
    hook = attach_modality(whole)
    (model if through == "inside" else whole)(IDS, attention_mask=MASK)
    check_seen(model)
    assert current_modality() is None
    hook.remove()
    (model if through == "inside" else whole)(IDS, attention_mask=MASK)
    assert model.seen is None


@pytest.mark.parametrize("kind", ["PeftModelForCausalLM", "PeftModel"])
def test_a_peft_model_is_found_inside(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = Model(image_token_id=5, model_type="any", get=lambda *_: None)
    model.prepare_inputs_for_generation = lambda ids, **kwargs: {"input_ids": ids, **kwargs}
    settings = peft.LoraConfig(target_modules=["layer"], r=2)
    whole = getattr(peft, kind)(model, settings)
    attach_modality(whole)
    whole(IDS, attention_mask=MASK)
    check_seen(model)
    model.seen = None
    whole.base_model.generate(IDS, attention_mask=MASK)  # as ``PeftModel.generate`` calls it
    check_seen(model)


def test_accelerates_hooks_may_come_first():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = Model(image_token_id=5)
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    attach_modality(model)
    model(IDS, attention_mask=MASK)
    check_seen(model)


def test_without_macs_no_argument_is_checked():
    """What cannot be read is an error of the layer that needs it, not of the call."""
    model = Model(image_token_id=5)
    attach_modality(model)
    runtime = Runtime(macs.MACSConfig(min_tokens=0))
    layer = runtime.add_layer(AnyAdapter(lambda: torch.randn(4, 8), Topology(4), 2))
    model(inputs_embeds=torch.randn(2, 4, 8))
    with layer.forward_pass(8, torch.device("cpu"), False) as acts:
        assert acts and model.seen is None
    model.layer.register_forward_hook(lambda *_: layer.tokens(2, 4, False, torch.device("cpu")))
    with pytest.raises(ValueError, match="inputs_embeds: found them without input_ids"):
        model(inputs_embeds=torch.randn(2, 4, 8))


def test_a_call_without_modality_logs_one_warning(caplog):
    model = Model()
    ModalityHook(model, CallReader(padding_id=0))
    for _ in range(2):
        model(IDS)
    assert model.seen[1].equal(IDS != 0)
    assert caplog.text.count("nothing in a call of Model tells visual tokens from text") == 1
    text = Model()
    ModalityHook(text, CallReader(padding_id=0, text_only=True))
    text(IDS)
    assert "of Model" not in caplog.text.split("\n", 1)[1]


@pytest.mark.parametrize(
    ("mask", "layer", "message"),
    [
        ((70, 9), (70, 1), "a decoding step of generate() inside a macs.modality block"),
        ((2, 8), (1, 11), "if the model packs padded sequences by itself"),
        ((2, 8), (3, 8), "on the call that passes these tokens to the layer"),
    ],
)
def test_a_mask_of_other_tokens_is_refused_with_the_way_out(mask, layer, message):
    of = Runtime().add_layer(AnyAdapter(lambda: torch.randn(4, 8), Topology(4), 2))
    with modality(torch.ones(mask, dtype=torch.bool)), pytest.raises(ValueError, match=r".") as caught:
        of.tokens(*layer, False, torch.device("cpu"))
    assert message in str(caught.value) and f"found shape {mask}" in str(caught.value)


def test_models_with_hooks_are_copied_and_pickled():
    model = Model(image_token_id=5)
    attach_modality(model)
    copied = copy.deepcopy(model)
    restored = pickle.loads(pickle.dumps(model))
    for one in (copied, restored):
        one(IDS, attention_mask=MASK)
        check_seen(one)
    assert not hasattr(model, "seen")
    copied._forward_pre_hooks.clear()
    model(IDS, attention_mask=MASK)
    check_seen(model)
