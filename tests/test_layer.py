"""`SegMoE` as a module: parameters, initialisation, copies, frozen parts."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from layers import STATES, D, make_layer, train_once

from segmoe_kernels.testing import make_inputs


@pytest.mark.parametrize("name", STATES)
def test_state_dict_names_and_shapes(name):
    options, expected = STATES[name]
    state = make_layer(**options).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("name", STATES)
def test_state_dict_loads_into_another_layer(name):
    options, _ = STATES[name]
    first, second = make_layer(**options), make_layer(**options)
    second.load_state_dict(first.state_dict())
    x = make_inputs(2, 12, D).x
    assert torch.equal(first(x), second(x))


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


def test_reset_parameters_starts_causal_routing_at_random():
    start = make_layer(d_model=64, causal=True, shared_expert=None).router.start
    assert 0.8 < start.std() < 1.2


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


def save_and_load(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), save_and_load]
)
@pytest.mark.parametrize("name", STATES)
def test_layer_copies_after_training(name, clone):
    layer = make_layer(**STATES[name][0], aux_loss_weight=0.1, dropout=0.2, router_dropout=0.2)
    x, dy, _ = make_inputs(2, 12, D)
    train_once(layer, x, dy)
    layer.zero_grad()
    other = clone(layer)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    assert other.aux_loss == layer.aux_loss
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(other(x), layer(x))


def test_state_dict_leaves_out_the_loss():
    layer = make_layer(aux_loss_weight=0.1)
    layer(make_inputs(2, 12, D).x)
    assert layer.aux_loss > 0
    assert not [key for key in layer.state_dict() if "loss" in key]


@pytest.mark.parametrize("name", ["default", "dense"])
def test_layer_made_on_meta_is_loaded_moved_and_keeps_its_loss(name):
    options = {**STATES[name][0], "aux_loss_weight": 0.1}
    source, layer = make_layer(**options), make_layer(**options, device="meta")
    assert layer.aux_loss.is_meta
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


@pytest.mark.parametrize("causal", [True, False])
def test_a_layer_is_not_made_causal_later(causal):
    layer = make_layer(shared_expert="token", causal=not causal)
    layer.causal = causal
    with pytest.raises(ValueError, match=f"forward: expected causal to be .* got {causal}"):
        layer(make_inputs(2, 12, D).x)


SUBSET_LAYER = {
    "bias": True,
    "gated": True,
    "top_k": 2,
    "shared_expert": "token",
    "segment_size": 3,
}


@pytest.mark.parametrize("options", [{}, {"expert_scope": "projected"}], ids=["token", "projected"])
def test_layer_frozen_parts_have_no_gradient_and_change_nothing(options):
    layer = make_layer(**SUBSET_LAYER, **options)
    x, dy, _ = make_inputs(2, 7, D)
    y, dx, grads = train_once(layer, x, dy)
    groups = ["x", "router", "experts.up", "experts.gate", "experts.down", "shared", "proj"]
    for frozen in itertools.product([False, True], repeat=len(groups)):
        off = tuple(group for group, flag in zip(groups, frozen, strict=True) if flag)
        for name, parameter in layer.named_parameters():
            hidden = name.startswith(off) or ("proj" in off and name.split("_")[0] in {"in", "out"})
            parameter.requires_grad_(not hidden)
        layer.zero_grad()
        leaf = x.clone().requires_grad_("x" not in off)
        out = layer(leaf)
        assert torch.equal(out, y)
        if not out.requires_grad:
            assert all(frozen[:-1])
            continue
        out.backward(dy)
        assert (leaf.grad is None) if "x" in off else torch.equal(leaf.grad, dx)
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.grad, grads[name]), (off, name)
            else:
                assert parameter.grad is None, (off, name)


def test_layer_unused_experts_get_zero_gradients():
    layer = make_layer(num_experts=4, bias=True, pooling="mean", segment_size=2)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1
    _, _, grads = train_once(layer, torch.rand(2, 6, D) + 0.1, torch.randn(2, 6, D))
    for name in ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias"):
        grad = grads[f"experts.{name}"]
        assert grad[2].any()
        assert not grad[[0, 1, 3]].any()
