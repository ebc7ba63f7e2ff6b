"""Kernels read and write their own tensors alone, wherever these lie in memory.

On tensors without alignment; `test_ptx` executes compiled kernels between red zones.
"""

import pytest
import torch
from red_zones import RedZones
from test_triton_layer import make_layer, name_of

from segmoe_kernels.testing import make_inputs, run_layer

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402  triton has to be there

LAYERS = [
    {"gated": True, "activation": "silu", "bias": True, "top_k": 2, "causal": True,
     "shared_expert": "token"},
    {"expert_scope": "segment", "d_ff": 9, "bias": True},
    pytest.param({"d_model": 264, "d_ff": 8, "shared_expert": None, "top_k": 1}, id="wide",
                 marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("options", LAYERS, ids=name_of)
def test_kernels_stay_inside_red_zones(options):
    """Inputs, parameters, outputs and workspaces: nothing beyond is read or written."""
    # Several programs, the last of them in part; a few steps padded.
    layer = make_layer(torch.float32, **options)
    inputs = make_inputs(2, 41, layer.d_model, masked=0.15)
    expected = run_layer(layer, *inputs)
    zones = RedZones()
    for parameter in layer.parameters():
        parameter.data = zones.copy(parameter.data)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    x, dy, mask = (zones.copy(tensor) for tensor in inputs)
    kept = x.clone()
    x = x.requires_grad_()
    with zones.around_allocations():
        y = layer(x, mask)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    zones.check()
    names = ["dx", *(f"d{name}" for name, _ in layer.named_parameters())]
    actual = {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # The vendor's products of unaligned matrices differ in their last bits.
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert torch.equal(x, kept)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, read, written, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < read, other=0.0)
    tl.store(y_ptr + offs, tl.zeros_like(x) + tl.sum(x, 0), mask=offs < written)


def test_red_zones_show_what_is_read_or_written_beyond():
    zones = RedZones()
    x = zones.copy(torch.ones(30))
    with zones.around_allocations():
        y = torch.empty_like(x)
    _copy_kernel[(1,)](x, y, 30, 30, 32)
    assert (y == 30).all()
    _copy_kernel[(1,)](x, y, 31, 30, 32)
    assert y.isnan().all()
    zones.check()
    _copy_kernel[(1,)](x, y, 30, 31, 32)
    with pytest.raises(AssertionError, match="beyond"):
        zones.check()
