"""The reference backend against loops written from the definition, in float64."""

import pytest
import torch
from brute_force import brute_force

from segmoe_kernels import SegMoE

P3 = {"segment_size": 3}
CASES = {
    "default": P3,
    **{f"pooling_{name}": {**P3, "pooling": name} for name in ("mean", "max", "first", "last")},
    "pooling_mean_wide": {"segment_size": 3, "pooling": "mean", "expert_scope": "segment"},
    "pooling_last_top2": {"segment_size": 4, "pooling": "last", "top_k": 2},
    "scope_segment": {**P3, "expert_scope": "segment"},
    "scope_segment_top2": {**P3, "expert_scope": "segment", "top_k": 2, "shared_expert": "token"},
    "scope_segment_bias": {**P3, "expert_scope": "segment", "bias": True, "gated": True},
    "scope_projected": {**P3, "expert_scope": "projected"},
    "scope_projected_bias": {**P3, "expert_scope": "projected", "bias": True, "top_k": 2},
    "scope_projected_alone": {**P3, "expert_scope": "projected", "shared_expert": None},
    "scope_projected_token": {**P3, "expert_scope": "projected", "shared_expert": "token"},
    "shared_token": {**P3, "shared_expert": "token"},
    "shared_wide": {**P3, "shared_d_ff": 9},
    "shared_token_wide": {**P3, "shared_expert": "token", "shared_d_ff": 9, "gated": True},
    "shared_token_gated_bias": {**P3, "shared_expert": "token", "gated": True, "bias": True},
    "shared_none": {**P3, "shared_expert": None},
    **{f"activation_{name}": {**P3, "activation": name} for name in ("gelu_tanh", "silu", "relu")},
    "gated": {**P3, "gated": True, "activation": "silu"},
    "bias": {**P3, "bias": True},
    "gated_bias": {**P3, "gated": True, "bias": True, "top_k": 2},
    "temperature_hot": {**P3, "router_temperature": 3.5},
    "temperature_cold": {**P3, "router_temperature": 0.25, "top_k": 2},
    "renormalize_top1": {**P3, "renormalize": True},
    "raw_top1": {**P3, "renormalize": False},
    "renormalize_top2": {**P3, "renormalize": True, "top_k": 2},
    "raw_top2": {**P3, "renormalize": False, "top_k": 2},
    **{f"top{k}": {**P3, "top_k": k} for k in (2, 3, 4)},
    "one_expert": {**P3, "num_experts": 1},
    "many_experts": {**P3, "num_experts": 9, "top_k": 3},
    "causal": {**P3, "causal": True, "shared_expert": "token"},
    "causal_mean_top2": {
        **P3,
        "causal": True,
        "shared_expert": None,
        "pooling": "mean",
        "top_k": 2,
    },
    "dense": {"num_experts": 0},
    "dense_gated_bias": {"num_experts": 0, "segment_size": 3, "gated": True, "bias": True},
    "token_wise": {"segment_size": 1},
    "token_wise_top2": {"segment_size": 1, "top_k": 2, "bias": True},
    "segment_is_sequence": {"segment_size": 7},
    "segment_beyond_sequence": {"segment_size": 11},
    "segment_beyond_sequence_mean": {"segment_size": 11, "pooling": "mean"},
    "segment_beyond_sequence_wide": {"segment_size": 9, "expert_scope": "segment"},
}

# Over 7 steps in segments of 3: padding inside, behind, a whole segment, a whole sequence.
MASKS = {
    "none": None,
    "interior": ["1101011", "1111111"],
    "tail": ["1111000", "1111110"],
    "leading": ["0111111", "0011111"],
    "segment": ["1110001", "0001111"],
    "sequence": ["0000000", "1101101"],
    "everything": ["0000000", "0000000"],
}


