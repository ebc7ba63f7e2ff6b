"""`SegMoE` in its modes: auxiliary losses, without gradients, under autocast, in training."""

import pytest
import torch
from layers import STATES, D, make_layer, train_once

from segmoe_kernels import load_balancing_loss, router_z_loss
from segmoe_kernels.testing import make_inputs


@pytest.mark.parametrize("weights", [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
def test_layer_injected_loss_equals_explicit_loss(scope, weights):
    aux, z = weights
    options = {"expert_scope": scope, "top_k": 2, "dtype": torch.float64}
    layer = make_layer(**options, aux_loss_weight=aux, z_loss_weight=z)
    plain = make_layer(**options)
    plain.load_state_dict(layer.state_dict())
    x, dy, _ = make_inputs(2, 12, D, dtype=torch.float64)
    _, dx, grads = train_once(layer, x, dy)
    leaf = x.clone().requires_grad_()
    y, routing = plain.forward_with_routing(leaf)
    loss = aux * load_balancing_loss(routing) + z * router_z_loss(routing)
    ((y * dy).sum() + loss).backward()
    torch.testing.assert_close(layer.aux_loss, loss.detach(), rtol=1e-14, atol=0)
    assert not layer.aux_loss.requires_grad
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-12, atol=1e-14)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-12, atol=1e-14)
    assert not torch.equal(grads["router.weight"], train_once(plain, x, dy)[2]["router.weight"])


def test_layer_injected_loss_does_not_scale_with_the_upstream_gradient():
    layer = make_layer(aux_loss_weight=1.0)
    x = make_inputs(2, 12, D).x
    grads = [train_once(layer, x, torch.zeros_like(x))[2]["router.weight"] for _ in range(2)]
    assert grads[0].any()
    assert torch.equal(*grads)


def test_layer_injects_no_loss_in_eval_or_without_grad():
    layer = make_layer(aux_loss_weight=1.0)
    x, dy, _ = make_inputs(2, 12, D)
    with torch.no_grad():
        layer(x)
    value = layer.aux_loss.clone()
    assert value > 0
    layer.eval()
    router_grad = train_once(layer, x, torch.zeros_like(dy))[2]["router.weight"]
    assert not router_grad.any()
    assert layer.aux_loss == value


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", STATES)
def test_layer_without_grad_gives_the_same(name, mode):
    layer = make_layer(**STATES[name][0], aux_loss_weight=0.1, z_loss_weight=0.1)
    x = make_inputs(2, 12, D).x
    expected = layer(x)
    with mode():
        y = layer(x)
    assert torch.equal(y, expected)
    assert not y.requires_grad
    assert torch.equal(layer(x), expected)  # the other way round still works


def test_layer_does_not_depend_on_sequences_beside():
    layer = make_layer(dtype=torch.float64, top_k=2)
    x = make_inputs(6, 12, D, dtype=torch.float64).x
    torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", STATES)
def test_layer_under_autocast_keeps_dtype_and_accuracy(name):
    layer = make_layer(**STATES[name][0])
    x, dy, _ = make_inputs(4, 25, D)
    y, dx, grads = train_once(layer, x, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_y, low_dx, low_grads = train_once(layer, x, dy)
    assert low_y.dtype == low_dx.dtype == torch.float32
    assert not torch.equal(low_y, y)  # the products did run in bfloat16
    pairs = [(low_y, y), (low_dx, dx), *((low_grads[key], grads[key]) for key in grads)]
    for low, full in pairs:
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


def test_layer_training_reduces_a_loss():
    layer = make_layer(d_model=8, d_ff=16, segment_size=4, aux_loss_weight=0.02)
    x, target, _ = make_inputs(16, 12, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["aux_loss_weight", "z_loss_weight"])
def test_a_wrong_weight_of_a_loss_is_refused_where_it_is_set_later(name):
    layer, x = make_layer(), make_inputs(2, 12, D).x
    for value, exception in ((-0.1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        setattr(layer, name, value)
        with pytest.raises(exception, match=rf"SegMoE\.forward: expected {name} to be"):
            layer(x)
