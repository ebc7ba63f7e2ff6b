"""Masks of models that were swapped: what they hide stays hidden, or they are refused."""

import copy

import pytest
import torch
from test_swap import D, T, encoder, sequential
from test_swap_hugging_face import llama
from test_swap_refusals import Block, unchanged
from torch import nn

from segmoe_kernels import replace_ffn

SIZES = {"segment_sizes": 3, "num_experts": 2, "shared_expert": "token"}

LATER = torch.ones(T, T, dtype=torch.bool).triu(1)
FLOATS = torch.zeros(T, T, dtype=torch.float64)
CAUSAL = {
    "bool": LATER,
    "-inf": FLOATS.masked_fill(LATER, -torch.inf),
    "lowest": FLOATS.masked_fill(LATER, torch.finfo(torch.float64).min),
    "banded": LATER | LATER.mT.triu(-T).tril(-4),
    "heads": LATER.expand(4, T, T),
    "one sequence": torch.stack([LATER, LATER, LATER & False, LATER & False]),
}
OTHERS = {
    "window": LATER.triu(4) | LATER.mT.tril(-4),
    "one head": torch.stack([LATER, LATER.mT, LATER & False, LATER & False]),
    "last hidden": torch.ones(T, T, dtype=torch.bool).triu(T - 1),
}


def calls(model, alone, x, mask):
    """What a user calls: an encoder, or its layers one by one; by position and by name."""
    if not alone:
        return [lambda: model(x, mask), lambda: model(x, mask=mask)]
    return [lambda: model.layers[1](x, mask), lambda: model.layers[1](x, src_mask=mask)]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("case", CAUSAL)
def test_every_causal_mask_is_refused_where_experts_look_ahead(case, alone):
    model, x, mask = encoder().eval(), torch.randn(2, T, D, dtype=torch.float64), CAUSAL[case]
    replace_ffn(model, **SIZES)
    for call in calls(model, alone, x, mask):
        with pytest.raises(ValueError, match=r"mask to show later steps where experts see them"):
            call()
    model(x[:, :1], mask[..., :1, :1])
    for other in OTHERS.values():
        model(x, other)
    for allowed in (True, False):  # experts that see no later step, and that were told they may
        model = encoder().eval()
        replace_ffn(model, causal=allowed, **SIZES)
        for call in calls(model, alone, x, mask):
            assert call().isfinite().all()


