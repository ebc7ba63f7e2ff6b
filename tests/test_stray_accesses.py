"""Kernels read and write their own tensors alone, and no two programs the same element.

The whole corpus of layers, on every plan: inside red zones, with programs in other orders, and with
every address compared with the tensors that the kernel was given.
"""

import functools
import os

import pytest
import torch
from red_zones import RedZones
from test_triton_layer import OPTIONS, make_layer, planned

from segmoe_kernels.testing import make_inputs, run_layer

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402  triton has to be there

EXTRA = [
    {"gated": True, "activation": "silu", "bias": True, "shared_expert": None, "top_k": 1},
    {"d_model": 64, "d_ff": 72, "shared_expert": None, "top_k": 1},
    {"d_model": 264, "d_ff": 24, "shared_expert": None},
]
CORPUS = planned([*OPTIONS, *EXTRA])
IDS = [param.id for param in CORPUS]
SHAPE = (3, 41)


def build(options):
    """A layer and inputs that fill several programs, the last of them in part; a few padded."""
    layer = make_layer(torch.float32, **options)
    return layer, make_inputs(*SHAPE, layer.d_model, masked=0.15)


@functools.cache
def plain_run(index):
    plan, options = CORPUS[index].values
    assert os.environ["SEGMOE_PLAN"] == plan
    layer, inputs = build(options)
    return run_layer(layer, *inputs)


@pytest.fixture(params=range(len(CORPUS)), ids=IDS)
def case(request, monkeypatch):
    """``(options, results)`` of one layer of the corpus."""
    plan, options = CORPUS[request.param].values
    monkeypatch.setenv("SEGMOE_PLAN", plan)
    return options, plain_run(request.param)


def check_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_kernels_stay_inside_red_zones(case):
    """Inputs, parameters, outputs and workspaces: nothing beyond is read or written."""
    options, expected = case
    layer, inputs = build(options)
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


@pytest.mark.interpreter
def test_results_do_not_depend_on_program_order(case, request, program_order):
    """Layers by turns backwards and in a drawn order; stages are run in both."""
    options, expected = case
    layer, inputs = build(options)
    order = ("reverse", "shuffled")[IDS.index(request.node.callspec.id) // 2 % 2]
    with program_order(order, seed=len(options)):
        check_same(run_layer(layer, *inputs), expected)


@pytest.mark.interpreter
def test_kernels_touch_the_tensors_they_are_given_alone(case):
    """Every address of every load and store, with the meter of `benchmarks.traffic`."""
    from benchmarks.traffic_meter import TrafficMeter

    options, _ = case
    layer, inputs = build(options)
    with TrafficMeter() as meter:
        run_layer(layer, *inputs)
    # A shared expert alone may be the vendor's from end to end.
    assert layer.num_experts == 0 or any("kernel" in name for name in meter.kernels)


@triton.jit
def _write_beyond(x_ptr, y_ptr, count, BEYOND: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count)
    tl.store(y_ptr + offs, x, mask=offs < count + BEYOND)


@triton.jit
def _read_beyond(x_ptr, y_ptr, count, BEYOND: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count + BEYOND, other=0.0)
    tl.store(y_ptr + offs, tl.zeros_like(x) + tl.sum(x, 0), mask=offs < count)


@pytest.mark.parametrize("beyond", [0, 1])
def test_red_zones_show_what_is_written_beyond(beyond):
    zones = RedZones()
    x = zones.copy(torch.randn(30))
    with zones.around_allocations():
        y = torch.empty_like(x)
    _write_beyond[(1,)](x, y, 30, beyond, 32)
    if beyond:
        with pytest.raises(AssertionError, match="beyond"):
            zones.check()
    else:
        zones.check()


@pytest.mark.parametrize("beyond", [0, 1])
def test_red_zones_show_what_is_read_beyond(beyond):
    zones = RedZones()
    x, y = zones.copy(torch.ones(30)), zones.empty((30,), torch.float32)
    _read_beyond[(1,)](x, y, 30, beyond, 32)
    zones.check()
    assert y.isnan().all() if beyond else (y == 30).all()
