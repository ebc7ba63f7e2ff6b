"""What a model must go on doing after a swap, as an example or its class tells."""

import copy

import pytest
import torch
from test_swap import D, EncoderLayer, T, layers_of, sequential
from test_swap_refusals import SIZES, Block, unchanged
from torch import nn

from segmoe_kernels import replace_ffn


def attention(block, x, mask=None):
    return block.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def transformer(mask=None, position=True, channels=3):
    """(B, T, C) to (B, T, C): a block of attention and an FFN; ``mask`` of the attention."""

    def forward(block, x):
        x = block.embed(x)
        if position:
            x = x + block.position
        x = x + attention(block, x, None if mask is None else mask(x.shape[1]))
        return block.head(x + block.ff(x))

    torch.manual_seed(0)
    block = Block(
        forward, embed=nn.Linear(channels, D), ff=sequential(), head=nn.Linear(D, channels),
        attention=nn.MultiheadAttention(D, 2, batch_first=True),
    )  # fmt: skip
    block.position = nn.Parameter(torch.randn(T, D))
    return block


def future(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def inverted(encoder_layer, width=T):
    """As in iTransformer: a row is a variate, its embedding the whole look-back."""
    return Block(
        lambda block, x: block.head(block.layer(block.embed(x.mT), tau=1, delta=1)[0]).mT,
        embed=nn.Linear(width, D), layer=encoder_layer, head=nn.Linear(D, width),
    )  # fmt: skip


def mixer():
    """As in TSMixer: one FFN over the transposed time axis, one over channels."""

    def forward(block, x):
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        x = x + block.temporal(x.mT).mT
        return block.head((x + block.channel(x)).mT).mT

    torch.manual_seed(0)
    return Block(
        forward, head=nn.Linear(T, 5),
        temporal=nn.Sequential(nn.Linear(T, 16), nn.ReLU(), nn.Linear(16, T), nn.Dropout(0.1)),
        channel=nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3), nn.Dropout(0.1)),
    )  # fmt: skip


BROKEN = {
    "batch": (
        lambda: Block(lambda block, x: block.ff(x.flatten(0, 1)[None]).view_as(x), ff=sequential()),
        D,
        "independence of the sequences in a batch, got experts at 'ff'",
    ),
    "future": (lambda: transformer(future), 3, "causality, got experts at 'ff'"),
    "order of steps": (
        lambda: transformer(position=False),
        3,
        "equivariance under permutations of dimension 1 (steps have an order in models with positi",
    ),
    "inverted": (
        lambda: inverted(EncoderLayer()),
        3,
        "equivariance under permutations of dimension 2, got experts at 'layer'",
    ),
    "transposed": (
        mixer,
        3,
        "steps for the rows of its FFNs, not for their width, got experts at 'temporal'",
    ),
}


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_a_property_that_would_break_is_named(case, copies):
    """Also where all experts start alike, so that the routing shows in no output yet."""
    build, width, words = BROKEN[case]
    model = build()
    x = torch.randn(3, T, width)
    before, state = model.eval()(x), torch.get_rng_state()
    shared = None if copies else "token"
    options = {**SIZES, "copy_weights": copies, "shared_expert": shared, "example_inputs": (x,)}
    message = unchanged(model.train(), replace_ffn, **options)
    assert words in message
    assert torch.equal(model.eval()(x), before)
    # One expert of each step alone breaks nothing.
    torch.set_rng_state(state)
    assert replace_ffn(model, **{**options, "segment_sizes": 1})


def test_the_module_that_breaks_a_property_is_named_among_others():
    model = nn.Sequential(transformer(), transformer(future))
    block = Block(lambda block, x: block.b(x) + 0 * block.a(x), a=model[0], b=model[1])
    message = unchanged(block, replace_ffn, example_inputs=(torch.randn(2, T, 3),), **SIZES)
    assert "causality, got experts at 'b.ff'" in message


KEPT = {
    "encoder with positions": (transformer, {}, 3),
    "decoder": (lambda: transformer(future), {"causal": True}, 3),
    "channels of a mixer": (mixer, {"match": "channel"}, 3),
    "block of Time-Series-Library": (
        lambda: Block(
            lambda block, x: block.layer(x + block.position, tau=1, delta=1)[0],
            layer=EncoderLayer(), position=nn.Embedding(T, D).weight,
        ),
        {},
        D,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_a_model_that_keeps_its_properties_is_swapped(case):
    build, options, width = KEPT[case]
    model, x = build(), torch.randn(3, T, width)
    state = torch.get_rng_state()
    probed = copy.deepcopy(model)
    replace_ffn(probed, example_inputs=(x,), **options, **SIZES)
    torch.set_rng_state(state)
    replace_ffn(model, **options, **SIZES)
    assert torch.equal(probed.eval()(x), model.eval()(x))  # probing draws no random number


def test_an_example_must_show_what_it_is_asked_for():
    gated = Block(lambda block, x: x + block.zero * block.ff(x), ff=sequential())
    gated.zero = nn.Parameter(torch.zeros(()))
    x = torch.randn(2, T, D)
    message = unchanged(gated, replace_ffn, example_inputs=(x + x.flip(1) * 2,), **SIZES)
    assert "expected example_inputs to send 'ff' more than a single row" in message
    short = transformer(future)
    short.position = nn.Parameter(short.position[:3])
    x = torch.randn(2, 3, 3)
    message = unchanged(short, replace_ffn, example_inputs=(x,), causal=True, **SIZES)
    assert "expected example_inputs to send 'ff' more than a single row" in message


@pytest.mark.parametrize("size", [1, 3])
def test_losses_of_a_layer_that_is_called_repeatedly_sum_to_the_official_size(size):
    def forward(block, x):
        x = x + block.position + x.mean(1, keepdim=True)
        for _ in range(3):
            x = x + block.a(x)
        return x + block.b(x)

    model = Block(
        forward, a=sequential(), b=sequential(), position=nn.Embedding(T, D).weight
    )  # fmt: skip
    options = {**SIZES, "segment_sizes": size, "example_inputs": (torch.randn(2, T, D),)}
    replace_ffn(model, aux_loss_weight=0.02, z_loss_weight=0.4, **options)
    assert [layer.aux_loss_weight for layer in layers_of(model)] == [0.005] * 2
    assert [layer.z_loss_weight for layer in layers_of(model)] == [0.1] * 2


class DataEmbedding_inverted(nn.Linear):
    """Variates become rows."""


@pytest.mark.parametrize("known", ["embedding", "class"])
def test_known_inverted_models_are_refused_without_an_example(known):
    model = inverted(EncoderLayer())
    if known == "embedding":
        model.embed = DataEmbedding_inverted(T, D)
    else:
        model.__class__ = type("iTransformer", (Block,), {})
    message = unchanged(model, replace_ffn, **SIZES)
    assert "'layer' (EncoderLayer): has variates for rows, no time steps" in message
    assert replace_ffn(model, **{**SIZES, "segment_sizes": 1}) == ["layer"]
