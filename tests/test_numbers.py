"""Numbers that misbehave, and sizes at the ends: what the kernels do is what the reference does."""

import copy
import itertools

import pytest
import torch
from test_triton_layer import check_close, make_layer

from segmoe_kernels import SegMoE
from segmoe_kernels.testing import assert_as_accurate, compare, make_inputs, route_ids, run_layer

pytest.importorskip("triton")

SCOPES = ["token", "segment", "projected"]


def not_finite():
    """``(options, value, dtype)``; wide rows' weight gradients are products, then all is."""
    for value in (torch.nan, torch.inf, -torch.inf):
        marks = pytest.mark.slow if value < 0 else []
        for scope, dtype in itertools.product(SCOPES, (torch.float32, torch.bfloat16)):
            yield pytest.param({"expert_scope": scope}, value, dtype, marks=marks)
    for width in (132, 260):
        yield {"d_model": width, "d_ff": 9, "shared_expert": None}, torch.nan, torch.float32


@pytest.mark.parametrize(("options", "value", "dtype"), not_finite(), ids=str)
@pytest.mark.usefixtures("rows_alike")
def test_what_is_not_finite_stays_in_its_segment_and_is_not_hidden(options, value, dtype, device):
    """Every other step has the same bits as without it; the parameters' gradients show it."""
    layer = make_layer(dtype, device, top_k=2, segment_size=3, **options)
    x, dy, _ = make_inputs(2, 12, layer.d_model, dtype=dtype, device=device)
    clean = run_layer(layer, x, dy)
    x[1, 4, 2] = value
    dirty = run_layer(layer, x, dy)
    expected = run_layer(layer, x, dy, backend="reference", topk_ids=route_ids(layer, x))
    hit = torch.zeros(2, 12, dtype=torch.bool, device=device)
    hit[1, 3:6] = True
    assert not dirty["y"][hit].isfinite().all()
    for name in ("y", "dx"):
        assert dirty[name][~hit].isfinite().all()
        if layer.expert_scope != "projected":  # whose products are the vendor's
            assert torch.equal(dirty[name][~hit], clean[name][~hit]), name
    assert torch.equal(dirty["y"].isfinite(), expected["y"].isfinite())
    assert not dirty["drouter.weight"].isfinite().all()
    ids = route_ids(layer, x)
    assert ((ids >= 0) & (ids < layer.num_experts)).all()


@pytest.mark.usefixtures("rows_alike")
def test_infinite_upstream_gradients_stay_in_their_segment(device):
    layer = make_layer(torch.float32, device, top_k=1, segment_size=3, shared_expert=None)
    x, dy, _ = make_inputs(2, 12, 8, device=device)
    clean = run_layer(layer, x, dy)
    dy[0, 7, 1] = torch.inf
    dirty = run_layer(layer, x, dy)
    hit = torch.zeros(2, 12, dtype=torch.bool, device=device)
    hit[0, 6:9] = True
    assert torch.equal(dirty["dx"][~hit], clean["dx"][~hit])
    assert not dirty["dx"][hit].isfinite().all()