def test_compiled_code_gives_nan_for_a_causal_mask():
    model, x = encoder(1).eval(), torch.randn(2, T, D, dtype=torch.float64)
    replace_ffn(model, **SIZES)
    window = model(x, OTHERS["window"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    # PyTorch's encoder looks at a mask to find is_causal, so whoever compiles has to say it.
    assert compiled(x, CAUSAL["banded"], is_causal=False).isnan().all()
    torch.testing.assert_close(compiled(x, OTHERS["window"], is_causal=False), window)


def test_layers_of_an_encoder_look_at_masks_themselves_but_once(monkeypatch):
    model, x = encoder().eval(), torch.randn(2, T, D, dtype=torch.float64)
    replace_ffn(model, **SIZES)
    hidden = torch.zeros(2, T, dtype=torch.bool)
    hidden[:, 7:] = True
    floats = torch.zeros(2, T, dtype=x.dtype).masked_fill(hidden, -1e9)
    refused = pytest.raises(ValueError, match="src_key_padding_mask to be 0 or below half")
    with refused:
        model.layers[1](x, src_key_padding_mask=floats)
    looks = []
    plain = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: looks.append(t) or plain(t))
    model(x, src_key_padding_mask=floats.masked_fill(hidden, -torch.inf))
    assert len(looks) == 1
    model(x, src_key_padding_mask=hidden)
    assert len(looks) == 1
    # Nor after an error inside an encoder do layers trust it.
    with pytest.raises(AssertionError):
        model(x[..., :3])
    with refused:
        model.layers[1](x, src_key_padding_mask=floats)


def masked(padding):
    """A block whose attention hides the steps that ``padding`` makes of its mask."""

    def forward(block, x, mask):
        x = x + block.position
        x = x + block.attention(x, x, x, key_padding_mask=padding(mask))[0]
        return x + block.ff(x)

    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    torch.manual_seed(0)
    return Block(forward, attention=attention, ff=sequential(), position=nn.Embedding(T, D).weight)


@pytest.mark.parametrize("hidden", ["some", "none"])
@pytest.mark.parametrize("kind", ["visible", "hidden", "integers"])
def test_steps_that_a_model_hides_by_itself_must_not_reach_visible_ones(kind, hidden):
    visible = torch.ones(3, T, dtype=torch.bool)
    if hidden == "some":
        visible[1, 7:], visible[2, :4] = False, False
    mask = {"visible": visible, "hidden": ~visible, "integers": visible.long()}[kind]
    model = masked((lambda m: m) if kind == "hidden" else (lambda m: m == 0))
    inputs = torch.randn(3, T, D), mask
    message = unchanged(model, replace_ffn, example_inputs=inputs, **SIZES)
    assert "independence of the steps that a mask hides, got experts at 'ff'" in message
    replace_ffn(model, example_inputs=inputs, segment_sizes=1, num_experts=2)


def test_padding_of_an_encoder_keeps_its_independence():
    model = encoder()
    inner = Block(
        lambda block, x, mask: block.encoder(x + block.position, src_key_padding_mask=mask),
        encoder=model, position=nn.Embedding(T, D, dtype=torch.float64).weight,
    )  # fmt: skip
    x, mask = torch.randn(3, T, D, dtype=torch.float64), torch.zeros(3, T, dtype=torch.bool)
    mask[1, 7:], mask[2, :4] = True, True
    replace_ffn(copy.deepcopy(inner), example_inputs=(x, mask), **SIZES)
    kinds, how = nn.Embedding(1, D, dtype=torch.float64), inner.how  # zeros that are no mask
    inner.how = lambda block, x, zeros: how(block, x + kinds(zeros), None)
    replace_ffn(inner, example_inputs=(x, mask.long() * 0), **SIZES)


def test_left_padding_of_a_decoder_is_refused_and_its_mask_warned_about():
    ids, mask = torch.randint(1, 50, (2, T)), torch.ones(2, T, dtype=torch.long)
    mask[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    message = unchanged(llama(), replace_ffn, causal=True, example_inputs=inputs, **SIZES)
    assert "independence of the steps that a mask hides" in message
    right = {**inputs, "attention_mask": mask.flip(1)}
    with pytest.warns(UserWarning, match="experts don't see the model's attention_mask"):
        replace_ffn(llama(), causal=True, example_inputs=right, **SIZES)


def test_variates_with_an_embedding_each_are_no_steps():
    model = Block(
        lambda block, x: block.head(block.ff(block.embed(x.mT) + block.position)).mT,
        embed=nn.Linear(T, D), ff=sequential(), head=nn.Linear(D, T),
        position=nn.Embedding(5, D).weight,
    )  # fmt: skip
    message = unchanged(model, replace_ffn, example_inputs=(torch.randn(3, T, 5),), **SIZES)
    assert "independence along dimension 2, got experts at 'ff'" in message


def test_a_head_behind_a_pooling_is_no_sequence():
    model = Block(lambda block, x: block.ff(x.mean(1, keepdim=True)), ff=sequential())
    x = torch.randn(3, T, D)
    message = unchanged(model, replace_ffn, example_inputs=(x,), **SIZES)
    assert "expected example_inputs to send 'ff' more than a single row" in message


MASKS = {"-inf": -torch.inf, "lowest": None, "1e9": -1e9, "nan": torch.nan, "bias": 0.5}


@pytest.mark.parametrize("value", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alone", [False, True])
def test_mask_of_floats_hides_a_step_from_experts_or_is_refused(value, dtype, alone):
    model = encoder(1)
    model = (model.layers[0] if alone else model).to(dtype).eval()
    replace_ffn(model, **SIZES)
    x = torch.randn(2, T, D, dtype=dtype)
    hidden = torch.zeros(2, T, dtype=torch.bool)
    hidden[0, 7:] = True
    low = torch.finfo(dtype).min if value == "lowest" else MASKS[value]
    mask = torch.zeros(2, T, dtype=dtype).masked_fill(hidden, low)
    if value in {"-inf", "lowest"}:
        expected = model(x, src_key_padding_mask=hidden)[~hidden]
        assert torch.equal(model(x, src_key_padding_mask=mask)[~hidden], expected)
        return
    for args, kwargs in [((x,), {"src_key_padding_mask": mask}), ((x, None, mask), {})]:
        with pytest.raises(ValueError, match="src_key_padding_mask to be 0 or below half"):
            model(*args, **kwargs)
    if (
        alone and value == "bias" and dtype == torch.float32
    ):  # what compiled code can't refuse is no number
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert compiled(x, None, mask)[0].isnan().all()
        assert compiled(x, src_key_padding_mask=mask)[0].isnan().all()
