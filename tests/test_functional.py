"""The stages as functions: their contracts, one by one and in order."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from layers import STATES, make_layer

import segmoe_kernels
from segmoe_kernels import SegMoE, activations, functional, reference, replace_ffn
from segmoe_kernels.functional import combine, expert_ffn, grouped_gemm, permute, route

D, F = 4, 6
ACTIVATIONS = [None, "gelu", "gelu_tanh", "silu", "relu"]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_grouped_gemm_equals_rows_one_by_one(biased, activation):
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    x, weight = draw(7, D), draw(3, F, D)
    bias = draw(3, F) if biased else None
    out = grouped_gemm(x, weight, offsets, bias, activation)
    act = (lambda z: z) if activation is None else activations.ACTIVATIONS[activation].function
    for row, e in enumerate([0, 0, 2, 2, 2]):
        expected = act(weight[e] @ x[row] + (0 if bias is None else bias[e]))
        torch.testing.assert_close(out[row], expected, rtol=1e-13, atol=1e-14)
    assert not out[5:].any()


@pytest.mark.parametrize(
    "name", ["default", "shared_token", "causal_last", "gated_bias", "segment"]
)
def test_seg_moe_is_the_stages_in_order(name):
    layer = make_layer(**STATES[name][0]).double()
    x, mask = draw(2, 12, 4), torch.rand(2, 12) < 0.8
    size, router = {"segment_size": layer.segment_size}, layer.router
    start = {"pooling": layer.pooling, "router_start": router.start, "top_k": 1}
    scope = {"expert_scope": layer.expert_scope, "activation": layer.activation}
    mask_of = {"padding_mask": mask}
    routed = route(x, router.weight, **start, **mask_of, **size)
    permutation = permute(routed.topk_ids, 3)
    experts = (permutation, layer.experts.weights())
    out = expert_ffn(x, routed.topk_weights, *experts, **mask_of, **size, **scope)
    shared = ()
    if layer.shared_expert is not None:
        size, gate = layer.shared_gate.weight.shape[1] // 4, layer.shared_gate.weight
        options = {"segment_size": size, "activation": layer.activation, **mask_of}
        shared = reference.shared_expert(x, layer.shared_expert.weights(), gate, **options)
    actual, routing = layer.forward_with_routing(x, mask)
    assert torch.equal(actual, combine(out, *shared, **mask_of))
    assert torch.equal(routing.topk_ids, routed.topk_ids)
    assert torch.equal(routing.expert_counts, permutation.expert_counts)


def test_reference_has_every_function_of_functional():
    names = set(functional.__all__) - {"resolve_backend"}
    assert all(callable(getattr(reference, name)) for name in names)


def test_reference_seg_moe_equals_the_layer():
    layer = SegMoE(6, 10, 3, segment_size=4, shared_expert="token", dtype=torch.float64)
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    y, routing = reference.seg_moe(
        x,
        layer.router.weight,
        layer.experts.weights(),
        segment_size=4,
        shared=layer.shared_expert.weights(),
        shared_gate=layer.shared_gate.weight,
    )
    assert torch.equal(y, layer(x))
    assert routing.topk_ids.shape == (2 * 3 * 3, 1)


def test_an_activation_is_one_entry_and_one_device_function(monkeypatch):
    """Registered from outside: the reference, swaps and messages know it; the kernels refuse it."""
    entry = activations.Activation(torch.nn.functional.relu6, (torch.nn.ReLU6,))
    monkeypatch.setitem(activations.ACTIVATIONS, "relu6", entry)
    layer = SegMoE(4, 6, 3, segment_size=2, activation="relu6", dtype=torch.float64)
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, nondet_tol=0.0)
    ffn = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU6(), torch.nn.Linear(6, 4))
    model = torch.nn.Sequential(ffn)
    replace_ffn(model, num_experts=3, segment_sizes=2)
    assert model[0].activation == "relu6"
    with pytest.raises(ValueError, match="'relu6'"):
        SegMoE(4, 6, 3, activation="relu7")
    if importlib.util.find_spec("triton"):
        layer.backend = "triton"
        with pytest.raises(Exception, match="unknown activation"):
            layer(x)


def test_names_of_activations_stand_in_few_files():
    """What has to change for a new one: the registry and the device functions."""
    places = set()
    for path in Path(segmoe_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict | ast.Compare) and "'gelu_tanh'" in ast.unparse(node):
                places.add(path.parent.name + "/" + path.name)
    assert places == {"segmoe_kernels/activations.py", "_triton/activations.py"}
