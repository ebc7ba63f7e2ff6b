"""`SegMoE` as a module: parameters, initialisation, frozen parts, losses, dtypes."""

import itertools
import math

import pytest
import torch
from layers import STATES, D, make_layer, train_once

from segmoe_kernels import load_balancing_loss, router_z_loss
from segmoe_kernels.testing import make_inputs


@pytest.mark.parametrize("name", STATES)
def test_state_dict_names_and_shapes(name):
    options, expected = STATES[name]
    state = make_layer(**options).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STATES)
def test_parameters_have_the_dtype_and_device_asked_for(name, dtype):
    layer = make_layer(**STATES[name][0], dtype=dtype, device="meta")
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert {p.device.type for p in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
def test_reset_parameters_is_xavier_for_each_matrix(scope):
    torch.manual_seed(5)
    layer = make_layer(4, 24, 48, bias=True, gated=True, expert_scope=scope, segment_size=3)
    start = make_layer(d_model=64, causal=True, shared_expert=None).router.start
    assert 0.8 < start.std() < 1.2
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 1 or name.endswith("bias"):
            assert not parameter.any(), name
            continue
        bound = math.sqrt(6 / (parameter.shape[-1] + parameter.shape[-2]))
        matrices = parameter.detach() if parameter.ndim == 3 else parameter.detach()[None]
        for matrix in matrices:
            assert 0.9 * bound < matrix.abs().max() <= bound, name
            # Uniform: variance bound ** 2 / 3, within five standard deviations of its estimate.
            ratio = matrix.square().mean() / (bound**2 / 3)
            assert abs(ratio - 1) < 5 * math.sqrt(0.8 / matrix.numel()), name
            assert abs(matrix.mean()) < 5 * bound / math.sqrt(3 * matrix.numel()), name
        assert len({matrix[0, 0].item() for matrix in matrices}) == len(matrices)


@pytest.mark.parametrize("name", STATES)
def test_reset_parameters_after_to_empty_equals_construction(name):
    options, _ = STATES[name]
    layer = make_layer(**options, device="meta").to_empty(device="cpu")
    assert all(p.isnan().any() for p in layer.parameters())  # poisoned by the test suite
    torch.manual_seed(7)
    layer.reset_parameters()
    first = {key: value.clone() for key, value in layer.state_dict().items()}
    assert all(value.isfinite().all() for value in first.values())
    assert layer.aux_loss == 0
    torch.manual_seed(7)
    layer.reset_parameters()
    assert all(torch.equal(first[key], value) for key, value in layer.state_dict().items())
    torch.manual_seed(8)
    layer.reset_parameters()
    changed = [k for k, v in layer.state_dict().items() if not torch.equal(first[k], v)]
    assert changed == [key for key in first if not key.endswith("bias")]


def test_extra_repr_names_every_option():
    text = repr(make_layer(top_k=2, dropout=0.1, renormalize=False, shared_expert="token"))
    for part in ("d_model=4", "d_ff=6", "num_experts=3", "top_k=2", "segment_size=5"):
        assert part in text
    for part in ("dropout=0.1", "renormalize=False", "shared_expert='token'", "causal=False"):
        assert part in text
    assert "(router): SegmentRouter(width=20, num_experts=3, causal=False)" in text
    assert "(experts): Experts(num_experts=3, d_model=4, d_ff=6, gated=False, bias=False)" in text


@pytest.mark.parametrize("name", ["default", "dense"])
def test_layer_made_on_meta_is_loaded_moved_and_keeps_its_loss(name):
    options = {**STATES[name][0], "aux_loss_weight": 0.1}
    source, layer = make_layer(**options), make_layer(**options, device="meta")
    assert layer.aux_loss.is_meta
    assert not [key for key in layer.state_dict() if "loss" in key]
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer.aux_loss == 0
    x = make_inputs(2, 12, D).x
    assert torch.equal(layer.to("cpu")(x), source(x))
    assert torch.equal(layer.aux_loss, source.aux_loss)
    kept = layer.aux_loss
    layer.double()
    assert layer.aux_loss.dtype == torch.float64
    assert layer.aux_loss == kept
    layer(x.double())
    assert layer.to("meta").aux_loss.is_meta


@pytest.mark.parametrize("options", [{}, {"expert_scope": "projected"}], ids=["token", "projected"])
def test_layer_frozen_parts_have_no_gradient_and_change_nothing(options):
    options = {"bias": True, "gated": True, "top_k": 2, "segment_size": 3, **options}
    layer = make_layer(shared_expert="token", **options)
    x, dy, _ = make_inputs(2, 7, D)
    full = train_once(layer, x, dy)
    groups = ["x", "router", "experts.up", "experts.gate", "experts.down", "shared", "proj"]
    for frozen in itertools.product([False, True], repeat=len(groups)):
        off = tuple(group for group, flag in zip(groups, frozen, strict=True) if flag)
        for name, parameter in layer.named_parameters():
            hidden = name.startswith(off) or ("proj" in off and name.split("_")[0] in {"in", "out"})
            parameter.requires_grad_(not hidden)
        layer.zero_grad()
        leaf = x.clone().requires_grad_("x" not in off)
        out = layer(leaf)
        assert torch.equal(out, full["y"])
        if not out.requires_grad:
            assert all(frozen[:-1])
            continue
        out.backward(dy)
        for name, tensor in {"x": leaf, **dict(layer.named_parameters())}.items():
            if tensor.requires_grad:
                assert torch.equal(tensor.grad, full[name]), (off, name)
            else:
                assert tensor.grad is None, (off, name)


@pytest.mark.parametrize("weights", [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
def test_layer_injected_loss_equals_explicit_loss(scope, weights):
    aux, z = weights
    options = {"expert_scope": scope, "top_k": 2, "dtype": torch.float64}
    layer = make_layer(**options, aux_loss_weight=aux, z_loss_weight=z)
    plain = make_layer(**options)
    plain.load_state_dict(layer.state_dict())
    x, dy, _ = make_inputs(2, 12, D, dtype=torch.float64)
    found = train_once(layer, x, dy)
    leaf = x.clone().requires_grad_()
    y, routing = plain.forward_with_routing(leaf)
    loss = aux * load_balancing_loss(routing) + z * router_z_loss(routing)
    ((y * dy).sum() + loss).backward()
    torch.testing.assert_close(layer.aux_loss, loss.detach(), rtol=1e-14, atol=0)
    assert not layer.aux_loss.requires_grad
    for name, value in {"x": leaf, **dict(plain.named_parameters())}.items():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-12, atol=1e-14)
    assert not torch.equal(found["router.weight"], train_once(plain, x, dy)["router.weight"])


def test_layer_does_not_depend_on_sequences_beside():
    layer = make_layer(dtype=torch.float64, top_k=2)
    x = make_inputs(6, 12, D, dtype=torch.float64).x
    torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", STATES)
def test_layer_under_autocast_keeps_dtype_and_accuracy(name):
    layer = make_layer(**STATES[name][0])
    x, dy, _ = make_inputs(4, 25, D)
    exact = train_once(layer, x, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = train_once(layer, x, dy)
    assert not torch.equal(found["y"], exact["y"])  # the products did run in bfloat16
    for key, full in exact.items():
        low = found[key]
        assert low.dtype == torch.float32
        # A handful of roundings of relative size 2 ** -9; the gate's gradient cancels terms.
        assert (low - full).norm() <= 16 * 2**-9 * full.norm()


def test_layer_under_autocast_routes_in_float32():
    layer = make_layer(top_k=2)
    x = make_inputs(8, 40, D).x
    expected = layer.forward_with_routing(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer.forward_with_routing(x)[1]
    for name in ("router_logits", "router_probs", "topk_weights", "topk_ids", "expert_counts"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
def test_layer_under_autocast_takes_what_autocast_gives(scope):
    """The output of a linear map under autocast has 16 bits, the layer's weights 32."""
    layer = make_layer(expert_scope=scope, bias=True)
    x = make_inputs(2, 12, D).x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), layer(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_in_low_precision_routes_in_float32(dtype):
    layer = make_layer(dtype=dtype, top_k=2)
    y, routing = layer.forward_with_routing(make_inputs(2, 12, D, dtype=dtype).x)
    assert y.dtype == dtype
    assert routing.router_logits.dtype == routing.router_probs.dtype == torch.float32
    assert routing.topk_weights.dtype == torch.float32
    assert routing.topk_ids.dtype == routing.expert_counts.dtype == torch.int32
