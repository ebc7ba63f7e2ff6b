"""The baseline of the benchmarks computes what SegMoE computes; gradients: test_benchmarks.py."""

import pytest
import torch

from benchmarks.official_loop import OfficialLoop
from segmoe_kernels import SegMoE
from segmoe_kernels.testing import make_inputs

CASES = {
    "default": {},
    "no_shared": {"shared_expert": None},
    "top2": {"top_k": 2},
    "top3_raw": {"top_k": 3, "renormalize": False},
    "top1_renormalized": {"renormalize": True, "router_temperature": 0.5},
    "gated_bias": {"gated": True, "bias": True, "activation": "silu"},
    "token_wise": {"segment_size": 1, "top_k": 2},
    "many_experts": {"num_experts": 32},
}


def make_layers(**options):
    options = {"num_experts": 4, "segment_size": 3, "dtype": torch.float64, **options}
    layer = SegMoE(8, 12, backend="reference", **options)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return layer, OfficialLoop(layer)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_loop_equals_seg_moe(options):
    layer, loop = make_layers(**options)
    x, dy, _ = make_inputs(5, 7, 8, dtype=torch.float64)
    x.requires_grad_()
    y, y_loop = layer(x), loop(x)
    # The loop's router is float32, as the official one.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y_loop, y, **close)
    (dx,), (dx_loop,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(y_loop, x, dy)
    torch.testing.assert_close(dx_loop, dx, **close)


def test_loop_shares_values_and_leaves_gradients_alone():
    layer, loop = make_layers()
    with torch.no_grad():
        layer.experts.up_proj.zero_()
        layer.router.weight.fill_(2.0)
    assert not loop.experts[3].up_proj.any()
    assert (loop.router_weight == 2).all()
    loop(torch.randn(2, 7, 8, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"expert_scope": "segment"},
        {"pooling": "mean"},
        {"shared_expert": "token"},
        {"causal": True, "shared_expert": None},
        {"num_experts": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_layers_are_refused(options):
    with pytest.raises(ValueError, match="options of the official layer"):
        make_layers(**options)
