"""Derivatives of the reference backend: checked numerically, twice, and through torch.func."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from segmoe_kernels import SegMoE

CASES = {
    "token": {},
    "token_top2": {"top_k": 2},
    "token_gated_bias": {"gated": True, "bias": True, "activation": "silu"},
    "shared_token": {"shared_expert": "token"},
    "shared_none_raw_top2": {"shared_expert": None, "top_k": 2, "renormalize": False},
    "segment": {"expert_scope": "segment", "activation": "gelu_tanh"},
    "projected": {"expert_scope": "projected", "bias": True, "top_k": 2},
    "causal": {"causal": True, "shared_expert": "token"},
    "pooling_mean": {"pooling": "mean", "top_k": 3},
    "pooling_max": {"pooling": "max"},
    "dense": {"num_experts": 0},
}


class WithRouting(nn.Module):
    """The layer with everything that carries a gradient as its outputs."""

    def __init__(self, layer, mask=None):
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x):  # noqa: D102
        y, routing = self.layer.forward_with_routing(x, self.mask)
        return y, routing.router_logits, routing.router_probs, routing.topk_weights


def make_layer(d_model=2, d_ff=2, num_experts=3, segment_size=2, **options):
    options = {"backend": "reference", "dtype": torch.float64, **options}
    layer = SegMoE(d_model, d_ff, num_experts, segment_size=segment_size, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def make_function(layer, mask=None):
    """``function(x, *parameters)`` and the parameters."""
    module = WithRouting(layer, mask)
    names = [name for name, _ in module.named_parameters()]

    def function(x, *values):
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    return function, [p.detach().clone().requires_grad_() for p in module.parameters()]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_layer_gradcheck(case, padded):
    mask = torch.tensor([[True, True, False, True, True]]) if padded else None
    function, parameters = make_function(make_layer(**CASES[case]), mask)
    assert gradcheck(function, (draw(1, 5, 2), *parameters), nondet_tol=0.0)


@pytest.mark.parametrize("case", CASES)
def test_layer_gradgradcheck(case):
    mask = torch.tensor([[True, True, False, True, True]])
    function, parameters = make_function(make_layer(**CASES[case]), mask)
    assert gradgradcheck(function, (draw(1, 5, 2), *parameters), nondet_tol=0.0, fast_mode=True)


def test_layer_double_backward_repeats_bitwise():
    layer = make_layer(d_model=4, d_ff=6, num_experts=4, segment_size=3, top_k=2)
    x, dy = torch.randn(2, 3, 8, 4).double()
    runs = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        (dx,) = torch.autograd.grad((layer(leaf) * dy).sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        runs.append([dx.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
