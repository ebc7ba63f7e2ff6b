"""The forecaster of the examples: its FLOPs, positions, scale, and the loss it is trained with."""

import copy

import pytest
import torch

from examples.forecaster import data, model, training


def test_the_forecaster_trains_with_the_official_pooled_loss():
    """Against the formula by hand, over the segments of four layers at once."""
    config = model.ForecasterConfig(
        look_back=64, horizon=8, d_model=8, d_ff=8, segment_sizes=(3, 2, 5, 1), dropout=0.0,
        head_dropout=0.0,
    )  # fmt: skip
    series = data.make_series("x", data.multiscale(700, 2))
    windows = training.make_windows(series, config, torch.float64)
    torch.manual_seed(0)
    forecaster = model.Forecaster(config).double()
    plain = copy.deepcopy(forecaster)
    options = training.TrainOptions(clip=1e9)
    trainer = training.Trainer(forecaster, windows["train"], windows["val"], options)
    task = trainer._step(torch.arange(4))

    past, truth = windows["train"].batch(torch.arange(4))
    tokens, probs, chosen = plain._embed(plain._normalise(past)[0]), [], []
    for block in plain.blocks:
        tokens = tokens + block.attention(block.attention_norm(tokens))
        y, routing = block.ffn.forward_with_routing(block.ffn_norm(tokens))
        tokens = tokens + y
        probs.append(routing.router_probs)
        chosen.append(routing.topk_ids[:, 0])
    probs, chosen = torch.cat(probs), torch.cat(chosen)
    assert len(probs) == 4 * 2 * (3 + 4 + 2 + 8)
    balancing = 4 * sum((chosen == e).double().mean() * probs[:, e].mean() for e in range(4))
    expected = training.LOSSES["huber"]()(plain(past), truth)
    assert task.item() == pytest.approx(expected.item(), rel=1e-12)
    (expected + 0.02 * balancing).backward()
    for (name, found), by_hand in zip(
        forecaster.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, by_hand.grad, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({"ffn": "dense"}, 2 * 4 * 8 * 12),
        ({"ffn": "token"}, 4 * 8 * 5 + 2 * 4 * 8 * 6 + (2 * 4 * 8 * 6 + 4 * 8)),
        ({"ffn": "segment", "shared_expert": None}, 6 * 8 * 5 + 2 * 4 * 8 * 6),
        (
            {"ffn": "segment", "shared_expert": "segment"},
            6 * 8 * 5 + 2 * 4 * 8 * 6 + 2 * (2 * 24 * 18 + 24),
        ),
    ],
)
def test_active_flops_of_a_hand_worked_case(options, products):
    config = model.ForecasterConfig(
        look_back=16, horizon=3, patch=4, d_model=8, d_ff=6, num_layers=1, num_heads=2,
        num_experts=5, segment_sizes=(3,), **options,
    )  # fmt: skip
    embedding, attention, head = 4 * 4 * 8, 4 * 4 * 64 + 2 * 16 * 8, 4 * 8 * 3
    expected = 2 * (embedding + attention + products + head) / 4
    assert model.active_flops_per_token(config) == expected


def test_rotary_attention_depends_on_distance_only(monkeypatch):
    """One patch at every place: scores of two places are those of their distance, as published."""
    torch.manual_seed(0)
    config = model.ForecasterConfig(look_back=64, d_model=8)
    attention = model.Attention(config).double()
    model.nn.init.normal_(attention.qkv.bias)
    seen = []

    def record(query, key, value):
        seen.append((query, key))
        return value

    monkeypatch.setattr(model.functional, "scaled_dot_product_attention", record)
    x = torch.randn(8, dtype=torch.float64)
    attention(x.expand(1, 8, 8))
    (query, key), *_ = seen
    same = (query @ key.transpose(-1, -2))[0]  # (heads, T, T)
    for distance in range(-7, 8):
        diagonal = torch.diagonal(same, distance, dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal))
    # Pairs are complex numbers, left + i * right, turned by their angle (equation 15).
    plain = attention.qkv(x)[:16].view(2, 2, 2, 2)  # query or key, head, half, pair
    angles = model.rotary_angles(8, 4).double()
    turned = torch.complex(*plain.unbind(2))[:, :, None] * torch.polar(
        torch.ones_like(angles), angles
    )
    for found, expected in zip((query, key), turned, strict=True):
        torch.testing.assert_close(found[0], torch.cat([expected.real, expected.imag], -1))


def test_forecast_follows_level_and_scale_of_the_window():
    torch.manual_seed(0)
    forecaster = model.Forecaster(
        model.ForecasterConfig(look_back=64, segment_sizes=(3,) * 4)
    ).eval()
    past = torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = forecaster(past) * 5 + 7
        found = forecaster(past * 5 + 7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
