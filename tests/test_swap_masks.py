"""Masks of models that were swapped: what they hide stays hidden, or they are refused."""

import pytest
import torch
from test_swap import D, T, encoder

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
    model, x = encoder().eval(), torch.randn(2, T, D, dtype=torch.float64)
    replace_ffn(model, **SIZES)
    for part in (model, model.layers[0]):
        compiled = torch.compile(part, backend="eager", fullgraph=True)
        # PyTorch's encoder looks at a mask to find is_causal, so whoever compiles has to say it.
        window = part(x, OTHERS["window"])
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