def make_layer(d_model=4, d_ff=5, num_experts=4, seed=0, **options):
    torch.manual_seed(seed)
    layer = SegMoE(d_model, d_ff, num_experts, dtype=torch.float64, backend="reference", **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_().mul_(0.7)  # biases too, and routers that decide
    return layer.eval()


def make_mask(rows):
    return None if rows is None else torch.tensor([[c == "1" for c in row] for row in rows])


def assert_equals_brute_force(layer, x, mask=None):
    """Outputs, routing, and the gradients of a random function of all of them."""
    results = []
    for run in (
        lambda z: layer.forward_with_routing(z, mask),
        lambda z: brute_force(layer, z, mask),
    ):
        layer.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        y, routing = run(leaf)
        fields = routing if isinstance(routing, dict) else routing._asdict()
        values = {"y": y, **fields}
        generator = torch.Generator().manual_seed(1)
        total = leaf.sum() * 0
        for name in ("y", "router_logits", "router_probs", "topk_weights"):
            upstream = torch.randn(values[name].shape, generator=generator, dtype=torch.float64)
            total = total + (values[name] * upstream).sum()
        total.backward()
        values["dx"] = leaf.grad
        for name, parameter in layer.named_parameters():
            grad = parameter.grad
            values[f"d{name}"] = torch.zeros_like(parameter) if grad is None else grad.clone()
        results.append(values)
    actual, expected = results
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name} differs from the definition"
        if value.dtype == torch.int32:
            assert torch.equal(actual[name], value), message
        else:
            torch.testing.assert_close(
                actual[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, t=message: f"{t}: {m}"
            )


@pytest.mark.parametrize("case", CASES)
def test_layer_equals_brute_force(case):
    assert_equals_brute_force(make_layer(**CASES[case]), torch.randn(2, 7, 4).double())


@pytest.mark.parametrize("rows", [rows for rows in MASKS if rows != "none"])
@pytest.mark.parametrize(
    "case",
    [
        "default",
        "top2",
        "pooling_mean",
        "pooling_max",
        "pooling_first",
        "pooling_last",
        "scope_segment_bias",
        "scope_projected_bias",
        "shared_token_gated_bias",
        "shared_none",
        "causal",
        "causal_mean_top2",
        "dense_gated_bias",
        "token_wise_top2",
        "segment_beyond_sequence_mean",
    ],
)
def test_layer_with_padding_equals_brute_force(case, rows):
    layer = make_layer(**CASES[case])
    mask = make_mask(MASKS[rows])
    x = torch.randn(2, 7, 4).double()
    assert_equals_brute_force(layer, x, mask)
    assert not layer(x, mask)[~mask].any()


@pytest.mark.parametrize("rows", [rows for rows in MASKS if rows != "none"])
@pytest.mark.parametrize("case", ["default", "scope_segment_bias", "scope_projected_bias", "dense"])
def test_layer_ignores_what_padding_holds(case, rows):
    layer = make_layer(**CASES[case])
    mask = make_mask(MASKS[rows])
    x = torch.randn(2, 7, 4).double()
    garbage = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    y = layer(garbage, mask)
    y.sum().backward()
    assert torch.equal(y, layer(x, mask))
    assert not garbage.grad[~mask].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("case", ["default", "scope_segment", "scope_projected", "causal"])
def test_layer_of_any_length_equals_brute_force(case, length):
    assert_equals_brute_force(make_layer(**CASES[case]), torch.randn(1, length, 4).double())


@pytest.mark.parametrize("shape", [(7, 4), (1, 7, 4), (2, 3, 7, 4), (2, 1, 3, 7, 4)])
def test_layer_keeps_leading_dimensions(shape):
    layer = make_layer(segment_size=3, top_k=2)
    x = torch.randn(shape).double()
    mask = torch.rand(shape[:-1]) < 0.7
    for chosen in (None, mask):
        flat = None if chosen is None else chosen.reshape(-1, 7)
        expected, routing = brute_force(layer, x.reshape(-1, 7, 4), flat)
        actual, ours = layer.forward_with_routing(x, chosen)
        torch.testing.assert_close(actual, expected.reshape(shape), rtol=1e-11, atol=1e-12)
        assert torch.equal(ours.topk_ids, routing["topk_ids"])


@pytest.mark.parametrize("case", [*CASES])
@pytest.mark.parametrize("shape", [(0, 7, 4), (2, 0, 4), (0, 0, 4), (0, 4), (3, 0, 2, 4)])
def test_layer_of_nothing_is_nothing(shape, case):
    layer = make_layer(**CASES[case])
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    for chosen in (None, mask):
        y, routing = layer.forward_with_routing(x, chosen)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        assert routing.router_probs.shape == (0, layer.num_experts)
        assert routing.topk_ids.shape == (0, layer.top_k if layer.num_experts else 0)
        assert not routing.expert_counts.any()
        assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", ["default", "scope_segment", "scope_projected", "pooling_max"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.cat([x, x, x], 1)[:, 7:14],
        lambda x: x[:1].expand(2, 7, 4),
        lambda x: x[:, :1].expand(2, 7, 4),
        lambda x: x[:1, :1, :1].expand(2, 7, 4),
    ],
    ids=["transposed", "channels_first", "interleaved", "sliced", "batch0", "time0", "all0"],
)
def test_layer_takes_any_strides(view, case):
    layer = make_layer(**CASES[case])
    strided = view(torch.randn(2, 7, 4).double())
    before = strided.clone()
    assert_equals_brute_force(layer, strided)
    assert torch.equal(strided, before)
    y = layer(strided.detach().requires_grad_())
    y.backward(torch.ones((), dtype=y.dtype).expand_as(y))  # a gradient without strides
    assert torch.equal(y, layer(before))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shared_expert", ["segment", None])
@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
def test_layer_output_is_contiguous_behind_a_ragged_tail(scope, shared_expert, dropout):
    layer = make_layer(expert_scope=scope, shared_expert=shared_expert, dropout=dropout)
    x = torch.randn(2, 4 * layer.segment_size - 1, layer.d_model).double()
    assert layer(x).is_contiguous()
