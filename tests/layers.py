"""Small layers of every kind, the names and shapes of their parameters, and a step of training."""

import pytest
import torch
from conftest import GPU, HAS_TRITON

from segmoe_kernels import SegMoE

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
both_backends = pytest.mark.parametrize("backend", BACKENDS)

D, F, E, P = 4, 6, 3, 5
EXPERTS = {"experts.up_proj": (E, F, D), "experts.down_proj": (E, D, F)}
WIDE_SHARED = {
    "shared_expert.up_proj.weight": (P * F, P * D),
    "shared_expert.down_proj.weight": (P * D, P * F),
    "shared_gate.weight": (1, P * D),
}
NARROW_SHARED = {
    "shared_expert.up_proj.weight": (F, D),
    "shared_expert.down_proj.weight": (D, F),
    "shared_gate.weight": (1, D),
}
STATES = {
    "default": ({}, {"router.weight": (E, P * D), **EXPERTS, **WIDE_SHARED}),
    "alone": ({"shared_expert": None}, {"router.weight": (E, P * D), **EXPERTS}),
    "shared_token": (
        {"shared_expert": "token", "pooling": "mean"},
        {"router.weight": (E, D), **EXPERTS, **NARROW_SHARED},
    ),
    "causal": (
        {"shared_expert": None, "causal": True},
        {"router.weight": (E, P * D), "router.start": (P * D,), **EXPERTS},
    ),
    "causal_last": (
        {"shared_expert": None, "causal": True, "pooling": "last"},
        {"router.weight": (E, D), "router.start": (D,), **EXPERTS},
    ),
    "segment": (
        {"expert_scope": "segment"},
        {
            "router.weight": (E, P * D),
            "experts.up_proj": (E, P * F, P * D),
            "experts.down_proj": (E, P * D, P * F),
            **WIDE_SHARED,
        },
    ),
    "gated_bias": (
        {"gated": True, "bias": True},
        {
            "router.weight": (E, P * D),
            **EXPERTS,
            "experts.gate_proj": (E, F, D),
            "experts.up_proj_bias": (E, F),
            "experts.gate_proj_bias": (E, F),
            "experts.down_proj_bias": (E, D),
            **WIDE_SHARED,
            "shared_expert.gate_proj.weight": (P * F, P * D),
            "shared_expert.up_proj.bias": (P * F,),
            "shared_expert.gate_proj.bias": (P * F,),
            "shared_expert.down_proj.bias": (P * D,),
        },
    ),
    "projected": (
        {"expert_scope": "projected"},
        {
            "router.weight": (E, D),
            **EXPERTS,
            **NARROW_SHARED,
            "in_proj.weight": (D, P * D),
            "out_proj.weight": (P * D, D),
        },
    ),
    "projected_bias": (
        {"expert_scope": "projected", "bias": True, "shared_expert": None},
        {
            "router.weight": (E, D),
            **EXPERTS,
            "experts.up_proj_bias": (E, F),
            "experts.down_proj_bias": (E, D),
            "in_proj.weight": (D, P * D),
            "in_proj.bias": (D,),
            "out_proj.weight": (P * D, D),
            "out_proj.bias": (P * D,),
        },
    ),
    "dense": (
        {"num_experts": 0},
        {"shared_expert.up_proj.weight": (F, D), "shared_expert.down_proj.weight": (D, F)},
    ),
}


def make_layer(num_experts=E, d_model=D, d_ff=F, **options):
    options = {"segment_size": P, "backend": "reference", **options}
    return SegMoE(d_model, d_ff, num_experts, **options)


def place(backend):
    """Where a backend is tested: the reference on the CPU, the kernels where they run."""
    return "cuda" if GPU and backend == "triton" else "cpu"


def train_once(layer, x, dy, mask=None, *, run=None):
    """The output and the gradients of a step by name; ``run`` stands for the layer."""
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    call = layer if run is None else run
    y = call(leaf, *([] if mask is None else [mask]))
    y.backward(dy)
    # Cloned: zero_grad and a graph may write into the same memory again.
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach().clone(), "x": leaf.grad, **grads}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