def test_logits_beyond_float16_are_summed_in_float32(device):
    """Sums that float16 has no number for; one expert wins by far, and nothing becomes NaN."""
    layer = make_layer(torch.float16, device, top_k=1, segment_size=3, shared_expert=None)
    with torch.no_grad():
        layer.router.weight.fill_(40.0)
        layer.router.weight[2] = 60.0
    x, dy, _ = make_inputs(2, 12, 8, dtype=torch.float16, device=device)
    x = x.abs() + 100
    logits = (x.float().view(8, 24) * 60).sum(-1)
    assert (logits > torch.finfo(torch.float16).max).all()
    results = run_layer(layer, x, dy)
    assert (route_ids(layer, x) == 2).all()
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_means_are_pooled_in_float32(dtype, device):
    """The sum of four steps has no number in float16; a rounded mean is off by 1e-4 and more."""
    layer = make_layer(dtype, device, pooling="mean", segment_size=4, shared_expert=None)
    x, dy, mask = make_inputs(2, 11, 8, dtype=dtype, device=device, masked=0.3)
    x = 20_000 + 100 * x
    with torch.no_grad():
        layer.router.weight.mul_(1e-3)
        layer.experts.up_proj.mul_(0.1)  # else float16 has no number for the hidden layer either
    oracle = copy.deepcopy(layer).double()
    expected = oracle.forward_with_routing(x.double(), mask)[1].router_logits
    for backend in ("reference", "triton"):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        y, routing = layer.forward_with_routing(leaf, mask)
        torch.testing.assert_close(routing.router_logits.double(), expected, rtol=1e-5, atol=1e-4)
        y.backward(dy)
        assert y.isfinite().all()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_logits_take_the_lowest_experts(top_k, device):
    layer = make_layer(torch.float64, device, top_k=top_k)
    with torch.no_grad():
        layer.router.weight.zero_()
    inputs = make_inputs(2, 11, 8, dtype=torch.float64, device=device)
    ids = route_ids(layer, *inputs)
    assert torch.equal(ids, torch.arange(top_k, dtype=torch.int32, device=device).expand_as(ids))
    check_close(layer, inputs)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_expert_takes_all(scope, device):
    """The others' gradients are exactly 0, not left as they were."""
    layer = make_layer(torch.float64, device, expert_scope=scope, top_k=1, bias=True)
    with torch.no_grad():
        layer.router.weight.zero_()
    inputs = make_inputs(3, 25, 8, dtype=torch.float64, device=device)
    for name, value in check_close(layer, inputs).items():
        if name.startswith("dexperts"):
            assert value[0].any()
            assert not value[1:].any()


@pytest.mark.parametrize(
    ("num_experts", "top_k", "shape", "scope"),
    [
        *(
            (*sizes, scope)
            for sizes in ((1, 1, (2, 7)), (5, 5, (2, 7)), (3, 2, (1, 3)), (3, 1, (1, 1)))
            for scope in SCOPES
        ),
        (16, 16, (1, 4), "token"),
        # All of 16 experts on rows of whole segments: 12 seconds of the interpreter.
        pytest.param(16, 16, (1, 4), "segment", marks=pytest.mark.slow),
        (16, 16, (1, 4), "projected"),
    ],
    ids=str,
)
def test_sizes_at_the_ends_equal_reference(num_experts, top_k, shape, scope, device):
    """One expert, all experts chosen, one segment, one step."""
    layer = make_layer(
        torch.float64, device, expert_scope=scope, num_experts=num_experts, top_k=top_k
    )
    check_close(layer, make_inputs(*shape, 8, dtype=torch.float64, device=device))


def test_512_experts_equal_reference(device):
    """Without gradients: those of the weights take the interpreter minutes."""
    layer = make_layer(torch.float64, device, num_experts=512, top_k=2, d_ff=3)
    x = make_inputs(2, 11, 8, dtype=torch.float64, device=device).x
    with torch.no_grad():
        y = layer(x)
        layer.backend = "reference"
        torch.testing.assert_close(y, layer(x), rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    """The last segments of x, beyond what 32 bits address, have the bits that they have alone."""
    torch.manual_seed(0)
    d_model, length, segment_size = 64, 520, 5
    batch = 2**31 // (d_model * length) + 9
    options = {"segment_size": segment_size, "shared_expert": None, "dtype": torch.bfloat16}
    layer = SegMoE(d_model, 2 * d_model, 4, **options, device=device)
    x = torch.empty(batch, length, d_model, dtype=torch.bfloat16, device=device)
    last = torch.randn(8, length, d_model, dtype=torch.bfloat16, device=device)
    x.zero_()
    x[-8:] = last
    assert x.numel() > 2**31
    x.requires_grad_()
    y = layer(x)
    dy = torch.zeros_like(y)
    upstream = torch.randn_like(last)
    dy[-8:] = upstream
    (dx,) = torch.autograd.grad(y, x, dy)
    small = last.requires_grad_()
    y_small = layer(small)
    (dx_small,) = torch.autograd.grad(y_small, small, upstream)
    assert torch.equal(y[-8:], y_small)
    assert torch.equal(dx[-8:], dx_small)


def test_inf_is_never_accurate():
    exact = torch.ones(3, dtype=torch.float64)
    fine, inf = torch.ones(3), torch.tensor([1.0, torch.inf, 1.0])
    assert compare(fine, fine, exact).passes
    for actual, eager in ((inf, inf), (inf, fine), (fine, inf)):
        with pytest.raises(AssertionError, match="less accurate than plain PyTorch"):
            assert_as_accurate(actual, eager, exact)
